//! `banger vm restore`.

use crate::commands::{done_to_each, worst};
use crate::context::with_daemon;
use crate::output::{OutputArgs, json, print};
use crate::patience::{Wait, cancelled};
use crate::report::{Failure, Outcome, note};
use banger_api::endpoint::PostRestore;
use banger_api::vm::RestoreVms;

/// Start all stopped VMs that are to run
///
/// After a crash or a reboot of the host, a VM that was running is stopped but still `desired on`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  banger vm restore
  banger vm restore --autostart   Only those made or set with `--autostart`")]
pub(crate) struct RestoreArgs {
    /// Only VMs with autostart
    #[arg(long)]
    autostart: bool,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: RestoreArgs) -> Outcome {
    let request = RestoreVms {
        autostart: args.autostart,
    };
    with_daemon(async |_, daemon| {
        let wait = Wait {
            what: "stopped VMs to start",
            goes_on: "all of them start all the same: `banger vm list` shows them",
        };
        let restore = daemon.client.call::<PostRestore>(&[], &request);
        let Some(restored) = wait.of(restore).await else {
            return cancelled();
        };
        let outcomes = restored?;
        if args.output.json {
            json(&outcomes)?;
        } else if outcomes.is_empty() {
            note("nothing to restore: no stopped VM has `desired: on`");
        } else {
            print(&done_to_each(&outcomes, "started"))?;
        }
        let failures = outcomes.into_iter().filter_map(|outcome| outcome.error);
        Ok(worst(&failures.map(Failure::from).collect::<Vec<_>>()))
    })
}
