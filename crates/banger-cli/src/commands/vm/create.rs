//! `banger vm create`.

use super::{boot, render};
use crate::commands::network;
use crate::complete;
use crate::context::with_daemon;
use crate::output::{OutputArgs, fields, json, print};
use crate::patience::{Wait, cancelled};
use crate::report::{Failure, Outcome, note};
use crate::systemd;
use crate::value;
use banger_api::endpoint::PostVms;
use banger_api::vm::{CreateVm, Vm};
use banger_core::name::VmName;
use banger_core::publish::PublishedPort;
use banger_core::spec::{DriverChoice, StorageChoice};
use clap::ValueEnum;
use std::time::Duration;

/// Create a VM and start it
///
/// Prints its name and address. The VM is there until it is deleted: `banger vm stop` and `banger vm start` keep its
/// disks.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  banger vm create                                     A VM with a name of its own
  banger vm create --name otter --wait                 Wait until it can be used, and time its boot
  banger vm create --vcpu 4 --memory 4G --disk-size 16G   A larger one with a work disk at /data
  banger vm create --nat -p 8080:80                    With internet, serving at port 8080
  banger vm create --no-start                          Only make it")]
pub(crate) struct CreateArgs {
    /// Its name, also its host name: a-z, 0-9 and hyphens, at most 63 (default: a free adjective-animal name)
    #[arg(long)]
    name: Option<VmName>,
    /// Its image (default: `default`)
    #[arg(long, add = complete::images())]
    image: Option<String>,
    /// vCPUs, 1 to 16 (default: 2)
    #[arg(long, alias = "vcpus", value_name = "N", value_parser = value::vcpus)]
    vcpu: Option<u64>,
    /// Memory in MiB, or with a unit such as `2G`; 128 MiB to 32 GiB (default: 1024)
    #[arg(long, value_name = "SIZE", value_parser = value::memory_mib)]
    memory: Option<u64>,
    /// New data that it may write to `/` (default: 8G)
    #[arg(long, value_name = "SIZE", value_parser = value::disk_bytes)]
    overlay_size: Option<u64>,
    /// Size of a work disk, mounted at `/data` (default: no work disk)
    #[arg(long, value_name = "SIZE", value_parser = value::disk_bytes)]
    disk_size: Option<u64>,
    /// Its kernel (default: the image's, or `default`)
    #[arg(long, add = complete::kernels())]
    kernel: Option<String>,
    /// The VMM that runs it
    #[arg(long, value_enum, default_value_t = DriverWord::Auto)]
    driver: DriverWord,
    /// How it gets its own `/` from the image (`vm show` and `doctor` say which, and why)
    #[arg(long, value_enum, default_value_t = StorageWord::Auto)]
    storage: StorageWord,
    /// Let its guest reach the public internet (`banger nat` changes it later)
    #[arg(long)]
    nat: bool,
    /// With NAT, let it reach private networks as well, though never this host itself
    #[arg(long, requires = "nat")]
    nat_private: bool,
    /// Lead a port of the host into it; may be repeated (`banger port` changes it later)
    ///
    /// Without an address the host listens on 127.0.0.1 alone.
    #[arg(long, short, value_name = "[ADDRESS:]HOST:GUEST[/udp]")]
    publish: Vec<PublishedPort>,
    /// Start it when the host boots, if it was running before
    #[arg(long)]
    autostart: bool,
    /// How much CPU time it may take, in per cent of one CPU (default: no limit)
    #[arg(long, value_name = "PERCENT", value_parser = value::cpu_limit)]
    cpu_limit: Option<u64>,
    /// Do not start it
    #[arg(long, conflicts_with = "wait")]
    no_start: bool,
    /// Wait until it is ready, and print the stages of its boot with their times
    #[arg(long)]
    wait: bool,
    /// How long to wait
    #[arg(long, value_name = "DURATION", default_value = "120s", requires = "wait", value_parser = value::duration)]
    timeout: Duration,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum DriverWord {
    Auto,
    Firecracker,
    Qemu,
}

impl DriverWord {
    /// The choice that the word stands for.
    pub(super) fn choice(self) -> DriverChoice {
        match self {
            Self::Auto => DriverChoice::Auto,
            Self::Firecracker => DriverChoice::Firecracker,
            Self::Qemu => DriverChoice::Qemu,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum StorageWord {
    Auto,
    Reflink,
    Overlay,
    Copy,
    Snapshot,
}

impl StorageWord {
    /// The choice that the word stands for.
    pub(super) fn choice(self) -> StorageChoice {
        match self {
            Self::Auto => StorageChoice::Auto,
            Self::Reflink => StorageChoice::Reflink,
            Self::Overlay => StorageChoice::Overlay,
            Self::Copy => StorageChoice::Copy,
            Self::Snapshot => StorageChoice::Snapshot,
        }
    }
}

pub(crate) fn run(args: CreateArgs) -> Outcome {
    let request = request(&args);
    with_daemon(async |context, daemon| {
        let key = uuid::Uuid::now_v7().to_string();
        let create = daemon
            .client
            .call_identified::<PostVms>(&[], &request, Some(&key));
        let wait = Wait {
            what: match request.storage {
                StorageChoice::Copy => "the VM to be made, with a copy of its image",
                _ => "the VM to be made",
            },
            goes_on: "the daemon goes on: `banger vm list` shows the VM",
        };
        let Some(created) = wait.of(create).await else {
            return cancelled();
        };
        let (mut vm, _): (Vm, _) = created?;
        // Told before the wait, so that the VM is known whatever comes of that.
        if !args.output.json {
            print(&fields([
                ("name", vm.name.to_string()),
                ("address", vm.address.to_string()),
            ]))?;
        }
        if args.wait {
            let name = vm.name.clone();
            vm = tokio::select! {
                ready = boot::watch(&daemon.client, vm.clone(), args.timeout, true) => match ready {
                    Ok(vm) => vm,
                    Err(failure) => return with_json(failure, &vm, args.output),
                },
                _ = tokio::signal::ctrl_c() => {
                    note(&format!("no longer waiting; vm `{name}` boots on"));
                    return cancelled();
                }
            };
        }
        network::warn_about(&daemon.client, &vm).await;
        if request.autostart {
            systemd::warn_of_no_autostart(&context.paths, &vm.name);
        }
        if args.output.json {
            json(&vm)?;
        } else {
            print(&fields([("phase  ", render::phase(&vm.phase))]))?;
            let verb = if vm.phase.is_live() { "ssh" } else { "start" };
            note(&format!("next: banger vm {verb} {}", vm.name));
        }
        Ok(0)
    })
}

/// The VM exists although waiting for it failed: scripts get its object all the same.
fn with_json(failure: Failure, vm: &Vm, output: OutputArgs) -> Outcome {
    if output.json {
        json(vm)?;
    }
    Err(failure)
}

fn request(args: &CreateArgs) -> CreateVm {
    CreateVm {
        name: args.name.clone().map(String::from),
        image: args.image.clone(),
        kernel: args.kernel.clone(),
        vcpus: args.vcpu,
        memory_mib: args.memory,
        overlay_bytes: args.overlay_size,
        disk_bytes: args.disk_size,
        driver: args.driver.choice(),
        storage: args.storage.choice(),
        nat: args.nat,
        nat_private: args.nat_private,
        ports: args.publish.clone(),
        autostart: args.autostart,
        // `none` is what it has without.
        cpu_limit: args.cpu_limit.filter(|limit| *limit > 0),
        start: !args.no_start,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: CreateArgs,
    }

    fn parse(words: &[&str]) -> Result<CreateVm, clap::Error> {
        let words = std::iter::once("create").chain(words.iter().copied());
        Line::try_parse_from(words).map(|line| request(&line.args))
    }

    #[test]
    fn without_options_everything_is_left_to_the_daemon() {
        let expected = CreateVm {
            start: true,
            ..CreateVm::default()
        };
        assert_eq!(parse(&[]).unwrap(), expected);
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        let words = [
            "--memory",
            "2G",
            "--overlay-size",
            "8G",
            "--disk-size",
            "16GiB",
            "--vcpu",
            "16",
            "--no-start",
        ];
        let request = parse(&words).unwrap();
        assert_eq!(request.memory_mib, Some(2048));
        assert_eq!(request.overlay_bytes, Some(8 << 30));
        assert_eq!(request.disk_bytes, Some(16 << 30));
        assert_eq!(request.vcpus, Some(16));
        assert!(!request.start);
    }

    #[test]
    fn ports_nat_and_autostart_are_asked_for_by_name() {
        let words = [
            "--nat",
            "--nat-private",
            "-p",
            "8080:80",
            "--publish",
            "0.0.0.0:53:5353/udp",
            "--autostart",
            "--cpu-limit",
            "150%",
        ];
        let request = parse(&words).unwrap();
        let ports: Vec<String> = request.ports.iter().map(ToString::to_string).collect();
        assert_eq!(ports, ["127.0.0.1:8080:80/tcp", "0.0.0.0:53:5353/udp"]);
        assert!(request.nat && request.nat_private && request.autostart);
        assert_eq!(request.cpu_limit, Some(150));
        assert_eq!(parse(&["--cpu-limit", "none"]).unwrap().cpu_limit, None);
    }

    #[test]
    fn bad_values_are_refused_with_what_is_allowed() {
        for (words, says) in [
            (["--vcpu", "0"], "0 vCPUs asked for; 1 to 16 are allowed"),
            (["--vcpu", "17"], "17 vCPUs asked for; 1 to 16 are allowed"),
            (["--vcpu", "two"], "`two` is not a number"),
            (
                ["--memory", "64"],
                "64 MiB of memory asked for; 128 to 32768 MiB are allowed",
            ),
            (
                ["--memory", "40000"],
                "40000 MiB of memory asked for; 128 to 32768 MiB are allowed",
            ),
            (["--disk-size", "1M"], "64 MiB to 16 TiB are allowed"),
            (["--overlay-size", "much"], "`much` is not a size"),
            (["--name", "Otter"], "only a-z, 0-9 and hyphens are allowed"),
            (["--name", "otter-"], "starts or ends with a hyphen"),
            (["-p", "80"], "is not a published port"),
            (["-p", "8080:80/sctp"], "write [ADDRESS:]HOST:GUEST[/udp]"),
            (["--driver", "xen"], "auto, firecracker, qemu"),
        ] {
            let error = parse(&words).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{words:?}");
            assert!(error.to_string().contains(says), "{words:?}: {error}");
        }
    }
}
