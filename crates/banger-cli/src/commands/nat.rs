//! `banger nat`.

use super::network;
use super::vm::for_each;
use crate::complete;
use crate::context::with_daemon;
use crate::output::{OutputArgs, fields, json, print, table};
use crate::report::{Failure, Outcome};
use banger_api::endpoint::PatchVm;
use banger_api::network::{NetworkStatus, VmNetwork, WayOut};
use banger_api::vm::{SetVm, Vm};

/// Let guests reach the internet, or not
///
/// A new VM has no NAT. With it, its guest reaches the public internet and nothing else: not the host, not other VMs,
/// not the networks around, unless `--private` opens those too. A change takes effect at once, also for connections
/// that are open. Guests have IPv4 alone: what is on the internet by IPv6 only is out of their reach.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum NatCommand {
    Up(UpArgs),
    Down(DownArgs),
    Status(StatusArgs),
}

/// The VMs that a verb is for.
#[derive(Debug, clap::Args)]
struct Vms {
    /// The VMs, by name, id or unambiguous prefix
    #[arg(value_name = "NAME", required = true, add = complete::vms())]
    vms: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
}

/// Let guests reach the public internet
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  banger nat up otter fox
  banger nat up otter --private             The networks around, too (`banger vm set otter --nat-private off` ends it)")]
pub(crate) struct UpArgs {
    /// Private networks as well, such as that of your office, though never this host itself
    #[arg(long)]
    private: bool,
    #[command(flatten)]
    vms: Vms,
}

/// Close the internet to guests, and end their connections to it
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  banger nat down otter")]
pub(crate) struct DownArgs {
    #[command(flatten)]
    vms: Vms,
}

/// Show who reaches the internet, how, and what is in the way
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  banger nat status\n  banger nat status otter --json")]
pub(crate) struct StatusArgs {
    /// The VMs, by name, id or unambiguous prefix (default: all)
    #[arg(value_name = "NAME", add = complete::vms())]
    vms: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(command: NatCommand) -> Outcome {
    match command {
        NatCommand::Up(args) => switch(args.vms, true, args.private),
        NatCommand::Down(args) => switch(args.vms, false, false),
        NatCommand::Status(args) => status(args),
    }
}

fn switch(args: Vms, nat: bool, private: bool) -> Outcome {
    with_daemon(async |_, daemon| {
        let call = |client: banger_api::client::Client, name: String| async move {
            let request = SetVm {
                nat: Some(nat),
                nat_private: private.then_some(true),
                ..SetVm::default()
            };
            let vm = client.call::<PatchVm>(&[("vm", &name)], &request).await?;
            network::warn_about(&client, &vm).await;
            Ok::<Vm, Failure>(vm)
        };
        for_each(&daemon, &args.vms, args.output, line, call).await
    })
}

fn line(vm: &Vm) -> String {
    let text = match (vm.spec.nat, vm.phase.is_live()) {
        (true, true) => "NAT is on",
        (true, false) => "NAT is on from its next start",
        (false, _) => "NAT is off",
    };
    let private = vm.spec.nat && vm.spec.nat_private;
    let more = if private {
        ", for private networks too"
    } else {
        ""
    };
    format!("{}: {text}{more}\n", vm.name)
}

fn status(args: StatusArgs) -> Outcome {
    with_daemon(async |_, daemon| {
        let mut status = network::status(&daemon.client).await?;
        status.vms = network::choose(status.vms, &args.vms)?;
        if args.output.json {
            json(&status)?;
        } else {
            print(&render(&status))?;
        }
        network::warn_of_way_out(&status.way_out);
        Ok(0)
    })
}

fn render(status: &NetworkStatus) -> String {
    let way_out = match &status.way_out {
        WayOut::Closed => "closed: no running VM has NAT".to_owned(),
        WayOut::Open { by, closed_by } if closed_by.is_empty() => format!("by {}", by.join(", ")),
        WayOut::Open { by, .. } => {
            format!("by {}, but closed by somebody else's rules", by.join(", "))
        }
        WayOut::Failed { why, .. } => format!("failed: {why}"),
    };
    let word = |on, private| match (on, private) {
        (true, true) => "private".to_owned(),
        (true, false) => "on".to_owned(),
        (false, _) => "off".to_owned(),
    };
    let now = |vm: &VmNetwork| {
        let now = word(vm.nat_now, vm.nat_private_now);
        match vm.live {
            false => "not running".to_owned(),
            true if now == word(vm.nat, vm.nat_private) => now,
            true => format!("{now} (`banger doctor --repair`)"),
        }
    };
    let rows = status.vms.iter().map(|vm| {
        vec![
            vm.name.to_string(),
            vm.address.to_string(),
            word(vm.nat, vm.nat_private),
            now(vm),
        ]
    });
    format!(
        "{}\n{}{}",
        fields([("way out", way_out)]),
        table(&["NAME", "ADDRESS", "NAT", "NOW"], rows),
        network::dropped(status)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_tells_what_is_wanted_and_what_is_so() {
        insta::assert_snapshot!(render(&network::tests::example()), @r"
        way out  by eth0, but closed by somebody else's rules

        NAME        ADDRESS     NAT  NOW
        calm-otter  172.16.0.2  on   on
        fox         172.16.0.3  on   not running

        DROPPED     PACKETS
        not_joined  3
        private     12
        ");
    }
}
