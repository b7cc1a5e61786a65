//! The actor's part that ends a VM: asked, forced, or because it ended by itself.

use super::actor::{Actor, LOOK_AGAIN, Reply, Run, Stopping, reply_all};
use super::start_plan::reap;
use super::stop_reason::{Intent, or_going_down, reason};
use super::teardown::{Disks, clear_run, end_processes, release_host_objects};
use crate::crash::{Side, point};
use banger_api::error::{ErrorBody, ErrorCode};
use banger_core::decide::{Deny, Request};
use banger_core::phase::{Desired, Phase, StopReason};
use banger_vmm::exit;
use banger_vmm::lock::{LockError, wait_free};
use banger_vmm::protocol::{Exit, Verb};
use jiff::Timestamp;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// How long a VMM may take to follow SIGTERM.
const TERM_GRACE: Duration = Duration::from_secs(3);
/// How long a VMM that said that it ends may take to be gone.
const EXIT_GRACE: Duration = Duration::from_secs(5);

impl Actor {
    /// The shim went away without a word: either all is over, or the VMM runs on without it.
    pub(super) async fn link_closed(&mut self) {
        let Run::Live(live) = &mut self.run else {
            return;
        };
        live.link = None;
        live.commander = None;
        if let Some(shim) = live.shim.take() {
            reap(shim);
        }
        let path = self.files.lock();
        // A shim that has just ended by itself may not be quite gone, and longer so on a busy host.
        let free = tokio::task::spawn_blocking(move || {
            wait_free(&path, Instant::now() + Duration::from_secs(2))
        });
        match free.await {
            Ok(Ok(_)) => self.end(None, Intent::None).await,
            // Only a free lock means dead.
            Ok(Err(_)) | Err(_) => {
                self.note(
                    "recover",
                    "the shim does not answer, but the VM's lock is held",
                    None,
                );
                self.unreachable();
            }
        }
    }

    pub(super) fn unreachable(&mut self) {
        let Run::Live(live) = &mut self.run else {
            return;
        };
        let (sender, receiver) = oneshot::channel();
        live.lock_free = Some(receiver);
        let ready = live.status.as_ref().is_some_and(|status| status.ready);
        let waiters = live.stopping.take();
        let path = self.files.lock();
        let watch = move || {
            while !sender.is_closed() {
                // Short, so that the thread ends soon after nobody waits for it any more.
                match wait_free(&path, Instant::now() + LOOK_AGAIN) {
                    Ok(_) => break,
                    Err(LockError::Held(_)) => {}
                    // What stands in the way has no event of its own.
                    Err(LockError::Io { .. }) => std::thread::sleep(LOOK_AGAIN),
                }
            }
            // The actor may have found out by itself.
            let _ = sender.send(());
        };
        let thread = std::thread::Builder::new().name("lock-wait".to_owned());
        if let Err(error) = thread.spawn(watch) {
            // The host is short of everything; who asks for the VM tries its lock again.
            tracing::warn!(vm = %self.record.id, %error, "nobody waits for the lock");
            live.lock_free = None;
        }
        self.publish(|view| {
            view.phase = Phase::Running {
                ready,
                reachable: false,
            }
        });
        if let Some(Stopping {
            waiters,
            then_start,
            ..
        }) = waiters
        {
            let error = self.denied(Deny::Unreachable, Request::Stop);
            reply_all(waiters.into_iter().chain(then_start).collect(), &Err(error));
        }
    }

    pub(super) async fn stop(
        &mut self,
        timeout: Duration,
        waiters: Vec<Reply>,
        then_start: Vec<Reply>,
    ) {
        point("stop", "desired", Side::Before);
        if then_start.is_empty() && self.going_down.is_none() {
            self.change_anyway(|record| record.desired = Desired::Off)
                .await;
        }
        point("stop", "desired", Side::After);
        let deadline = Timestamp::now()
            .saturating_add(jiff::SignedDuration::try_from(timeout).unwrap_or_default());
        let (Ok(deadline), Some(until)) = (deadline, Instant::now().checked_add(timeout)) else {
            let error = ErrorBody::new(ErrorCode::InvalidRequest, "the time limit is out of range");
            reply_all(waiters.into_iter().chain(then_start).collect(), &Err(error));
            return;
        };
        if let Run::Live(live) = &mut self.run {
            live.stopping = Some(Stopping {
                deadline,
                until,
                waiters,
                then_start,
            });
        }
        self.publish(|view| view.phase = Phase::Stopping { deadline });
        point("stop", "ask", Side::Before);
        match self.command(Verb::Shutdown, Request::Stop).await {
            Ok(()) => self.note("stop", "the guest was asked to shut down", None),
            Err(error) => self.note(
                "stop",
                format!("the guest could not be asked: {}", error.message),
                None,
            ),
        }
        point("stop", "ask", Side::After);
    }

    /// The guest's time is up.
    pub(super) async fn escalate(&mut self) {
        self.note(
            "stop",
            "the guest did not shut down in time: ending the VMM",
            None,
        );
        self.kill(Intent::Stop { forced: true }).await;
    }

