//! `banger daemon stop`.

use crate::context::{Context, block_on};
use crate::ensure_daemon::{status, stop_if_running};
use crate::patience::{Wait, cancelled};
use crate::report::{Outcome, note, warn};
use crate::systemd;
use banger_api::client::Client;
use banger_api::daemon::StopDaemon;
use banger_api::endpoint::GetVms;
use banger_api::paths::Paths;
use banger_api::vm::{ListVms, Vm};
use banger_core::spec::Storage;
use banger_core::watermark::COW_STEP;
use std::time::Duration;

/// How long the daemon may take to end when it stops no VMs: whoever does things on the host for it may be busy.
const LIMIT: Duration = Duration::from_secs(90);
/// How long when it stops VMs first: a guest has 30 s before it is ended, and guests stop side by side.
const LIMIT_WITH_VMS: Duration = Duration::from_secs(300);

/// How long a daemon that is to end is asked for what runs.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Stop the daemon; VMs run on unless `--vms` is given
///
/// Returns when it has ended. It is no error if it does not run.
#[derive(Debug, clap::Args)]
pub(crate) struct StopArgs {
    /// Shut all VMs down cleanly first
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
        let alone = if args.vms {
            None
        } else {
            left_alone(&running(&context.paths).await)
        };
        let stop = stop_if_running(&context.paths, request, limit);
        let stopped = if args.vms {
            let wait = Wait {
                what: "the VMs to shut down, then for the daemon to end",
                goes_on: "the VMs shut down all the same, and the daemon stays unless it was ending: \
                          `banger vm list` shows them, `banger daemon stop` ends it",
            };
            let Some(stopped) = wait.of(stop).await else {
                return cancelled();
            };
            stopped
        } else {
            stop.await
        };
        if !stopped? {
            note("the daemon does not run");
        } else if let Some(message) = alone {
            warn(
                &message,
                &["`banger daemon start` before they fill up, or `banger daemon stop --vms` instead".to_owned()],
            );
        }
        Ok(0)
    })
}

/// What the daemon shows of its VMs; nothing if it does not answer.
async fn running(paths: &Paths) -> Vec<Vm> {
    let (client, all) = (Client::new(paths.socket()), ListVms { trash: false });
    let listed = tokio::time::timeout(ANSWER_LIMIT, client.call::<GetVms>(&[], &all)).await;
    listed.ok().and_then(Result::ok).unwrap_or_default()
}

/// What a person must know who stops the daemon while these VMs run on.
fn left_alone(vms: &[Vm]) -> Option<String> {
    let on_snapshots: Vec<String> = vms
        .iter()
        .filter(|vm| vm.phase.is_live() && vm.spec.storage == Storage::Snapshot)
        .map(|vm| format!("`{}`", vm.name))
        .collect();
    (!on_snapshots.is_empty()).then(|| {
        format!(
            "no daemon runs now that looks after the snapshots of {}: a VM that writes more than its copy-on-write file \
             has free, which may be as little as {} MiB, loses all that it ever wrote",
            on_snapshots.join(", "),
            (COW_STEP / 5) >> 20
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::vm::render::tests::vm;
    use serde_json::json;

    #[test]
    fn who_stops_the_daemon_is_told_which_running_snapshots_nobody_looks_after() {
        let running = || json!({"state": "running", "ready": true, "reachable": true});
        let mut on_snapshot = vm("box", running());
        on_snapshot.spec.storage = Storage::Snapshot;
        let mut stopped = vm(
            "off",
            json!({"state": "stopped", "why": {"reason": "asked"}}),
        );
        stopped.spec.storage = Storage::Snapshot;
        let mut other = vm("other", running());
        other.spec.storage = Storage::Reflink;
        assert_eq!(left_alone(&[stopped.clone(), other.clone()]), None);
        let said = left_alone(&[stopped, other, on_snapshot]).unwrap();
        assert!(
            said.contains("snapshots of `box`: ") && said.contains("102 MiB"),
            "{said}"
        );
    }
}
