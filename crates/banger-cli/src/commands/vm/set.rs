//! `banger vm set`.

use super::create::DriverWord;
use super::render;
use crate::commands::network;
use crate::complete;
use crate::confirm::ConfirmArgs;
use crate::context::with_daemon;
use crate::output::{OutputArgs, json, print};
use crate::patience::{Wait, cancelled};
use crate::report::{Outcome, note};
use crate::systemd;
use crate::value;
use banger_api::endpoint::{GetVm, Nothing, PatchVm};
use banger_api::vm::SetVm;
use banger_core::name::VmName;
use clap::ValueEnum;

/// Change a VM
///
/// Name, NAT, autostart and the limit of CPU time change at once, whatever it does; the rest needs it stopped.
#[derive(Debug, clap::Args)]
#[command(override_usage = "banger vm set [OPTIONS] <NAME>")]
#[command(group = clap::ArgGroup::new("change")
    .args([
        "vcpu", "memory", "name", "image", "kernel", "driver", "overlay_size", "disk_size", "nat", "nat_private",
        "autostart", "cpu_limit",
    ])
    .required(true)
    .multiple(true))]
#[command(after_help = "Examples:
  banger vm set otter --vcpu 4 --memory 4G
  banger vm set otter --name calm-otter     Its host name follows at the next boot
  banger vm set otter --disk-size 32G       Grow its work disk; a disk never shrinks
  banger vm set otter --cpu-limit 150%      At most one and a half CPUs of this host (`none` ends it)
  banger vm set otter --driver firecracker  Another VMM from its next start on
  banger vm set otter --image web           Boot another image: what it wrote to `/` is thrown away")]
