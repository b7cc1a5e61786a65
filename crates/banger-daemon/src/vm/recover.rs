//! The actor's part that finds out what an earlier daemon left of a VM.

use super::actor::{Actor, Live, Run};
use super::link::Link;
use super::stop_reason::{Intent, reason};
use super::teardown::Disks;
use super::{Ask, AttemptFile};
use banger_core::decide::{Action, Decision, Request, Standing, decide};
use banger_core::phase::{Desired, StopReason};
use banger_vmm::exit;
use banger_vmm::lock::{LockError, try_lock};
use banger_vmm::protocol::{Status, Verb};

impl Actor {
    /// Looks at what an earlier daemon left of this VM: adopts what lives, cleans up after what does not.
    pub(super) async fn recover(&mut self) {
        let path = self.files.lock();
        let attempt = self.left_attempt();
        if !path.exists() && attempt.is_none() && !self.files.run().exists() {
            // Its folder may have been taken away while it ran; what it had on the host goes all the same.
            return self.recover_dead(None).await;
        }
        let tried = tokio::task::spawn_blocking(move || try_lock(&path)).await;
        match tried {
            Ok(Ok(lock)) => {
                self.recover_dead(attempt).await;
                drop(lock);
            }
            Ok(Err(error)) => self.recover_live(attempt, &error).await,
            Err(error) => tracing::error!(vm = %self.record.id, %error, "trying the lock panicked"),
        }
    }

    /// The attempt that an earlier daemon left. A file that cannot be read, which a power cut may leave, stands for one
    /// that nobody knows: the VM may have run. Without the file nothing was started, or all was recorded.
    pub(super) fn left_attempt(&self) -> Option<AttemptFile> {
        let path = self.files.attempt();
        let read = std::fs::read(&path)
            .and_then(|bytes| serde_json::from_slice(&bytes).map_err(std::io::Error::from));
        match read {
            Ok(attempt) => Some(attempt),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => {
                let text = format!("`{}` cannot be read: {error}", path.display());
                self.note("recover", text, None);
                Some(AttemptFile::unknown(&self.world, &self.record))
            }
        }
    }

    /// Only a free lock means dead: whatever else came of trying it, the VM is taken to live.
    pub(super) async fn recover_live(&mut self, attempt: Option<AttemptFile>, held: &LockError) {
        let attempt = attempt.unwrap_or_else(|| AttemptFile::unknown(&self.world, &self.record));
        match Link::connect(&self.files.shim_socket()).await {
            Ok((link, status)) => self.take_over(attempt, link, status).await,
            Err(error) => {
                let why = banger_host::error_chain(held);
                self.note(
                    "recover",
                    format!("{why}, but its shim does not answer: {error}"),
                    None,
                );
                self.run = Run::Live(Box::new(Live::unreachable(attempt)));
                self.unreachable();
                self.take_network_over(None).await;
            }
        }
    }

    pub(super) async fn take_over(&mut self, attempt: AttemptFile, link: Link, status: Status) {
        let shim = status.shim_pid;
        self.note("recover", "found running and taken over", None);
        self.adopt(attempt, link, status, None);
        if !self.record.started_once {
            self.change_anyway(|record| record.started_once = true)
                .await;
        }
        self.take_network_over(Some(shim)).await;
        self.settle_cpu_limit().await;
        if self.record.desired == Desired::Off {
            self.stop_after_all().await;
        }
    }

    /// Asks a VM again that was to stop, if the decision table lets a person do so now. One that waits for room on
    /// the disk is asked when it goes on.
    async fn stop_after_all(&mut self) {
        self.note("recover", "it was to stop: asking again", None);
        let phase = self.view.borrow().phase.clone();
        match decide(Standing::Present(&phase), Request::Stop) {
            Decision::Run(action) => {
                if action == Action::ResumeThenStop
                    && let Err(error) = self.command(Verb::Resume, Request::Stop).await
                {
                    self.note("recover", error.message, None);
                    return;
                }
                self.stop(Ask::STOP_TIMEOUT, Vec::new(), Vec::new()).await;
            }
            Decision::Deny(deny) => {
                let refused = self.denied(deny, Request::Stop);
                self.note("recover", refused.message, None);
            }
            Decision::Join | Decision::AlreadyThere => {}
        }
    }

    /// Its guest lives on the network. Also puts right what was changed by hand, or by an earlier daemon just before it
    /// ended.
    async fn take_network_over(&mut self, shim: Option<i32>) {
        let plan = self.record.port_plan();
        if let Err(error) = self.world.network.take_over(plan, shim).await {
            let why = banger_host::error_chain(&error);
            self.note("network", why, None);
        }
    }

    /// An unreachable VM's shim may answer after all.
    pub(super) async fn look_again(&mut self) {
        let Run::Live(live) = &self.run else { return };
        let attempt = live.attempt.clone();
        if let Ok((link, status)) = Link::connect(&self.files.shim_socket()).await {
            self.take_over(attempt, link, status).await;
        }
    }

    pub(super) async fn recover_dead(&mut self, attempt: Option<AttemptFile>) {
        let known = attempt.as_ref().is_none_or(|attempt| {
            attempt.is_known() && self.record.last_attempt.as_ref() == Some(&attempt.attempt)
        });
        if let (Some(attempt), false) = (attempt, known) {
            let exit = exit::read(&self.files.exit())
                .ok()
                .flatten()
                .filter(|exit| exit.attempt == attempt.attempt);
            let intent = match self.record.desired {
                Desired::Off => Intent::Stop { forced: false },
                Desired::On => Intent::None,
            };
            let why = match &exit {
                Some(_) => reason(intent, exit.as_ref()),
                None if attempt.boot_id != self.world.boot_id => StopReason::HostRebooted,
                None => StopReason::Unknown,
            };
            self.release_host_objects("recover", Disks::Written).await;
            let off = why == StopReason::GuestPoweroff;
            self.note("recover", format!("found stopped: {why}"), None);
            self.record_stopped(why, off, Some(attempt.attempt)).await;
        } else {
            self.release_host_objects("recover", Disks::Unwritten).await;
        }
        self.clear_run("recover").await;
    }
}
