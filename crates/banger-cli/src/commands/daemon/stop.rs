//! `banger daemon stop`.

use crate::context::{Context, block_on};
use crate::ensure_daemon::{status, stop_if_running};
use crate::report::{Outcome, note};
use crate::systemd;
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
    /// Do nothing unless the host shuts down or you have logged out; VMs are then still to run
    #[arg(long, requires = "vms", hide = true)]
    if_going_down: bool,
}

pub(crate) fn run(args: StopArgs) -> Outcome {
    let context = Context::from_env()?;
    let going_down = if args.if_going_down {
        let Some(going_down) = systemd::what_goes_down() else {
            note("neither the host nor your systemd goes down: VMs run on");
            return Ok(0);
        };
        Some(going_down)
    } else {
        None
    };
    let request = StopDaemon {
        vms: args.vms,
        going_down,
    };
    block_on(async {
        // Only a daemon can stop VMs that outlived the last one. One that goes down in any case is not replaced first.
        if args.vms && (going_down.is_none() || status(&context.paths).await?.is_none()) {
            context.daemon().await?;
        }
        let limit = if args.vms { LIMIT_WITH_VMS } else { LIMIT };
        if !stop_if_running(&context.paths, request, limit).await? {
            note("the daemon does not run");
        }
        Ok(0)
    })
}