    /// Ends all processes of the VM, whatever state they are in.
    pub(super) async fn kill(&mut self, intent: Intent) {
        self.end(None, intent).await;
    }

    /// The VMM has ended, or is to be ended now: cleans up, and says why the VM is stopped.
    pub(super) async fn end(&mut self, exit: Option<Exit>, intent: Intent) {
        let Run::Live(live) = &mut self.run else {
            return;
        };
        let exited = exit.is_some();
        let attempt = live.attempt.attempt.clone();
        let mut shim = live.shim.take();
        let path = self.files.lock();
        let grace = match intent {
            Intent::Kill => Duration::ZERO,
            Intent::Stop { .. } => TERM_GRACE,
            Intent::None => EXIT_GRACE,
        };
        point("stop", "end-processes", Side::Before);
        let begun = Instant::now();
        let freed = tokio::task::spawn_blocking(move || {
            let freed = if exited {
                match wait_free(&path, Instant::now() + grace) {
                    Err(LockError::Held(_)) => end_processes(&path, Duration::ZERO),
                    outcome => outcome,
                }
            } else {
                end_processes(&path, grace)
            };
            if let (Some(shim), Ok(_)) = (&mut shim, &freed) {
                // It is dead or dying: its lock is free.
                let _ = shim.wait();
            }
            (freed, shim)
        })
        .await;
        point("stop", "end-processes", Side::After);
        // Held until all is cleaned up; only then may the next start begin.
        let lock = match freed {
            Ok((Ok(lock), _)) => Some(lock),
            // Its folder was removed while it ran, and its shim has said that it ended: there is nothing to lock.
            Ok((Err(LockError::Io { .. }), _)) if exited && !self.files.folder.exists() => None,
            Ok((Err(error), shim)) => {
                let why = banger_host::error_chain(&error);
                self.note(
                    "stop",
                    format!("a process of the VM does not die: {why}"),
                    Some(begun.elapsed()),
                );
                if let Run::Live(live) = &mut self.run {
                    live.shim = shim;
                }
                self.unreachable();
                return;
            }
            Err(error) => {
                tracing::error!(vm = %self.record.id, %error, "ending the VM's processes panicked");
                self.unreachable();
                return;
            }
        };
        let Run::Live(live) = std::mem::replace(&mut self.run, Run::Idle) else {
            return;
        };
        let exit = exit.or_else(|| {
            exit::read(&self.files.exit())
                .ok()
                .flatten()
                .filter(|exit| exit.attempt == attempt)
        });
        let asked = live.stopping.is_some();
        let (waiters, then_start) = match live.stopping {
            Some(stopping) => (stopping.waiters, stopping.then_start),
            None => (Vec::new(), Vec::new()),
        };
        let intent = match intent {
            Intent::None if asked => Intent::Stop { forced: false },
            other => other,
        };
        let why = or_going_down(reason(intent, exit.as_ref()), self.going_down);
        self.release_host_objects("stop", Disks::Written).await;
        let off = match &why {
            StopReason::Asked | StopReason::AskedThenForced | StopReason::Killed => {
                then_start.is_empty()
            }
            StopReason::GuestPoweroff => true,
            StopReason::NeverStarted
            | StopReason::GuestReboot
            | StopReason::GuestPanic
            | StopReason::StartFailed { .. }
            | StopReason::StartCancelled
            | StopReason::VmmDied { .. }
            | StopReason::HostRebooted
            | StopReason::UserLoggedOut
            | StopReason::HostShutDown
            | StopReason::Unknown => false,
        };
        self.record_stopped(why, off, Some(attempt)).await;
        // Last: until the reason is recorded, it is what a crash would leave to tell it.
        self.clear_run("stop").await;
        drop(lock);
        reply_all(waiters, &Ok(self.view.borrow().clone()));
        if !then_start.is_empty() {
            self.start(then_start).await;
        }
    }

    pub(super) async fn release_host_objects(&mut self, verb: &'static str, disks: Disks) {
        for problem in release_host_objects(&self.world, &self.record, verb, disks).await {
            self.note(verb, problem.to_string(), None);
        }
    }

    pub(super) async fn clear_run(&mut self, verb: &'static str) {
        clear_run(&self.world, self.record.id, verb).await;
    }

    /// Records that the VM is stopped, and why; `attempt` is the run that ended.
    pub(super) async fn record_stopped(
        &mut self,
        why: StopReason,
        off: bool,
        attempt: Option<String>,
    ) {
        let boot = self.view.borrow().boot.clone();
        let ran = attempt.is_some();
        point("stop", "record", Side::Before);
        self.change_anyway(|record| {
            record.last_stop = why.clone();
            record.last_attempt = attempt.clone().or(record.last_attempt.take());
            record.started_once |= ran;
            record.boot = boot.clone().or(record.boot.take());
            if off {
                record.desired = Desired::Off;
            }
        })
        .await;
        point("stop", "record", Side::After);
        self.going_down = None;
        self.note("stop", format!("stopped: {why}"), None);
        self.publish(|view| {
            view.phase = Phase::Stopped { why };
            view.attempt = None;
        });
    }
}
