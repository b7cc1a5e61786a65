//! `banger trash`.

use super::vm::render;
use super::{done_to_each, worst};
use crate::confirm::ConfirmArgs;
use crate::context::with_daemon;
use crate::output::{OutputArgs, json, print};
use crate::patience::{Wait, cancelled};
use crate::report::{Failure, Outcome, note};
use banger_api::endpoint::{GetVms, Nothing, PostTrashEmpty};
use banger_api::vm::ListVms;

/// See VMs that were deleted, and remove them permanently
///
/// `banger vm undelete` brings one back. Those that have been there long enough are removed automatically (`[trash]
/// keep` in the settings).
#[derive(Debug, clap::Subcommand)]
pub(crate) enum TrashCommand {
    #[command(visible_alias = "ls")]
    List(ListArgs),
    Empty(EmptyArgs),
}

/// List VMs in the trash, with when they were deleted
#[derive(Debug, clap::Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    output: OutputArgs,
}

/// Remove all VMs in the trash permanently, disks included
///
/// Asks first on a terminal. `banger vm delete --purge NAME` removes a single one.
#[derive(Debug, clap::Args)]
pub(crate) struct EmptyArgs {
    /// (there is none: all of the trash goes)
    #[arg(value_name = "NAME", hide = true, value_parser = no_name)]
    vms: Vec<String>,
    #[command(flatten)]
    confirm: ConfirmArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Who names one VM does not mean all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the trash is emptied as a whole; `banger vm delete --purge {0}` removes this one alone")]
struct NameError(String);

fn no_name(name: &str) -> Result<String, NameError> {
    Err(NameError(name.escape_debug().to_string()))
}

pub(crate) fn run(command: TrashCommand) -> Outcome {
    match command {
        TrashCommand::List(args) => list(args),
        TrashCommand::Empty(args) => empty(args),
    }
}

fn list(args: ListArgs) -> Outcome {
    with_daemon(async |_, daemon| {
        let request = ListVms { trash: true };
        let vms = daemon.client.call::<GetVms>(&[], &request).await?;
        if args.output.json {
            json(&vms)?;
        } else if vms.is_empty() {
            note("the trash is empty");
        } else {
            print(&render::list(&vms, true))?;
        }
        Ok(0)
    })
}

fn empty(args: EmptyArgs) -> Outcome {
    args.confirm
        .ask("This removes all VMs in the trash permanently, disks included.")?;
    with_daemon(async |_, daemon| {
        let wait = Wait {
            what: "the VMs in the trash to be removed",
            goes_on: "all of them are removed all the same: `banger trash list` shows what is left",
        };
        let empty = daemon.client.call::<PostTrashEmpty>(&[], &Nothing {});
        let Some(emptied) = wait.of(empty).await else {
            return cancelled();
        };
        let outcomes = emptied?;
        if args.output.json {
            json(&outcomes)?;
        } else if outcomes.is_empty() {
            note("the trash is empty");
        } else {
            print(&done_to_each(&outcomes, "purged"))?;
        }
        let failures = outcomes.into_iter().filter_map(|outcome| outcome.error);
        Ok(worst(&failures.map(Failure::from).collect::<Vec<_>>()))
    })
}
