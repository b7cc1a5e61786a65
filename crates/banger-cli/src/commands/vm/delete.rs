//! `banger vm delete`.

use super::{for_each, render};
use crate::complete;
use crate::confirm::ConfirmArgs;
use crate::context::with_daemon;
use crate::output::OutputArgs;
use crate::patience::Wait;
use crate::report::Outcome;
use banger_api::endpoint::DeleteVmEndpoint;
use banger_api::vm::DeleteVm;

/// Delete VMs: put them into the trash, or purge them
///
/// The trash keeps a VM's record and files and frees its name. `--purge` removes them permanently, also of a VM that is
/// in the trash already.
#[derive(Debug, clap::Args)]
#[command(visible_alias = "rm")]
#[command(
    after_help = "Examples:\n  banger vm delete otter\n  banger vm delete otter --force --purge   Kill it and leave nothing"
)]
pub(crate) struct DeleteArgs {
    /// The VMs, by name, id or unambiguous prefix
    #[arg(value_name = "NAME", required = true, add = complete::purgeable_vms())]
    vms: Vec<String>,
    /// Kill those that run
    #[arg(long)]
    force: bool,
    /// Remove records and files permanently; asks first on a terminal
    #[arg(long)]
    purge: bool,
    #[command(flatten)]
    confirm: ConfirmArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: DeleteArgs) -> Outcome {
    let request = DeleteVm {
        force: args.force,
        purge: args.purge,
    };
    if args.purge {
        let names = args.vms.join(", ");
        args.confirm.ask(&format!(
            "This removes {names} permanently, disks included."
        ))?;
    }
    with_daemon(async |_, daemon| {
        let line = if args.purge {
            render::purged
        } else {
            render::line
        };
        let wait = Wait {
            what: &format!("the deletion of {}", args.vms.join(", ")),
            goes_on: "it goes on all the same: `banger vm list` and `banger trash list` show what is left",
        };
        let each = for_each(&daemon, &args.vms, args.output, line, |client, name| {
            let request = request.clone();
            async move {
                client
                    .call::<DeleteVmEndpoint>(&[("vm", &name)], &request)
                    .await
            }
        });
        wait.outcome(each).await
    })
}
