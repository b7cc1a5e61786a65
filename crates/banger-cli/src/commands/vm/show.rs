//! `banger vm show`.

use super::render;
use crate::commands::network;
use crate::complete;
use crate::context::with_daemon;
use crate::output::{OutputArgs, json, print};
use crate::report::Outcome;
use banger_api::endpoint::{GetVm, Nothing};

/// Show everything about a VM
#[derive(Debug, clap::Args)]
pub(crate) struct ShowArgs {
    /// The VM, by name, id or unambiguous prefix
    #[arg(value_name = "NAME", add = complete::vms())]
    vm: String,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: ShowArgs) -> Outcome {
    with_daemon(async |_, daemon| {
        let vm = daemon
            .client
            .call::<GetVm>(&[("vm", &args.vm)], &Nothing {})
            .await?;
        if args.output.json {
            json(&vm)?;
        } else {
            let now = network::of(&daemon.client, &vm).await;
            print(&render::details(&vm, now.as_ref()))?;
        }
        Ok(0)
    })
}
