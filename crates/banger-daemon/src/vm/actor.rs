//! The actor of one VM: the only one that changes its phase.

use super::deleting::Removal;
use super::files::VmFiles;
use super::link::{Commander, Link, LinkEvent};
use super::start_plan::{StartError, Started};
use super::stop_reason::Intent;
use super::{Answer, Ask, AttemptFile, Handle, INBOX, Message, View};
use crate::blocking::blocking;
use crate::convert;
use crate::images::store_error;
use crate::record::VmRecord;
use crate::storage::watermark;
use crate::world::World;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::event::EventKind;
use banger_api::vm::JournalEntry;
use banger_core::decide::{Action, Decision, Deny, Request, Standing, decide};
use banger_core::id::VmId;
use banger_core::phase::{Desired, GoingDown, PausedBy, Phase, StartStep};
use banger_vmm::protocol::{Status, Verb};
use jiff::Timestamp;
use std::pin::Pin;
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// How often an unreachable VM is looked at again.
pub(super) const LOOK_AGAIN: Duration = Duration::from_secs(2);

pub(super) type Reply = oneshot::Sender<Answer>;

/// Adds a line to a VM's story.
pub(crate) fn note(
    world: &World,
    vm: VmId,
    subject: &str,
    message: String,
    took: Option<Duration>,
) {
    let took_us = took.map(|took| u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
    let entry = JournalEntry {
        at: Timestamp::now(),
        subject: subject.to_owned(),
        message,
        took_us,
    };
    world.store.note(vm, entry);
}

/// What the VM is doing, with what is only there while it does it.
pub(super) enum Run {
    Idle,
    Starting(Box<Starting>),
    Live(Box<Live>),
}

pub(super) struct Starting {
    pub(super) plan: Pin<Box<dyn Future<Output = Result<Started, StartError>> + Send>>,
    pub(super) cancel: CancellationToken,
    pub(super) steps: watch::Receiver<StartStep>,
    pub(super) starters: Vec<Reply>,
    /// What was recorded before the start.
    pub(super) before: Arc<VmRecord>,
    pub(super) cancellers: Vec<Reply>,
    /// Changes that are made when the start has ended.
    pub(super) changes: Vec<(Ask, Reply)>,
    /// The VM is deleted afterwards.
    pub(super) then: Option<Removal>,
}

pub(super) struct Live {
    pub(super) attempt: AttemptFile,
    pub(super) link: Option<Link>,
    pub(super) commander: Option<Commander>,
    pub(super) shim: Option<Child>,
    pub(super) status: Option<Status>,
    pub(super) stopping: Option<Stopping>,
    /// Resolves when the lock of an unreachable VM is free.
    pub(super) lock_free: Option<oneshot::Receiver<()>>,
}

impl Live {
    /// A VM whose lock is held while its shim does not answer.
    pub(super) fn unreachable(attempt: AttemptFile) -> Self {
        Self {
            attempt,
            link: None,
            commander: None,
            shim: None,
            status: None,
            stopping: None,
            lock_free: None,
        }
    }
}

pub(super) struct Stopping {
    /// As it is shown.
    pub(super) deadline: Timestamp,
    /// As it is waited for: neither a clock that is set nor a suspended host brings it nearer.
    pub(super) until: Instant,
    pub(super) waiters: Vec<Reply>,
    pub(super) then_start: Vec<Reply>,
}

impl Run {
    /// The stop that is under way.
    pub(super) fn stopping(&mut self) -> Option<&mut Stopping> {
        match self {
            Self::Live(live) => live.stopping.as_mut(),
            Self::Idle | Self::Starting(_) => None,
        }
    }
}

pub(super) enum Incoming {
    Message(Message),
    Closed,
    Step(StartStep),
    Started(Result<Started, StartError>),
    Link(LinkEvent),
    Deadline,
    LockFree,
    /// Time to see whether an unreachable VM's shim answers.
    LookAgain,
}

async fn next(run: &mut Run, inbox: &mut mpsc::Receiver<Message>) -> Incoming {
    let message = async {
        inbox
            .recv()
            .await
            .map_or(Incoming::Closed, Incoming::Message)
    };
    match run {
        Run::Idle => message.await,
        Run::Starting(starting) => tokio::select! {
            biased;
            outcome = &mut starting.plan => Incoming::Started(outcome),
            Ok(()) = starting.steps.changed() => Incoming::Step(*starting.steps.borrow_and_update()),
            incoming = message => incoming,
        },
        Run::Live(live) => tokio::select! {
            event = next_event(&mut live.link) => Incoming::Link(event),
            () = until(live.stopping.as_ref().map(|stopping| stopping.until)) => Incoming::Deadline,
            () = freed(&mut live.lock_free) => Incoming::LockFree,
            () = tokio::time::sleep(LOOK_AGAIN), if live.link.is_none() => Incoming::LookAgain,
            incoming = message => incoming,
        },
    }
}

async fn next_event(link: &mut Option<Link>) -> LinkEvent {
    match link {
        Some(link) => link.events.recv().await.unwrap_or(LinkEvent::Closed),
        None => std::future::pending().await,
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

async fn freed(lock: &mut Option<oneshot::Receiver<()>>) {
    match lock {
        Some(receiver) => drop(receiver.await),
        None => std::future::pending().await,
    }
}

/// How a VM is found when its actor begins.
pub(crate) enum Found {
    /// It was just created, or its lock is free and its host objects are gone.
    Stopped,
    /// Its lock is held, or something of an earlier run may be left: look.
    Unknown,
}

/// Starts the actor of a VM; `ended` is called when it ends, which it does when the VM is purged.
///
/// The receiver resolves once the actor has looked at what an earlier daemon left.
pub(crate) fn spawn(
    world: Arc<World>,
    record: VmRecord,
    found: Found,
    ended: impl FnOnce() + Send + 'static,
) -> (Handle, oneshot::Receiver<()>) {
    let id = record.id;
    let record = Arc::new(record);
    let phase = Phase::Stopped {
        why: record.last_stop.clone(),
    };
    let boot = record.boot.clone();
    // Grows over restarts of the daemon, too.
    let revision = u64::try_from(Timestamp::now().as_millisecond()).unwrap_or_default();
    let (view, receiver) = watch::channel(View {
        record: Arc::clone(&record),
        phase,
        revision,
        attempt: None,
        boot,
        purged: false,
    });
    let (sender, inbox) = mpsc::channel(INBOX);
    world.names.follow(&record, false);
    let actor = Actor {
        files: VmFiles::of(&world.paths, id),
        world,
        record,
        run: Run::Idle,
        view,
        going_down: None,
    };
    let (looked, recovered) = oneshot::channel();
    tokio::spawn(async move {
        actor.live(inbox, found, looked).await;
        ended();
    });
    let handle = Handle {
        id,
        inbox: sender,
        view: receiver,
    };
    (handle, recovered)
}

pub(super) struct Actor {
    pub(super) world: Arc<World>,
    pub(super) files: VmFiles,
    pub(super) record: Arc<VmRecord>,
    pub(super) run: Run,
    pub(super) view: watch::Sender<View>,
    /// What the stop that is under way is for, if not for a person: the VM is still to run.
    pub(super) going_down: Option<GoingDown>,
}

impl Actor {
    async fn live(
        mut self,
        mut inbox: mpsc::Receiver<Message>,
        found: Found,
        looked: oneshot::Sender<()>,
    ) {
        // What is done is boxed here and below: its state is as large as all that a VM may be asked, and would else be
        // kept for every VM that does nothing.
        match found {
            Found::Stopped => {}
            Found::Unknown => Box::pin(self.recover()).await,
        }
        // Nobody may be waiting for it.
        let _ = looked.send(());
        if self.record.purging {
            // An earlier daemon began it and its promise stands.
            if let Err(error) = Box::pin(self.purge()).await {
                tracing::warn!(vm = %self.record.id, error = %error.message, "a purge did not go on");
            }
        }
        while !self.view.borrow().purged {
            match next(&mut self.run, &mut inbox).await {
                Incoming::Message(message) => Box::pin(self.request(message)).await,
                Incoming::Step(step) => self.publish(|view| view.phase = Phase::Starting { step }),
                Incoming::Started(outcome) => Box::pin(self.started(outcome)).await,
                Incoming::Link(event) => Box::pin(self.link_event(event)).await,
                Incoming::Deadline => Box::pin(self.escalate()).await,
                Incoming::LockFree => Box::pin(self.end(None, Intent::None)).await,
                Incoming::LookAgain => Box::pin(self.look_again()).await,
                Incoming::Closed => return,
            }
        }
    }

    pub(super) fn note(&self, subject: &str, message: impl Into<String>, took: Option<Duration>) {
        note(&self.world, self.record.id, subject, message.into(), took);
    }

    pub(super) fn publish(&self, change: impl FnOnce(&mut View)) {
        self.view.send_modify(|view| {
            change(view);
            view.record = Arc::clone(&self.record);
            view.revision += 1;
        });
        let view = self.view.borrow().clone();
        self.world.names.follow(&view.record, view.purged);
        let kind = if view.purged {
            EventKind::VmPurged { id: self.record.id }
        } else {
            EventKind::VmChanged {
                vm: Box::new(convert::vm(&self.world, &view)),
            }
        };
        self.world.hub.publish(kind);
    }

    /// Changes the record: the row, durable when this returns, then its mirror.
    pub(super) async fn change(
        &mut self,
        change: impl FnOnce(&mut VmRecord),
    ) -> Result<(), ErrorBody> {
        let mut record = (*self.record).clone();
        change(&mut record);
        record.record_version += 1;
        let stored = self
            .world
            .store
            .update_vm(record.clone())
            .await
            .map_err(|error| store_error(&error));
        if stored.is_ok() {
            self.record = Arc::new(record);
            self.mirror();
        }
        stored
    }

    fn mirror(&self) {
        if let Err(error) = self.record.mirror(&self.files.folder, None) {
            tracing::warn!(vm = %self.record.id, %error, "vm.json was not written");
        }
    }

    /// As [`Actor::change`], for what happens whether or not it can be written down.
    pub(super) async fn change_anyway(&mut self, change: impl Fn(&mut VmRecord)) {
        if let Err(error) = self.change(&change).await {
            tracing::error!(vm = %self.record.id, error = %error.message, "a change was not stored");
            self.note(
                "store",
                format!("a change was not stored: {}", error.message),
                None,
            );
            let mut record = (*self.record).clone();
            change(&mut record);
            self.record = Arc::new(record);
        }
    }

    async fn request(&mut self, message: Message) {
        let Message { ask, reply } = message;
        let phase = self.view.borrow().phase.clone();
        let trashed = self.record.trashed_at.is_some();
        let standing = if trashed {
            Standing::Trashed
        } else {
            Standing::Present(&phase)
        };
        tracing::debug!(vm = %self.record.id, request = ask.request.verb(), phase = phase.name(), "request");
        if let Some(until) = ask.trashed_until
            && self.record.trashed_at.is_none_or(|at| at > until)
        {
            // It was in the trash when the asker looked.
            let name = &self.record.name;
            let message = format!("`{name}` came back from the trash");
            let error = ErrorBody::new(ErrorCode::WrongPhase, message).hint(format!(
                "`banger vm delete --purge {name}` removes it all the same"
            ));
            answer_to(reply, Err(error));
            return;
        }
        if matches!(ask.request, Request::Stop | Request::Kill) && !self.is_stopping_for_good() {
            self.going_down = ask.going_down;
        }
        match decide(standing, ask.request) {
            Decision::AlreadyThere => {
                if matches!(ask.request, Request::Stop | Request::Kill)
                    && ask.going_down.is_none()
                    && self.record.desired == Desired::On
                    && !trashed
                {
                    self.change_anyway(|record| record.desired = Desired::Off)
                        .await;
                    self.publish(|_| {});
                }
                self.answer(reply);
            }
            Decision::Deny(deny) => answer_to(reply, Err(self.denied(deny, ask.request))),
            Decision::Join => {
                if let Run::Starting(starting) = &mut self.run {
                    starting.starters.push(reply);
                } else if self.run.stopping().is_some() {
                    // The latest request is that it stops and stays so.
                    self.forget_restart().await;
                    if let Some(stopping) = self.run.stopping() {
                        stopping.waiters.push(reply);
                    }
                } else {
                    self.answer(reply);
                }
            }
            Decision::Run(action) => self.act(action, ask, reply).await,
        }
    }

    /// Whether a person has asked for the stop that is under way.
    fn is_stopping_for_good(&mut self) -> bool {
        let going_down = self.going_down.is_some();
        self.run
            .stopping()
            .is_some_and(|stopping| stopping.then_start.is_empty() && !going_down)
    }

    pub(super) fn answer(&self, reply: Reply) {
        answer_to(reply, Ok(self.view.borrow().clone()));
    }

    async fn act(&mut self, action: Action, ask: Ask, reply: Reply) {
        match action {
            Action::Start => self.start(vec![reply]).await,
            Action::Stop => self.stop(ask.timeout, vec![reply], Vec::new()).await,
            Action::StopThenStart => self.stop(ask.timeout, Vec::new(), vec![reply]).await,
            Action::ResumeThenStop => match self.command(Verb::Resume, ask.request).await {
                Ok(()) => self.stop(ask.timeout, vec![reply], Vec::new()).await,
                Err(error) => answer_to(reply, Err(error)),
            },
            Action::ResumeThenStopThenStart => {
                match self.command(Verb::Resume, ask.request).await {
                    Ok(()) => self.stop(ask.timeout, Vec::new(), vec![reply]).await,
                    Err(error) => answer_to(reply, Err(error)),
                }
            }
            Action::ThenStart => match self.run.stopping() {
                Some(stopping) => stopping.then_start.push(reply),
                None => self.answer(reply),
            },
            Action::CancelStart => self.cancel_start(reply, None),
            Action::Kill => {
                self.kill(Intent::Kill).await;
                let answer = match self.run {
                    Run::Live(_) => Err(self.still_alive_error()),
                    Run::Idle | Run::Starting(_) => Ok(self.view.borrow().clone()),
                };
                answer_to(reply, answer);
            }
            Action::Escalate => {
                self.forget_restart().await;
                if let Some(stopping) = self.run.stopping() {
                    stopping.waiters.push(reply);
                }
                self.kill(Intent::Kill).await;
            }
            Action::Pause => {
                let (verb, by) = if ask.for_room {
                    (Verb::PauseForRoom, PausedBy::FullDisk)
                } else {
                    (Verb::Pause, PausedBy::Person)
                };
                let done = self.command(verb, ask.request).await;
                self.publish_phase(done, Phase::Paused { by }, reply);
            }
            Action::Resume => {
                let by_full_disk = watermark::is_paused_for_room(&self.view.borrow().phase);
                if ask.for_room && !by_full_disk {
                    // A person paused it meanwhile.
                    return self.answer(reply);
                }
                if by_full_disk && !ask.for_room {
                    let (world, record) = (Arc::clone(&self.world), Arc::clone(&self.record));
                    let room = blocking(move || watermark::has_room(&world, &record)).await;
                    if let Err(error) = room.flatten() {
                        return answer_to(reply, Err(error));
                    }
                }
                let done = self.command(Verb::Resume, ask.request).await;
                let goes_on = done.is_ok();
                let ready = self.is_ready();
                self.publish_phase(
                    done,
                    Phase::Running {
                        ready,
                        reachable: true,
                    },
                    reply,
                );
                if goes_on && self.record.desired == Desired::Off {
                    self.note("stop", "it was to stop: asking again", None);
                    self.stop(Ask::STOP_TIMEOUT, Vec::new(), Vec::new()).await;
                }
            }
            Action::Set => self.set(&ask, reply).await,
            Action::SetAfterStart => match &mut self.run {
                Run::Starting(starting) => starting.changes.push((ask, reply)),
                Run::Idle | Run::Live(_) => self.set(&ask, reply).await,
            },
            Action::Reset => {
                let answer = self.reset(ask.storage, None).await;
                answer_to(reply, answer.map(|()| self.view.borrow().clone()));
            }
            Action::Undelete => {
                let answer = self.undelete(ask.name).await;
                answer_to(reply, answer.map(|()| self.view.borrow().clone()));
            }
            Action::Trash => self.delete(Removal::Trash, reply).await,
            Action::Purge => self.delete(Removal::Purge, reply).await,
            Action::KillThenTrash => self.kill_then_delete(Removal::Trash, reply).await,
            Action::KillThenPurge => self.kill_then_delete(Removal::Purge, reply).await,
        }
    }

    async fn delete(&mut self, removal: Removal, reply: Reply) {
        let answer = self.remove(removal).await;
        answer_to(reply, answer.map(|()| self.view.borrow().clone()));
    }

    async fn kill_then_delete(&mut self, removal: Removal, reply: Reply) {
        if let Run::Starting(_) = &self.run {
            self.cancel_start(reply, Some(removal));
            return;
        }
        self.forget_restart().await;
        self.kill(Intent::Kill).await;
        match self.run {
            Run::Idle => self.delete(removal, reply).await,
            Run::Starting(_) | Run::Live(_) => answer_to(reply, Err(self.still_alive_error())),
        }
    }

    fn publish_phase(&self, done: Result<(), ErrorBody>, phase: Phase, reply: Reply) {
        match done {
            Ok(()) => {
                self.note("phase", phase.name(), None);
                self.publish(|view| view.phase = phase);
                self.answer(reply);
            }
            Err(error) => answer_to(reply, Err(error)),
        }
    }

    fn is_ready(&self) -> bool {
        matches!(&self.run, Run::Live(live) if live.status.as_ref().is_some_and(|status| status.ready))
    }

    /// Sends a verb to the shim, for the sake of `request`, and waits for its answer.
    pub(super) async fn command(&mut self, verb: Verb, request: Request) -> Result<(), ErrorBody> {
        let commander = match &self.run {
            Run::Live(live) => live.commander.clone(),
            Run::Idle | Run::Starting(_) => None,
        };
        let name = &self.record.name;
        let Some(commander) = commander else {
            return Err(self.denied(Deny::Unreachable, request));
        };
        commander.send(verb).await.map_err(|why| {
            let message = format!(
                "cannot {} VM `{name}`: its VMM did not obey",
                request.verb()
            );
            let mut error = ErrorBody::new(ErrorCode::Internal, message);
            error.causes.push(why);
            error
        })
    }

    async fn link_event(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Status(status) => self.apply_status(status),
            LinkEvent::GuestWarning(text) => {
                self.note("guest", format!("warns: {}", text.escape_debug()), None)
            }
            LinkEvent::Exited(exit) => self.end(Some(exit), Intent::None).await,
            LinkEvent::Closed => self.link_closed().await,
        }
    }

    /// A stop or kill came while a restart was stopping the VM: it is not to start again.
    pub(super) async fn forget_restart(&mut self) {
        let Some(stopping) = self.run.stopping() else {
            return;
        };
        let starters = std::mem::take(&mut stopping.then_start);
        if starters.is_empty() {
            return;
        }
        let name = &self.record.name;
        let error = ErrorBody::new(
            ErrorCode::Cancelled,
            format!("the restart of VM `{name}` was cancelled by a stop"),
        );
        reply_all(starters, &Err(error));
        if self.going_down.is_none() {
            self.change_anyway(|record| record.desired = Desired::Off)
                .await;
        }
    }

    pub(super) fn still_alive_error(&self) -> ErrorBody {
        let name = &self.record.name;
        ErrorBody::new(
            ErrorCode::Unreachable,
            format!("a process of VM `{name}` does not die"),
        )
        .hint(format!(
            "it may wait for a disk of the host; `banger vm why {name}` tells more"
        ))
    }

    pub(super) fn denied(&self, deny: Deny, request: Request) -> ErrorBody {
        convert::denied(&self.record.name, deny, request)
    }
}

pub(super) fn answer_to(reply: Reply, answer: Answer) {
    // The client may have gone away.
    let _ = reply.send(answer);
}

pub(super) fn reply_all(replies: Vec<Reply>, answer: &Answer) {
    for reply in replies {
        answer_to(reply, answer.clone());
    }
}