pub(crate) struct SetArgs {
    /// The VM, by name, id or unambiguous prefix
    #[arg(value_name = "NAME", add = complete::vms())]
    vm: String,
    /// vCPUs, 1 to 16
    #[arg(long, alias = "vcpus", value_name = "N", value_parser = value::vcpus)]
    vcpu: Option<u64>,
    /// Memory in MiB, or with a unit such as `2G`; 128 MiB to 32 GiB
    #[arg(long, value_name = "SIZE", value_parser = value::memory_mib)]
    memory: Option<u64>,
    /// Another name
    #[arg(long, value_name = "NEW")]
    name: Option<VmName>,
    /// Another image. Its overlay, all that it wrote to `/`, is thrown away; its work disk stays. Asks first on a
    /// terminal
    #[arg(long, add = complete::images())]
    image: Option<String>,
    /// Another kernel, such as `default`, from its next start on
    #[arg(long, add = complete::kernels())]
    kernel: Option<String>,
    /// The VMM that runs it from its next start on; `auto` lets each start choose
    #[arg(long, value_enum)]
    driver: Option<DriverWord>,
    /// More new data that it may write to `/`; the filesystem grows at the next boot, whatever the storage
    #[arg(long, value_name = "SIZE", value_parser = value::disk_bytes)]
    overlay_size: Option<u64>,
    /// A larger work disk; its filesystem grows at the next boot. Without one before, it gets one
    #[arg(long, value_name = "SIZE", value_parser = value::disk_bytes)]
    disk_size: Option<u64>,
    /// Whether its guest may reach the public internet
    #[arg(long, value_enum)]
    nat: Option<Switch>,
    /// Whether NAT leads to private networks as well, though never to this host itself
    #[arg(long, value_enum)]
    nat_private: Option<Switch>,
    /// Whether it starts when the host boots, if it was running before
    #[arg(long, value_enum)]
    autostart: Option<Switch>,
    /// How much CPU time it may take, in per cent of one CPU; `none` takes the limit away
    #[arg(long, value_name = "PERCENT", value_parser = value::cpu_limit)]
    cpu_limit: Option<u64>,
    #[command(flatten)]
    confirm: ConfirmArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

pub(crate) fn run(args: SetArgs) -> Outcome {
    let request = request(&args);
    if let Some(image) = &args.image {
        args.confirm.ask(&format!(
            "With another image, `{image}`, all that {} wrote to `/` is thrown away; its work disk stays.",
            args.vm
        ))?;
    }
    with_daemon(async |context, daemon| {
        let parameters = [("vm", args.vm.as_str())];
        let before = match request.image {
            Some(_) => Some(
                daemon
                    .client
                    .call::<GetVm>(&parameters, &Nothing {})
                    .await?,
            ),
            None => None,
        };
        let wait = Wait {
            what: &format!("the change of {}", args.vm),
            goes_on: &format!(
                "the change is made all the same: `banger vm show {}` shows it",
                args.vm
            ),
        };
        let change = daemon.client.call::<PatchVm>(&parameters, &request);
        let Some(changed) = wait.of(change).await else {
            return cancelled();
        };
        let vm = changed?;
        if before.is_some_and(|before| before.spec.image != vm.spec.image) {
            note(&format!(
                "the overlay of `{}` was thrown away; its work disk stays",
                vm.name
            ));
        }
        if request.nat == Some(true) || request.nat_private == Some(true) {
            network::warn_about(&daemon.client, &vm).await;
        }
        if request.autostart == Some(true) {
            systemd::warn_of_no_autostart(&context.paths, &vm.name);
        }
        if args.output.json {
            json(&vm)?;
        } else {
            print(&render::list(std::slice::from_ref(&vm), false))?;
        }
        Ok(0)
    })
}

fn request(args: &SetArgs) -> SetVm {
    let on = |switch| switch == Switch::On;
    SetVm {
        vcpus: args.vcpu,
        memory_mib: args.memory,
        name: args.name.clone().map(String::from),
        image: args.image.clone(),
        kernel: args.kernel.clone(),
        driver: args.driver.map(DriverWord::choice),
        overlay_bytes: args.overlay_size,
        disk_bytes: args.disk_size,
        nat: args.nat.map(on),
        nat_private: args.nat_private.map(on),
        autostart: args.autostart.map(on),
        cpu_limit: args.cpu_limit,
        generation: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use banger_core::spec::DriverChoice;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: SetArgs,
    }

    fn parse(words: &[&str]) -> Result<SetVm, clap::Error> {
        let words = ["set", "otter"].into_iter().chain(words.iter().copied());
        Line::try_parse_from(words).map(|line| request(&line.args))
    }

    #[test]
    fn what_is_not_named_stays() {
        let request = parse(&["--nat", "off", "--autostart", "on", "--name", "fox"]).unwrap();
        let expected = SetVm {
            name: Some("fox".to_owned()),
            nat: Some(false),
            autostart: Some(true),
            ..SetVm::default()
        };
        assert_eq!(request, expected);
        let request = parse(&["--disk-size", "32G", "--image", "web"]).unwrap();
        assert_eq!(request.disk_bytes, Some(32 << 30));
        assert_eq!(request.image.as_deref(), Some("web"));
        let words = [
            "--driver",
            "auto",
            "--kernel",
            "new",
            "--overlay-size",
            "16G",
        ];
        let request = parse(&words).unwrap();
        assert_eq!(request.driver, Some(DriverChoice::Auto));
        assert_eq!(request.kernel.as_deref(), Some("new"));
        assert_eq!(request.overlay_bytes, Some(16 << 30));
        let request = parse(&["--nat-private", "on"]).unwrap();
        assert_eq!((request.nat, request.nat_private), (None, Some(true)));
        for (text, limit) in [("150%", 150), ("20", 20), ("none", 0)] {
            let request = parse(&["--cpu-limit", text]).unwrap();
            assert_eq!(request.cpu_limit, Some(limit));
        }
    }

    #[test]
    fn nothing_to_change_is_refused() {
        assert_eq!(parse(&[]).unwrap_err().exit_code(), 2);
        assert_eq!(parse(&["--yes"]).unwrap_err().exit_code(), 2);
        assert_eq!(parse(&["--nat", "maybe"]).unwrap_err().exit_code(), 2);
        for bad in ["9%", "much", "0"] {
            let error = parse(&["--cpu-limit", bad]).unwrap_err();
            assert_eq!(error.exit_code(), 2);
        }
    }
}
