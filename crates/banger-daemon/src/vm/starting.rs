//! The actor's part that starts a VM and takes a running one over.

use super::AttemptFile;
use super::actor::{Actor, Live, Reply, Run, Starting, reply_all};
use super::deleting::Removal;
use super::link::Link;
use super::start_plan::{StartError, StartPlan, Started, start_cancelled};
use super::stop_reason::{Intent, or_going_down};
use super::teardown::{Problem, unwind};
use crate::convert;
use banger_api::error::ErrorCode;
use banger_api::vm::BootTimes;
use banger_core::phase::{Desired, PausedBy, Phase, StartStep, StopReason};
use banger_vmm::lock::LockError;
use banger_vmm::protocol::Status;
use banger_vmm::sandbox::Applied;
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

impl Actor {
    pub(super) async fn start(&mut self, starters: Vec<Reply>) {
        let asked_at = Instant::now();
        if self.world.draining.load(Ordering::Relaxed) {
            // Also the second half of a restart.
            reply_all(starters, &Err(convert::going_down()));
            return;
        }
        if self.record.reset_pending
            && let Err(error) = self.finish_promised_reset().await
        {
            let why = format!(
                "cannot finish the reset that was started earlier: {}",
                error.message
            );
            self.note("start", why, None);
            if error.code == ErrorCode::Unreachable {
                self.locked_by_another().await;
            }
            reply_all(starters, &Err(error));
            return;
        }
        let before = Arc::clone(&self.record);
        let desired_is_new = self.record.desired == Desired::Off;
        if desired_is_new {
            let mut record = (*self.record).clone();
            record.desired = Desired::On;
            record.record_version += 1;
            self.record = Arc::new(record);
        }
        self.note("start", "asked", None);
        let (steps, receiver) = watch::channel(StartStep::TakeLock);
        let cancel = CancellationToken::new();
        let plan = StartPlan {
            world: Arc::clone(&self.world),
            record: Arc::clone(&self.record),
            desired_is_new,
            asked_at,
            steps,
            cancel: cancel.clone(),
        };
        self.run = Run::Starting(Box::new(Starting {
            plan: Box::pin(plan.run()),
            cancel,
            steps: receiver,
            starters,
            before,
            cancellers: Vec::new(),
            changes: Vec::new(),
            then: None,
        }));
        self.publish(|view| {
            view.phase = Phase::Starting {
                step: StartStep::TakeLock,
            };
            view.boot = None;
        });
    }

    pub(super) fn cancel_start(&mut self, reply: Reply, then: Option<Removal>) {
        match &mut self.run {
            Run::Starting(starting) => {
                starting.cancel.cancel();
                starting.cancellers.push(reply);
                starting.then = starting.then.max(then);
            }
            Run::Idle | Run::Live(_) => self.answer(reply),
        }
    }

    pub(super) async fn started(&mut self, outcome: Result<Started, StartError>) {
        let Run::Starting(starting) = std::mem::replace(&mut self.run, Run::Idle) else {
            return;
        };
        let Starting {
            starters,
            before,
            cancellers,
            cancel,
            changes,
            then,
            ..
        } = *starting;
        let going_down = self.going_down;
        match outcome {
            Ok(started) => {
                self.note(
                    "start",
                    format!("running: {}", started.attempt.reason),
                    None,
                );
                for Applied { layer, missing } in &started.status.sandbox {
                    if let Some(why) = missing {
                        let layer = layer.name();
                        self.note(
                            "start",
                            format!("the sandbox lacks its layer `{layer}`: {why}"),
                            None,
                        );
                    }
                }
                self.adopt(
                    started.attempt,
                    started.link,
                    started.status,
                    Some(started.shim),
                );
                if cancel.is_cancelled() {
                    self.kill(Intent::Kill).await;
                    reply_all(starters, &Err(start_cancelled(&self.record.name)));
                } else {
                    reply_all(starters, &Ok(self.view.borrow().clone()));
                    if !self.record.started_once {
                        self.change_anyway(|record| record.started_once = true)
                            .await;
                    }
                }
            }
            Err(StartError {
                step: StartStep::TakeLock,
                error,
                cancelled: false,
            }) if error.code == ErrorCode::Unreachable => {
                // Whoever holds the lock is not of this start, and nothing of it was made.
                self.record = before;
                self.locked_by_another().await;
                reply_all(starters, &Err(error));
            }
            Err(StartError {
                step,
                error,
                cancelled,
            }) => {
                // Nobody was told that it is to run.
                let unstored = !cancelled && step == StartStep::StoreDesired;
                let unwound = unwind(&self.world, &self.record).await;
                let why = if cancelled {
                    or_going_down(StopReason::StartCancelled, going_down)
                } else {
                    let causes = error.causes.iter().map(|cause| format!(": {cause}"));
                    let text = std::iter::once(error.message.clone())
                        .chain(causes)
                        .collect();
                    StopReason::StartFailed { step, error: text }
                };
                let mut error = error;
                match unwound {
                    Ok(problems) => {
                        error.causes.extend(problems.iter().map(Problem::to_string));
                        let off = cancelled && going_down.is_none();
                        self.record_stopped(why, off || unstored, None).await;
                        self.clear_run("unwind").await;
                    }
                    Err(alive) => {
                        error.causes.push(banger_host::error_chain(&alive));
                        self.note(
                            "start",
                            format!("failed: {why}, and a process of it is alive"),
                            None,
                        );
                        self.run = Run::Live(Box::new(Live::unreachable(AttemptFile::unknown(
                            &self.world,
                            &self.record,
                        ))));
                        self.unreachable();
                    }
                }
                if error.code == ErrorCode::Internal {
                    error.code = ErrorCode::StartFailed;
                }
                if error.hints.is_empty() {
                    error.hints.push(format!(
                        "`banger vm why {}` tells the steps",
                        self.record.name
                    ));
                }
                reply_all(starters, &Err(error));
            }
        }
        for (ask, reply) in changes {
            self.set(&ask, reply).await;
        }
        if !cancellers.is_empty() {
            if going_down.is_none() {
                self.change_anyway(|record| record.desired = Desired::Off)
                    .await;
            }
            let done = match (&self.run, then) {
                (Run::Idle, Some(removal)) => self.remove(removal).await,
                (Run::Idle, None) => Ok(()),
                (Run::Starting(_) | Run::Live(_), _) => Err(self.still_alive_error()),
            };
            self.publish(|_| {});
            reply_all(cancellers, &done.map(|()| self.view.borrow().clone()));
        }
    }

