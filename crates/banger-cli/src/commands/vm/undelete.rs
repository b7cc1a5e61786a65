//! `banger vm undelete`.

use super::render;
use crate::complete;
use crate::context::with_daemon;
use crate::output::{OutputArgs, json, print};
use crate::report::Outcome;
use banger_api::endpoint::PostVmUndelete;
use banger_api::vm::UndeleteVm;
use banger_core::name::VmName;

/// Bring a VM back from the trash
///
/// It comes back stopped, with its disks, its address and its name.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  banger vm undelete otter
  banger vm undelete otter --name old-otter   Another VM has its name now")]
pub(crate) struct UndeleteArgs {
    /// The VM, by name, id or unambiguous prefix; of VMs with the same name, the id says which
    #[arg(value_name = "NAME", add = complete::trashed_vms())]
    vm: String,
    /// Its name from now on
    #[arg(long, value_name = "NEW")]
    name: Option<VmName>,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: UndeleteArgs) -> Outcome {
    let request = UndeleteVm {
        name: args.name.map(String::from),
    };
    with_daemon(async |_, daemon| {
        let vm = daemon
            .client
            .call::<PostVmUndelete>(&[("vm", &args.vm)], &request)
            .await?;
        if args.output.json {
            json(&vm)?;
        } else {
            print(&render::line(&vm))?;
        }
        Ok(0)
    })
}
