//! `banger net`.

use super::network;
use crate::complete;
use crate::context::with_daemon;
use crate::output::{OutputArgs, fields, json, print, table};
use crate::report::Outcome;
use banger_api::endpoint::{DeleteVmJoins, Endpoint, PostVmJoins};
use banger_api::network::{JoinVm, NetworkStatus};
use banger_api::vm::Vm;

/// Let VMs reach each other, or not
///
/// VMs are closed to each other unless they are joined. A join stays until it is removed, and takes effect at
/// once.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum NetCommand {
    Join(JoinArgs),
    Leave(LeaveArgs),
    Status(StatusArgs),
}

/// Two VMs.
#[derive(Debug, clap::Args)]
struct Pair {
    /// One VM, by name, id or unambiguous prefix
    #[arg(value_name = "NAME", add = complete::vms())]
    one: String,
    /// The other one
    #[arg(value_name = "OTHER", add = complete::vms())]
    other: String,
    #[command(flatten)]
    output: OutputArgs,
}

/// Let two VMs reach each other
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  banger net join web database   `web` reaches `database.vm`, and the other way round"
)]
pub(crate) struct JoinArgs {
    #[command(flatten)]
    pair: Pair,
}

/// Let two VMs reach each other no longer
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  banger net leave web database")]
pub(crate) struct LeaveArgs {
    #[command(flatten)]
    pair: Pair,
}

/// Show joins, and what the rules have dropped
#[derive(Debug, clap::Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(command: NetCommand) -> Outcome {
    match command {
        NetCommand::Join(args) => change::<PostVmJoins>(args.pair, "reach each other"),
        NetCommand::Leave(args) => change::<DeleteVmJoins>(args.pair, "reach each other no longer"),
        NetCommand::Status(args) => status(args),
    }
}

fn change<E: Endpoint<Request = JoinVm, Reply = Vm>>(pair: Pair, done: &str) -> Outcome {
    let request = JoinVm {
        other: pair.other.clone(),
    };
    with_daemon(async |_, daemon| {
        let vm = daemon
            .client
            .call::<E>(&[("vm", &pair.one)], &request)
            .await?;
        if pair.output.json {
            json(&vm)?;
        } else {
            print(&format!("{} and {} {done}\n", vm.name, pair.other))?;
        }
        Ok(0)
    })
}

fn status(args: StatusArgs) -> Outcome {
    with_daemon(async |_, daemon| {
        let status = network::status(&daemon.client).await?;
        if args.output.json {
            json(&status)?;
        } else {
            print(&render(&status))?;
        }
        Ok(0)
    })
}

fn render(status: &NetworkStatus) -> String {
    let rows = status.vms.iter().map(|vm| {
        let joins: Vec<&str> = vm.joins.iter().map(|name| name.as_str()).collect();
        let joins = if joins.is_empty() {
            "-".to_owned()
        } else {
            joins.join(", ")
        };
        vec![vm.name.to_string(), vm.address.to_string(), joins]
    });
    let repairs = match status.repairs {
        0 => "no other program has changed them".to_owned(),
        1 => "put back once after another program changed them".to_owned(),
        repairs => format!("put back {repairs} times after another program changed them"),
    };
    format!(
        "{}\n{}{}",
        fields([("mode", status.mode.name().to_owned()), ("rules", repairs)]),
        table(&["NAME", "ADDRESS", "JOINED WITH"], rows),
        network::dropped(status)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_tells_who_reaches_whom() {
        insta::assert_snapshot!(render(&network::tests::example()), @r"
        mode   root
        rules  put back once after another program changed them

        NAME        ADDRESS     JOINED WITH
        calm-otter  172.16.0.2  fox
        fox         172.16.0.3  calm-otter

        DROPPED     PACKETS
        not_joined  3
        private     12
        ");
    }
}