    /// The lock of a VM that was thought to be stopped is held: by a VMM that was not known of, which is taken over, or
    /// by somebody who only has its files open.
    async fn locked_by_another(&mut self) {
        if self.files.run().exists() {
            let held = LockError::Held(self.files.lock());
            let attempt = self.left_attempt();
            self.recover_live(attempt, &held).await;
        } else {
            let why = self.record.last_stop.clone();
            self.note(
                "start",
                "its lock is held by a process that is no VMM",
                None,
            );
            self.publish(|view| view.phase = Phase::Stopped { why });
        }
    }

    /// Takes a running VMM over.
    pub(super) fn adopt(
        &mut self,
        attempt: AttemptFile,
        link: Link,
        status: Status,
        shim: Option<Child>,
    ) {
        let commander = link.commander();
        self.run = Run::Live(Box::new(Live {
            attempt,
            link: Some(link),
            commander: Some(commander),
            shim,
            status: None,
            stopping: None,
            lock_free: None,
        }));
        self.apply_status(status);
    }

    /// Derives phase, attempt and boot times from what the shim says.
    pub(super) fn apply_status(&mut self, status: Status) {
        let Run::Live(live) = &mut self.run else {
            return;
        };
        let mut attempt = live.attempt.to_api();
        attempt.vmm_pid = Some(status.vmm_pid);
        attempt.shim_pid = Some(status.shim_pid);
        for Applied { layer, missing } in &status.sandbox {
            match missing {
                None => attempt.sandbox.push(layer.name().to_owned()),
                Some(why) => attempt
                    .sandbox_missing
                    .push(format!("{}: {why}", layer.name())),
            }
        }
        let since_asked = |stage: Option<u64>| stage.map(|ms| ms + live.attempt.lead_ms);
        let boot = BootTimes {
            vmm_up: since_asked(status.boot.vmm_up),
            kernel: since_asked(status.boot.kernel),
            banger_init: since_asked(status.boot.banger_init),
            agent: since_asked(status.boot.agent),
            ssh: since_asked(status.boot.ssh),
            ready: since_asked(status.boot.ready),
        };
        let phase = match (&live.stopping, status.paused) {
            (Some(stopping), _) => Phase::Stopping {
                deadline: stopping.deadline,
            },
            (None, true) if status.disk_full => Phase::Paused {
                by: PausedBy::FullDisk,
            },
            (None, true) => Phase::Paused {
                by: PausedBy::Person,
            },
            (None, false) => Phase::Running {
                ready: status.ready,
                reachable: true,
            },
        };
        let became_ready =
            status.ready && !live.status.as_ref().is_some_and(|earlier| earlier.ready);
        live.status = Some(status);
        self.publish(|view| {
            view.phase = phase;
            view.attempt = Some(attempt);
            view.boot = Some(boot.clone());
        });
        if became_ready {
            self.note(
                "guest",
                format!("ready after {} ms", boot.ready.unwrap_or_default()),
                None,
            );
        }
    }
}
