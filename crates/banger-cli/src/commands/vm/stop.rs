//! `banger vm stop` and `banger vm restart`.

use super::{for_each, render};
use crate::complete;
use crate::context::with_daemon;
use crate::output::OutputArgs;
use crate::patience::Wait;
use crate::report::Outcome;
use crate::value;
use banger_api::endpoint::{Endpoint, PostVmRestart, PostVmStop};
use banger_api::vm::{StopVm, Vm};
use std::time::Duration;

/// The VMs that a verb is for, and how patient it is.
#[derive(Debug, clap::Args)]
struct Vms {
    /// The VMs, by name, id or unambiguous prefix
    #[arg(value_name = "NAME", required = true, add = complete::vms())]
    vms: Vec<String>,
    /// How long a guest may take to shut down before it is ended (default: 30s)
    #[arg(long, value_name = "DURATION", value_parser = value::duration)]
    timeout: Option<Duration>,
    #[command(flatten)]
    output: OutputArgs,
}

/// Ask VMs to shut down, and end those that do not in time
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  banger vm stop otter\n  banger vm stop otter fox --timeout 2m"
)]
pub(crate) struct StopArgs {
    #[command(flatten)]
    vms: Vms,
}

/// Stop VMs, then start them
#[derive(Debug, clap::Args)]
pub(crate) struct RestartArgs {
    #[command(flatten)]
    vms: Vms,
}

pub(crate) fn run(args: StopArgs) -> Outcome {
    each::<PostVmStop>(args.vms, "shutdown")
}

pub(crate) fn restart(args: RestartArgs) -> Outcome {
    each::<PostVmRestart>(args.vms, "restart")
}

fn each<E: Endpoint<Request = StopVm, Reply = Vm>>(args: Vms, what: &str) -> Outcome {
    let timeout_ms = args.timeout.map(value::milliseconds);
    with_daemon(async |_, daemon| {
        let wait = Wait {
            what: &format!("the {what} of {}", args.vms.join(", ")),
            goes_on: &format!(
                "the {what} goes on all the same: `banger vm list` shows how far it is"
            ),
        };
        wait.outcome(for_each(
            &daemon,
            &args.vms,
            args.output,
            render::line,
            |client, name| async move {
                client
                    .call::<E>(&[("vm", &name)], &StopVm { timeout_ms })
                    .await
            },
        ))
        .await
    })
}
