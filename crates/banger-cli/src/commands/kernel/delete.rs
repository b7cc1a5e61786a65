//! `banger kernel delete`.

use crate::commands::worst;
use crate::complete;
use crate::context::with_daemon;
use crate::report::{Failure, Outcome};
use banger_api::endpoint::{DeleteKernel, Nothing};

/// Delete kernels that no VM uses
#[derive(Debug, clap::Args)]
#[command(visible_alias = "rm")]
pub(crate) struct DeleteArgs {
    /// The kernels, by name, id or unambiguous prefix
    #[arg(value_name = "KERNEL", required = true, add = complete::kernels())]
    kernels: Vec<String>,
}

pub(crate) fn run(args: DeleteArgs) -> Outcome {
    with_daemon(async |_, daemon| {
        let mut failures: Vec<Failure> = Vec::new();
        for kernel in &args.kernels {
            let deleted = daemon
                .client
                .call::<DeleteKernel>(&[("kernel", kernel)], &Nothing {})
                .await;
            failures.extend(deleted.err().map(Failure::from));
        }
        Ok(worst(&failures))
    })
}
