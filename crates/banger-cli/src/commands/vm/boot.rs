//! Watches a boot: prints each stage as it is reached, and ends when the VM is ready or cannot become so.

use super::render;
use crate::report::{Failure, note};
use crate::value;
use banger_api::client::Client;
use banger_api::endpoint::GetVmWait;
use banger_api::error::ErrorCode;
use banger_api::vm::{BootTimes, Vm, WaitFor, WaitVm};
use banger_core::phase::Phase;
use std::time::{Duration, Instant};

/// The stages of a boot, in order.
pub(super) fn stages(boot: &BootTimes) -> impl Iterator<Item = (&'static str, Option<u64>)> {
    [
        ("VMM up", boot.vmm_up),
        ("kernel", boot.kernel),
        ("banger-init", boot.banger_init),
        ("agent", boot.agent),
        ("ssh", boot.ssh),
        ("ready", boot.ready),
    ]
    .into_iter()
}

/// Waits until the VM is ready. Waiting changes nothing: if it takes too long, the VM boots on.
///
/// # Errors
/// It took longer than `limit`, or the VM has stopped.
pub(super) async fn watch(
    client: &Client,
    mut vm: Vm,
    limit: Duration,
    say_stages: bool,
) -> Result<Vm, Failure> {
    let deadline = Instant::now() + limit;
    let mut said = BootTimes::default();
    loop {
        if say_stages && let Some(boot) = &vm.boot {
            for line in news(&said, boot) {
                note(&line);
            }
            said = boot.clone();
        }
        match &vm.phase {
            Phase::Running { ready: true, .. } => return Ok(vm),
            Phase::Stopped { .. } => {
                let message = format!(
                    "vm `{}` will not become ready: {}",
                    vm.name,
                    render::line(&vm).trim_end()
                );
                return Err(Failure::new(ErrorCode::StartFailed, message).hint(format!(
                    "`banger vm logs {}` shows its console, `banger vm why {0}` what happened",
                    vm.name
                )));
            }
            Phase::Paused { .. } => {
                return Err(Failure::new(
                    ErrorCode::WrongPhase,
                    format!("vm `{}` is paused", vm.name),
                )
                .hint(format!("`banger vm resume {}`", vm.name)));
            }
            Phase::Starting { .. } | Phase::Running { .. } | Phase::Stopping { .. } => {}
        }
        let request = WaitVm {
            condition: WaitFor::Change,
            timeout_ms: Some(value::milliseconds(
                deadline.saturating_duration_since(Instant::now()),
            )),
            after: Some(vm.revision),
        };
        vm = match client
            .call::<GetVmWait>(&[("vm", &vm.id.to_string())], &request)
            .await
        {
            Ok(vm) => vm,
            Err(error) => {
                let failure = Failure::from(error);
                if failure.0.code != ErrorCode::TimedOut {
                    return Err(failure);
                }
                let message = format!(
                    "vm `{}` was not ready within {} s; it runs on",
                    vm.name,
                    limit.as_secs_f32()
                );
                return Err(Failure::new(ErrorCode::TimedOut, message).hint(format!(
                    "`banger vm wait {}` waits on, `banger vm logs {0}` shows its console",
                    vm.name
                )));
            }
        };
    }
}

/// The stages that were reached since `said`.
fn news(said: &BootTimes, boot: &BootTimes) -> Vec<String> {
    stages(said)
        .zip(stages(boot))
        // A stage's time may still be set right a little; it was told.
        .filter(|((_, before), _)| before.is_none())
        .filter_map(|(_, (stage, ms))| Some(format!("{stage:<12} {:>8}", value::seconds(ms?))))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stage_is_told_once() {
        let early = BootTimes {
            vmm_up: Some(130),
            ..BootTimes::default()
        };
        let later = BootTimes {
            kernel: Some(2_500),
            banger_init: Some(2_600),
            ..early.clone()
        };
        assert_eq!(
            news(&BootTimes::default(), &early),
            ["VMM up         0.13 s"]
        );
        assert_eq!(
            news(&early, &later),
            ["kernel         2.50 s", "banger-init    2.60 s"]
        );
        assert!(news(&later, &later).is_empty());
    }
}
