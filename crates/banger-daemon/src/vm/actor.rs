//! The actor of one VM: the only one that changes its phase.

use super::files::VmFiles;
use super::link::{Commander, Link, LinkEvent};
use super::start::{StartError, StartPlan, Started, reap, unwind};
use super::stop::{Intent, reason};
use super::teardown::{clear_run, end_processes, release_port, sync_disks};
use super::{Answer, Ask, AttemptFile, Handle, INBOX, Message, View};
use crate::convert;
use crate::crash::{Side, point};
use crate::images::store_error;
use crate::record::VmRecord;
use crate::world::World;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::event::EventKind;
use banger_api::vm::{BootTimes, JournalEntry};
use banger_core::decide::{Action, Decision, Deny, Request, Standing, decide};
use banger_core::id::VmId;
use banger_core::phase::{Desired, PausedBy, Phase, StartStep, StopReason};
use banger_vmm::exit;
use banger_vmm::lock::{LockError, try_lock, wait_free};
use banger_vmm::protocol::{Exit, Status, Verb};
use jiff::Timestamp;
use std::pin::Pin;
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// How long a VMM may take to follow SIGTERM.
const TERM_GRACE: Duration = Duration::from_secs(3);
/// How often an unreachable VM is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// How long a VMM that said that it ends may take to be gone.
const EXIT_GRACE: Duration = Duration::from_secs(5);

type Reply = oneshot::Sender<Answer>;

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
enum Run {
    Idle,
    Starting(Box<Starting>),
    Live(Box<Live>),
}

struct Starting {
    plan: Pin<Box<dyn Future<Output = Result<Started, StartError>> + Send>>,
    cancel: CancellationToken,
    steps: watch::Receiver<StartStep>,
    starters: Vec<Reply>,
    cancellers: Vec<Reply>,
    /// The cancelling request wants the VM in the trash afterwards.
    then: Option<Ask>,
}

struct Live {
    attempt: AttemptFile,
    link: Option<Link>,
    commander: Option<Commander>,
    shim: Option<Child>,
    status: Option<Status>,
    stopping: Option<Stopping>,
    /// Resolves when the lock of an unreachable VM is free.
    lock_free: Option<oneshot::Receiver<()>>,
}

