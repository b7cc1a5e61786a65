//! `banger kernel list`.

use crate::context::with_daemon;
use crate::output::{OutputArgs, json, print, table};
use crate::report::{Outcome, note};
use crate::value;
use banger_api::endpoint::{GetKernels, Nothing};
use banger_api::kernel::Kernel;

/// List kernels
#[derive(Debug, clap::Args)]
#[command(visible_alias = "ls")]
pub(crate) struct ListArgs {
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: ListArgs) -> Outcome {
    with_daemon(async |_, daemon| {
        let kernels = daemon.client.call::<GetKernels>(&[], &Nothing {}).await?;
        if args.output.json {
            json(&kernels)?;
        } else if kernels.is_empty() {
            note("no kernels; `banger kernel import` imports the distribution's cloud kernel");
        } else {
            print(&render(&kernels))?;
        }
        Ok(0)
    })
}

/// The kernels as a table.
pub(super) fn render(kernels: &[Kernel]) -> String {
    let rows = kernels.iter().map(|kernel| {
        vec![
            kernel
                .name
                .as_ref()
                .map_or_else(|| "-".to_owned(), ToString::to_string),
            kernel.id.to_string(),
            kernel.release.clone(),
            kernel.source.clone(),
            value::bytes(kernel.bytes),
            value::date(kernel.created_at),
        ]
    });
    table(
        &["NAME", "ID", "RELEASE", "SOURCE", "SIZE", "CREATED"],
        rows,
    )
}
