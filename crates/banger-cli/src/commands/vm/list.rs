//! `banger vm list`.

use super::render;
use crate::context::with_daemon;
use crate::output::{OutputArgs, json, print};
use crate::report::{Outcome, note};
use banger_api::endpoint::GetVms;
use banger_api::vm::ListVms;

/// List VMs
#[derive(Debug, clap::Args)]
#[command(visible_alias = "ls")]
pub(crate) struct ListArgs {
    /// List those in the trash instead
    #[arg(long)]
    trash: bool,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: ListArgs) -> Outcome {
    with_daemon(async |_, daemon| {
        let vms = daemon
            .client
            .call::<GetVms>(&[], &ListVms { trash: args.trash })
            .await?;
        if args.output.json {
            json(&vms)?;
        } else if !vms.is_empty() {
            print(&render::list(&vms, args.trash))?;
        } else if args.trash {
            note("the trash is empty");
        } else {
            note("no VMs; `banger vm create` makes one");
        }
        Ok(0)
    })
}