impl Live {
    /// A VM whose lock is held while its shim does not answer.
    fn unreachable(attempt: AttemptFile) -> Self {
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

struct Stopping {
    deadline: Timestamp,
    waiters: Vec<Reply>,
    then_start: Vec<Reply>,
}

impl Run {
    /// The stop that is under way.
    fn stopping(&mut self) -> Option<&mut Stopping> {
        match self {
            Self::Live(live) => live.stopping.as_mut(),
            Self::Idle | Self::Starting(_) => None,
        }
    }
}

enum Incoming {
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
            () = until(live.stopping.as_ref().map(|stopping| stopping.deadline)) => Incoming::Deadline,
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

async fn until(deadline: Option<Timestamp>) {
    match deadline {
        Some(deadline) => {
            let left = Timestamp::now().duration_until(deadline);
            tokio::time::sleep(Duration::try_from(left).unwrap_or(Duration::ZERO)).await;
        }
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

/// Starts the actor of a VM.
///
/// The receiver resolves once the actor has looked at what an earlier daemon left.
pub(crate) fn spawn(
    world: Arc<World>,
    record: VmRecord,
    found: Found,
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
    let actor = Actor {
        files: VmFiles::of(&world.paths, id),
        world,
        record,
        run: Run::Idle,
        view,
    };
    let (looked, recovered) = oneshot::channel();
    tokio::spawn(actor.live(inbox, found, looked));
    let handle = Handle {
        id,
        inbox: sender,
        view: receiver,
    };
    (handle, recovered)
}

struct Actor {
    world: Arc<World>,
    files: VmFiles,
    record: Arc<VmRecord>,
    run: Run,
    view: watch::Sender<View>,
}

impl Actor {
    async fn live(
        mut self,
        mut inbox: mpsc::Receiver<Message>,
        found: Found,
        looked: oneshot::Sender<()>,
    ) {
        match found {
            Found::Stopped => {}
            Found::Unknown => self.recover().await,
        }
        // Nobody may be waiting for it.
        let _ = looked.send(());
        if self.record.purging {
            // An earlier daemon began it and its promise stands.
            if let Err(error) = self.purge().await {
                tracing::warn!(vm = %self.record.id, error = %error.message, "a purge did not go on");
            }
        }
        while !self.view.borrow().purged {
            match next(&mut self.run, &mut inbox).await {
                Incoming::Message(message) => self.request(message).await,
                Incoming::Step(step) => self.publish(|view| view.phase = Phase::Starting { step }),
                Incoming::Started(outcome) => self.started(outcome).await,
                Incoming::Link(event) => self.link_event(event).await,
                Incoming::Deadline => self.escalate().await,
                Incoming::LockFree => self.ended(None, Intent::None).await,
                Incoming::LookAgain => self.look_again().await,
                Incoming::Closed => return,
            }
        }
    }

    fn note(&self, subject: &str, message: impl Into<String>, took: Option<Duration>) {
        note(&self.world, self.record.id, subject, message.into(), took);
    }

    fn publish(&self, change: impl FnOnce(&mut View)) {
        self.view.send_modify(|view| {
            change(view);
            view.record = Arc::clone(&self.record);
            view.revision += 1;
        });
        let view = self.view.borrow().clone();
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
    async fn change(&mut self, change: impl FnOnce(&mut VmRecord)) -> Result<(), ErrorBody> {
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
    async fn change_anyway(&mut self, change: impl Fn(&mut VmRecord)) {
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
            Standing::Live(&phase)
        };
        tracing::debug!(vm = %self.record.id, request = ask.request.verb(), phase = phase.name(), "request");
        if trashed && ask.purge {
            let answer = self.purge().await.map(|()| self.view.borrow().clone());
            answer_to(reply, answer);
            return;
        }
        match decide(standing, ask.request) {
            Decision::AlreadyThere => {
                if matches!(ask.request, Request::Stop | Request::Kill)
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
                    // The latest wish is that it stops and stays so.
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

    fn answer(&self, reply: Reply) {
        answer_to(reply, Ok(self.view.borrow().clone()));
    }

    async fn act(&mut self, action: Action, ask: Ask, reply: Reply) {
        match action {
            Action::Start => self.start(vec![reply]).await,
            Action::Stop => self.stop(ask.timeout, vec![reply], Vec::new()).await,
            Action::StopThenStart => self.stop(ask.timeout, Vec::new(), vec![reply]).await,
            Action::ResumeThenStop => match self.command(Verb::Resume).await {
                Ok(()) => self.stop(ask.timeout, vec![reply], Vec::new()).await,
                Err(error) => answer_to(reply, Err(error)),
            },
            Action::ResumeThenStopThenStart => match self.command(Verb::Resume).await {
                Ok(()) => self.stop(ask.timeout, Vec::new(), vec![reply]).await,
                Err(error) => answer_to(reply, Err(error)),
            },
            Action::ThenStart => match self.run.stopping() {
                Some(stopping) => stopping.then_start.push(reply),
                None => self.answer(reply),
            },
            Action::CancelStart => self.cancel_start(reply, None),
            Action::Kill => {
                self.kill(Intent::Kill).await;
                let answer = match self.run {
                    Run::Live(_) => Err(self.undead()),
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
                let done = self.command(Verb::Pause).await;
                self.paused(
                    done,
                    Phase::Paused {
                        by: PausedBy::Person,
                    },
                    reply,
                );
            }
            Action::Resume => {
                let done = self.command(Verb::Resume).await;
                let ready = self.is_ready();
                self.paused(
                    done,
                    Phase::Running {
                        ready,
                        reachable: true,
                    },
                    reply,
                );
            }
            Action::Set => {
                let answer = self.set(&ask).await;
                answer_to(reply, answer.map(|()| self.view.borrow().clone()));
            }
            Action::Trash => {
                let answer = self.trash(ask.purge).await;
                answer_to(reply, answer.map(|()| self.view.borrow().clone()));
            }
            Action::KillThenTrash => {
                if let Run::Starting(_) = &self.run {
                    self.cancel_start(reply, Some(ask));
                    return;
                }
                self.forget_restart().await;
                self.kill(Intent::Kill).await;
                let answer = match self.run {
                    Run::Idle => self.trash(ask.purge).await,
                    Run::Starting(_) | Run::Live(_) => Err(self.undead()),
                };
                answer_to(reply, answer.map(|()| self.view.borrow().clone()));
            }
        }
    }

    fn paused(&self, done: Result<(), ErrorBody>, phase: Phase, reply: Reply) {
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

    /// Sends a verb to the shim and waits for its answer.
    async fn command(&mut self, verb: Verb) -> Result<(), ErrorBody> {
        let commander = match &self.run {
            Run::Live(live) => live.commander.clone(),
            Run::Idle | Run::Starting(_) => None,
        };
        let name = &self.record.name;
        let Some(commander) = commander else {
            return Err(self.denied(Deny::Unreachable, Request::Kill));
        };
        commander.send(verb).await.map_err(|why| {
            let mut error = ErrorBody::new(
                ErrorCode::Internal,
                format!("the VMM of `{name}` did not do it"),
            );
            error.causes.push(why);
            error
        })
    }

    async fn start(&mut self, starters: Vec<Reply>) {
        let asked_at = Instant::now();
        point("start", "desired", Side::Before);
        let stored = self.change(|record| record.desired = Desired::On).await;
        point("start", "desired", Side::After);
        if let Err(error) = stored {
            for reply in starters {
                answer_to(reply, Err(error.clone()));
            }
            return;
        }
        self.note("start", "asked", None);
        let (steps, receiver) = watch::channel(StartStep::TakeLock);
        let cancel = CancellationToken::new();
        let plan = StartPlan {
            world: Arc::clone(&self.world),
            record: Arc::clone(&self.record),
            asked_at,
            steps,
            cancel: cancel.clone(),
        };
        self.run = Run::Starting(Box::new(Starting {
            plan: Box::pin(plan.run()),
            cancel,
            steps: receiver,
            starters,
            cancellers: Vec::new(),
            then: None,
        }));
        self.publish(|view| {
            view.phase = Phase::Starting {
                step: StartStep::TakeLock,
            };
            view.boot = None;
        });
    }

    fn cancel_start(&mut self, reply: Reply, then: Option<Ask>) {
        match &mut self.run {
            Run::Starting(starting) => {
                starting.cancel.cancel();
                starting.cancellers.push(reply);
                // Of two requests to delete it, the one that purges counts.
                let purges = starting.then.as_ref().is_some_and(|earlier| earlier.purge);
                if !purges {
                    starting.then = then.or(starting.then.take());
                }
            }
            Run::Idle | Run::Live(_) => self.answer(reply),
        }
    }

    async fn started(&mut self, outcome: Result<Started, StartError>) {
        let Run::Starting(starting) = std::mem::replace(&mut self.run, Run::Idle) else {
            return;
        };
        let Starting {
            starters,
            cancellers,
            cancel,
            then,
            ..
        } = *starting;
        match outcome {
            Ok(started) => {
                self.note(
                    "start",
                    format!("running: {}", started.attempt.reason),
                    None,
                );
                self.adopt(
                    started.attempt,
                    started.link,
                    started.status,
                    Some(started.shim),
                );
                if cancel.is_cancelled() {
                    self.kill(Intent::Kill).await;
                    let name = &self.record.name;
                    let error = ErrorBody::new(
                        ErrorCode::Cancelled,
                        format!("the start of `{name}` was cancelled"),
                    );
                    reply_all(starters, &Err(error));
                } else {
                    reply_all(starters, &Ok(self.view.borrow().clone()));
                    if !self.record.started_once {
                        self.change_anyway(|record| record.started_once = true)
                            .await;
                    }
                }
            }
            Err(StartError {
                step,
                error,
                cancelled,
            }) => {
                let unwound = unwind(&self.world, &self.record).await;
                let why = if cancelled {
                    StopReason::StartCancelled
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
                        error.causes.extend(problems);
                        self.stopped(why, cancelled, None).await;
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
        if !cancellers.is_empty() {
            self.change_anyway(|record| record.desired = Desired::Off)
                .await;
            let done = match (&self.run, &then) {
                (Run::Idle, Some(ask)) => self.trash(ask.purge).await,
                (Run::Idle, None) => Ok(()),
                (Run::Starting(_) | Run::Live(_), _) => {
                    Err(self.denied(Deny::Unreachable, Request::Kill))
                }
            };
            self.publish(|_| {});
            reply_all(cancellers, &done.map(|()| self.view.borrow().clone()));
        }
    }

    /// Takes a running VMM over.
    fn adopt(&mut self, attempt: AttemptFile, link: Link, status: Status, shim: Option<Child>) {
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
        self.status(status);
    }

    /// Derives phase, attempt and boot times from what the shim says.
    fn status(&mut self, status: Status) {
        let Run::Live(live) = &mut self.run else {
            return;
        };
        let mut attempt = live.attempt.to_api();
        attempt.vmm_pid = Some(status.vmm_pid);
        attempt.shim_pid = Some(status.shim_pid);
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

    async fn link_event(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Status(status) => self.status(status),
            LinkEvent::GuestWarning(text) => {
                self.note("guest", format!("warns: {}", text.escape_debug()), None)
            }
            LinkEvent::Exited(exit) => self.ended(Some(exit), Intent::None).await,
            LinkEvent::Closed => self.link_closed().await,
        }
    }

    /// The shim went away without a word: either all is over, or the VMM runs on without it.
    async fn link_closed(&mut self) {
        let Run::Live(live) = &mut self.run else {
            return;
        };
        live.link = None;
        live.commander = None;
        if let Some(shim) = live.shim.take() {
            reap(shim);
        }
        let path = self.files.lock();
        // A shim that has just ended by itself may not be quite gone.
        let free = tokio::task::spawn_blocking(move || {
            wait_free(&path, Instant::now() + Duration::from_millis(500))
        });
        match free.await {
            Ok(Ok(_)) => self.ended(None, Intent::None).await,
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

    fn unreachable(&mut self) {
        let Run::Live(live) = &mut self.run else {
            return;
        };
        let (sender, receiver) = oneshot::channel();
        live.lock_free = Some(receiver);
        let ready = live.status.as_ref().is_some_and(|status| status.ready);
        let waiters = live.stopping.take();
        let path = self.files.lock();
        std::thread::spawn(move || {
            while !sender.is_closed() {
                // Short, so that the thread ends soon after nobody waits for it any more.
                if wait_free(&path, Instant::now() + LOOK_AGAIN).is_ok() {
                    break;
                }
            }
            // The actor may have found out by itself.
            let _ = sender.send(());
        });
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

    async fn stop(&mut self, timeout: Duration, waiters: Vec<Reply>, then_start: Vec<Reply>) {
        point("stop", "desired", Side::Before);
        if then_start.is_empty() {
            self.change_anyway(|record| record.desired = Desired::Off)
                .await;
        }
        point("stop", "desired", Side::After);
        let deadline = Timestamp::now()
            .saturating_add(jiff::SignedDuration::try_from(timeout).unwrap_or_default());
        let Ok(deadline) = deadline else {
            let error = ErrorBody::new(ErrorCode::InvalidRequest, "the time limit is out of range");
            reply_all(waiters.into_iter().chain(then_start).collect(), &Err(error));
            return;
        };
        if let Run::Live(live) = &mut self.run {
            live.stopping = Some(Stopping {
                deadline,
                waiters,
                then_start,
            });
        }
        self.publish(|view| view.phase = Phase::Stopping { deadline });
        point("stop", "ask", Side::Before);
        match self.command(Verb::Shutdown).await {
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
    async fn escalate(&mut self) {
        self.note(
            "stop",
            "the guest did not shut down in time: ending the VMM",
            None,
        );
        self.kill(Intent::Stop { forced: true }).await;
    }

    /// Ends all processes of the VM, whatever state they are in.
    async fn kill(&mut self, intent: Intent) {
        self.ended(None, intent).await;
    }

    /// The VMM has ended, or is to be ended now: cleans up, and says why the VM is stopped.
    async fn ended(&mut self, exit: Option<Exit>, intent: Intent) {
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
            Ok((Ok(lock), _)) => lock,
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
        let why = reason(intent, exit.as_ref());
        point("stop", "sync", Side::Before);
        sync_disks(&self.files).await;
        point("stop", "sync", Side::After);
        release_port(&self.world, self.record.id, "stop").await;
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
            | StopReason::Unknown => false,
        };
        self.stopped(why, off, Some(attempt)).await;
        // Last: until the reason is recorded, it is what a crash would leave to tell it.
        self.clear_run("stop").await;
        drop(lock);
        reply_all(waiters, &Ok(self.view.borrow().clone()));
        if !then_start.is_empty() {
            self.start(then_start).await;
        }
    }

    async fn clear_run(&mut self, verb: &'static str) {
        clear_run(&self.world, self.record.id, verb).await;
    }

    /// Records that the VM is stopped, and why; `attempt` is the run that ended.
    async fn stopped(&mut self, why: StopReason, off: bool, attempt: Option<String>) {
        let boot = self.view.borrow().boot.clone();
        let ran = !matches!(
            why,
            StopReason::StartFailed { .. } | StopReason::StartCancelled
        );
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
        self.note("stop", format!("stopped: {why}"), None);
        self.publish(|view| {
            view.phase = Phase::Stopped { why };
            view.attempt = None;
        });
    }

    async fn set(&mut self, ask: &Ask) -> Result<(), ErrorBody> {
        if let Some(generation) = ask.generation
            && generation != self.record.generation
        {
            let message = format!(
                "`{}` is at generation {}, not {generation}: someone else changed it",
                self.record.name, self.record.generation
            );
            return Err(ErrorBody::new(ErrorCode::Conflict, message)
                .hint("show it again and repeat the change"));
        }
        let spec = self.record.spec.patched(&ask.patch);
        if spec == self.record.spec {
            return Ok(());
        }
        self.change(|record| {
            record.spec = spec;
            record.generation += 1;
        })
        .await?;
        self.note("set", "the spec was changed", None);
        self.publish(|_| {});
        Ok(())
    }

    async fn trash(&mut self, purge: bool) -> Result<(), ErrorBody> {
        if purge {
            return self.purge().await;
        }
        point("delete", "record", Side::Before);
        self.change(|record| {
            record.trashed_at = Some(Timestamp::now());
            record.desired = Desired::Off;
        })
        .await?;
        point("delete", "record", Side::After);
        self.note("delete", "put into the trash", None);
        self.publish(|_| {});
        Ok(())
    }

    /// Removes record and files for ever: first the promise, then the files, then the row.
    async fn purge(&mut self) -> Result<(), ErrorBody> {
        // Held to the end: nothing starts on these disks, and nothing that lives loses them.
        let _lock = match (&self.run, try_lock(&self.files.lock())) {
            (Run::Starting(_) | Run::Live(_), _) | (_, Err(LockError::Held(_))) => {
                return Err(self.denied(Deny::Unreachable, Request::Delete { force: true }));
            }
            (Run::Idle, Ok(lock)) => Some(lock),
            (Run::Idle, Err(LockError::Io { .. })) if !self.files.folder.exists() => None,
            (Run::Idle, Err(LockError::Io { path, source })) => {
                return Err(super::files::io_error("lock", &path, &source));
            }
        };
        point("delete", "promise", Side::Before);
        if !self.record.purging {
            self.change(|record| {
                record.purging = true;
                record.trashed_at.get_or_insert_with(Timestamp::now);
            })
            .await?;
            self.publish(|_| {});
        }
        point("delete", "promise", Side::After);
        release_port(&self.world, self.record.id, "delete").await;
        self.clear_run("delete").await;
        point("delete", "unlink", Side::Before);
        let folder = self.files.folder.clone();
        let removed = tokio::task::spawn_blocking(move || remove_folder(&folder)).await;
        match removed {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                return Err(super::files::io_error("remove", &self.files.folder, &error));
            }
            Err(error) => return Err(ErrorBody::from_error(ErrorCode::Internal, &error)),
        }
        point("delete", "unlink", Side::After);
        point("delete", "row", Side::Before);
        self.world
            .store
            .delete_vm(self.record.id)
            .await
            .map_err(|error| store_error(&error))?;
        point("delete", "row", Side::After);
        self.world.images.unpin(self.record.id);
        self.publish(|view| view.purged = true);
        Ok(())
    }

    /// A stop or kill came while a restart was stopping the VM: it is not to start again.
    async fn forget_restart(&mut self) {
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
            format!("the restart of `{name}` was cancelled by a stop"),
        );
        reply_all(starters, &Err(error));
        self.change_anyway(|record| record.desired = Desired::Off)
            .await;
    }

    fn undead(&self) -> ErrorBody {
        let name = &self.record.name;
        ErrorBody::new(
            ErrorCode::Unreachable,
            format!("a process of `{name}` does not die"),
        )
        .hint(format!(
            "it may wait for a disk of the host; `banger vm why {name}` tells more"
        ))
    }

    fn denied(&self, deny: Deny, request: Request) -> ErrorBody {
        convert::denied(&self.record.name, deny, request)
    }

    /// Looks at what an earlier daemon left of this VM: adopts what lives, cleans up after what does not.
    async fn recover(&mut self) {
        let path = self.files.lock();
        let attempt = std::fs::read(self.files.attempt())
            .ok()
            .and_then(|bytes| serde_json::from_slice::<AttemptFile>(&bytes).ok());
        if !path.exists() && attempt.is_none() && !self.files.run().exists() {
            return;
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

    /// Only a free lock means dead: whatever else came of trying it, the VM is taken to live.
    async fn recover_live(&mut self, attempt: Option<AttemptFile>, held: &LockError) {
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
            }
        }
    }

    async fn take_over(&mut self, attempt: AttemptFile, link: Link, status: Status) {
        self.note("recover", "found running and taken over", None);
        self.adopt(attempt, link, status, None);
        if !self.record.started_once {
            self.change_anyway(|record| record.started_once = true)
                .await;
        }
        if self.record.desired == Desired::Off {
            self.note("recover", "it was to stop: asking again", None);
            self.stop(Ask::STOP_TIMEOUT, Vec::new(), Vec::new()).await;
        }
    }

    /// An unreachable VM's shim may answer after all.
    async fn look_again(&mut self) {
        let Run::Live(live) = &self.run else { return };
        let attempt = live.attempt.clone();
        if let Ok((link, status)) = Link::connect(&self.files.shim_socket()).await {
            self.take_over(attempt, link, status).await;
        }
    }

    async fn recover_dead(&mut self, attempt: Option<AttemptFile>) {
        let known = attempt
            .as_ref()
            .is_none_or(|attempt| self.record.last_attempt.as_ref() == Some(&attempt.attempt));
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
            sync_disks(&self.files).await;
            release_port(&self.world, self.record.id, "recover").await;
            let off = why == StopReason::GuestPoweroff;
            self.note("recover", format!("found stopped: {why}"), None);
            self.stopped(why, off, Some(attempt.attempt)).await;
        } else {
            release_port(&self.world, self.record.id, "recover").await;
        }
        self.clear_run("recover").await;
    }
}

/// Unlinks all files of a VM, its record's mirror last, so that what is left of a purge can always be told.
fn remove_folder(folder: &std::path::Path) -> std::io::Result<()> {
    let gone = |outcome: std::io::Result<()>| match outcome {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    };
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_name() == crate::record::VM_FILE {
            continue;
        }
        let path = entry.path();
        gone(if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(&path)
        } else {
            std::fs::remove_file(&path)
        })?;
    }
    gone(std::fs::remove_file(folder.join(crate::record::VM_FILE)))?;
    gone(std::fs::remove_dir(folder))
}

fn answer_to(reply: Reply, answer: Answer) {
    // The client may have gone away.
    let _ = reply.send(answer);
}

fn reply_all(replies: Vec<Reply>, answer: &Answer) {
    for reply in replies {
        answer_to(reply, answer.clone());
    }
}
