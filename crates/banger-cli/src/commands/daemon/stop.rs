//! `banger daemon stop`.

use crate::context::{Context, block_on};
use crate::ensure_daemon::stop_if_running;
use crate::report::{Outcome, note};
use banger_api::daemon::StopDaemon;
use std::time::Duration;

/// How long the daemon may take to end when it stops no VMs.
const LIMIT: Duration = Duration::from_secs(30);
/// How long when it stops VMs first: a guest has 30 s before it is ended, and guests stop side by side.
const LIMIT_WITH_VMS: Duration = Duration::from_secs(300);

/// Stop the daemon; VMs run on unless `--vms` is given
///
/// Returns when it has ended. It is no error if it does not run.
#[derive(Debug, clap::Args)]
pub(crate) struct StopArgs {
    /// Stop all VMs first, in order
    #[arg(long)]
    vms: bool,
}

pub(crate) fn run(args: StopArgs) -> Outcome {
    let context = Context::from_env()?;
    block_on(async {
        if args.vms {
            // Only a daemon can stop VMs that outlived the last one.
            context.daemon().await?;
        }
        let limit = if args.vms { LIMIT_WITH_VMS } else { LIMIT };
        if !stop_if_running(&context.paths, StopDaemon { vms: args.vms }, limit).await? {
            note("the daemon does not run");
        }
        Ok(0)
    })
}
