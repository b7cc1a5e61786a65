//! `banger driver list`.

use super::render;
use crate::context::with_daemon;
use crate::output::{OutputArgs, json, print};
use crate::report::Outcome;
use banger_api::endpoint::{GetDrivers, Nothing};

/// List the VMMs that were found, whether they can run VMs here, and why
#[derive(Debug, clap::Args)]
#[command(visible_alias = "ls")]
pub(crate) struct ListArgs {
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: ListArgs) -> Outcome {
    with_daemon(async |_, daemon| {
        let drivers = daemon.client.call::<GetDrivers>(&[], &Nothing {}).await?;
        if args.output.json {
            json(&drivers)?;
        } else {
            print(&render(&drivers))?;
        }
        Ok(0)
    })
}
