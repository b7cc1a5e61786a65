//! A running VMM and the loop that serves it.

use super::agent::{Agent, Heard};
use super::channel::{Input, read};
use super::clients::Clients;
use super::control::{Ask, Controller, Notice, Ticket};
use super::guest::{Guest, escaped};
use super::pipes::Pipes;
use super::start::{Failure, remove_sockets};
use crate::console::{RingWriter, Watcher};
use crate::protocol::{Command, Control, Event, Exit, Launch, Status, Verb};
use crate::qemu::qmp;
use crate::sandbox::Applied;
use crate::{exit, process};
use banger_guest::agent_protocol::{FromGuest, ToGuest};
use rustix::event::{PollFd, PollFlags};
use rustix::process::Signal;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStderr, ChildStdout, ExitCode};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How many bytes of standard error an [`Exit`] carries.
const STDERR_TAIL_BYTES: usize = 2048;
/// The most bytes that are read of an output in one turn.
const TURN_BYTES: usize = 64 * 1024;
/// How often the VMM is asked for its metrics: twice, were the guest honest.
const MAX_METRICS_FLUSHES: u32 = 4;
/// How long a VMM whose guest is off may take to end on SIGTERM.
const END_LIMIT: Duration = Duration::from_secs(2);

/// The files a shim writes, and the descriptors it keeps open.
pub(super) struct Files {
    pub(super) console: RingWriter,
    pub(super) log: RingWriter,
    pub(super) pipes: Pipes,
    #[expect(
        dead_code,
        reason = "held open: the lock and the namespace keeper's pipe"
    )]
    pub(super) kept: Vec<OwnedFd>,
}

/// A VMM and what became of each layer of its sandbox.
pub(super) struct Sandboxed {
    pub(super) child: Child,
    pub(super) applied: Vec<Applied>,
}

/// A VMM, its guest and its clients.
pub(super) struct Machine {
    launch: Launch,
    child: Child,
    sandbox: Vec<Applied>,
    pub(super) pidfd: OwnedFd,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    stderr_tail: Vec<u8>,
    started: Instant,
    files: Files,
    watcher: Watcher,
    pub(super) control: Controller,
    agent: Agent,
    clients: Clients,
    guest: Guest,
    paused: bool,
    disk_full: bool,
    /// A write failed for want of space; whether the vCPUs stop because of it comes next.
    out_of_space: bool,
    shutdown_asked: bool,
    malformed: u64,
    metrics_flushes: u32,
    /// SIGTERM was sent because the guest is off.
    ending: Option<Instant>,
    changed: bool,
}

#[derive(Clone, Copy)]
enum Source {
    Child,
    Output,
    Control,
    AgentListener,
    Agent,
    Listener,
    Client(u64),
}

impl Machine {
    pub(super) fn new(
        launch: Launch,
        sandboxed: Sandboxed,
        started: Instant,
        files: Files,
        control: Controller,
        agent: Agent,
        clients: Clients,
    ) -> io::Result<Self> {
        let Sandboxed {
            mut child,
            applied: sandbox,
        } = sandboxed;
        let pidfd = process::open(child.id() as i32).and_then(|pidfd| {
            for output in [
                child.stdout.as_ref().map(AsFd::as_fd),
                child.stderr.as_ref().map(AsFd::as_fd),
            ] {
                let output = output.ok_or(io::ErrorKind::NotFound)?;
                rustix::fs::fcntl_setfl(output, rustix::fs::OFlags::NONBLOCK)?;
            }
            Ok(pidfd)
        });
        let pidfd = match pidfd {
            Ok(pidfd) => pidfd,
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                remove_sockets(&launch, &agent);
                return Err(error);
            }
        };
        Ok(Self {
            stdout: child.stdout.take(),
            stderr: child.stderr.take(),
            launch,
            child,
            sandbox,
            pidfd,
            stderr_tail: Vec::new(),
            started,
            files,
            watcher: Watcher::default(),
            control,
            agent,
            clients,
            guest: Guest::default(),
            paused: false,
            disk_full: false,
            out_of_space: false,
            shutdown_asked: false,
            malformed: 0,
            metrics_flushes: 0,
            ending: None,
            changed: false,
        })
    }

    pub(super) fn vmm_pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub(super) fn sandbox(&self) -> &[Applied] {
        &self.sandbox
    }

    pub(super) fn program(&self) -> String {
        self.launch.program.display().to_string()
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn log(&mut self, text: &str) {
        self.files
            .log
            .write(format!("banger-shim: {text}\n").as_bytes());
    }

    fn status(&self) -> Status {
        Status {
            vm: self.launch.vm.clone(),
            attempt: self.launch.attempt.clone(),
            vmm_pid: self.vmm_pid(),
            shim_pid: std::process::id() as i32,
            driver: self.launch.control.driver(),
            paused: self.paused,
            disk_full: self.disk_full,
            ready: self.guest.ready,
            agent: self.guest.agent,
            boot: self.guest.boot(),
            sandbox: self.sandbox.clone(),
        }
    }

    /// The VMM answered for the first time.
    pub(super) fn alive(&mut self) -> Result<(), String> {
        self.guest.vmm_up = Some(self.now());
        for Applied { layer, missing } in self.sandbox.clone() {
            if let Some(why) = missing {
                self.log(&format!(
                    "the VMM runs without the sandbox's layer `{}`: {why}",
                    layer.name()
                ));
            }
        }
        self.agent
            .connect()
            .map_err(|error| format!("cannot connect to the agent's channel: {error}"))
    }

    /// The VMM ended before it answered.
    pub(super) fn ended_early(&mut self) -> String {
        let program = self.program();
        match self.child.wait() {
            Ok(status) => format!("`{program}` ended before it answered ({status})"),
            Err(error) => format!("`{program}` ended before it answered ({error})"),
        }
    }

    /// Ends a VMM that did not start as it should.
    pub(super) fn abandon(mut self, error: String) -> Failure {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.drain_outputs();
        remove_sockets(&self.launch, &self.agent);
        self.log(&error);
        Failure {
            error,
            stderr: self.stderr_text(),
        }
    }

    fn stderr_text(&self) -> String {
        let text = String::from_utf8_lossy(&self.stderr_tail);
        let lines: Vec<String> = text
            .lines()
            .map(|line| escaped(line, STDERR_TAIL_BYTES))
            .collect();
        lines.join("\n")
    }

    pub(super) fn outputs(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [
            self.stdout.as_ref().map(AsFd::as_fd),
            self.stderr.as_ref().map(AsFd::as_fd),
            self.files.pipes.log.as_ref().map(AsFd::as_fd),
            self.files
                .pipes
                .metrics
                .as_ref()
                .map(|(pipe, _)| pipe.as_fd()),
        ]
        .into_iter()
        .flatten()
    }

    /// Reads what the VMM printed, a bounded amount of it. Tells whether there was anything.
    pub(super) fn read_outputs(&mut self) -> bool {
        let mut buffer = [0; 8192];
        let mut any = false;
        let mut total = 0;
        while let Some(stdout) = &self.stdout {
            match read(stdout, &mut buffer) {
                Input::Bytes(length) => {
                    any = true;
                    total += length;
                    self.files.console.write(&buffer[..length]);
                    for word in self.watcher.read(&buffer[..length]) {
                        self.guest.kernel_said(word);
                    }
                    if total >= TURN_BYTES {
                        break;
                    }
                }
                Input::Empty => break,
                Input::End => self.stdout = None,
            }
        }
        total = 0;
        while let Some(stderr) = &self.stderr {
            match read(stderr, &mut buffer) {
                Input::Bytes(length) => {
                    any = true;
                    total += length;
                    self.keep_log(&buffer[..length]);
                    if total >= TURN_BYTES {
                        break;
                    }
                }
                Input::Empty => break,
                Input::End => self.stderr = None,
            }
        }
        total = 0;
        while let Some(pipe) = &self.files.pipes.log
            && total < TURN_BYTES
            && let Input::Bytes(length) = read(pipe, &mut buffer)
        {
            any = true;
            total += length;
            self.keep_log(&buffer[..length]);
        }
        total = 0;
        while let Some((pipe, ring)) = &mut self.files.pipes.metrics
            && total < TURN_BYTES
            && let Input::Bytes(length) = read(pipe, &mut buffer)
        {
            any = true;
            total += length;
            ring.write(&buffer[..length]);
        }
        any
    }

    fn keep_log(&mut self, bytes: &[u8]) {
        self.files.log.write(bytes);
        self.stderr_tail.extend_from_slice(bytes);
        let excess = self.stderr_tail.len().saturating_sub(STDERR_TAIL_BYTES);
        self.stderr_tail.drain(..excess);
    }

    /// Reads the rest of what an ended VMM printed.
    fn drain_outputs(&mut self) {
        // A descendant of the VMM that still printed could keep this up; no driver starts any.
        for _ in 0..64 {
            if !self.read_outputs() {
                return;
            }
        }
    }

    /// Serves until the VMM has ended.
    pub(super) fn serve(mut self, mut watch: Option<OwnedFd>) -> ExitCode {
        loop {
            let mut greeted = false;
            for source in self.wait() {
                match source {
                    Source::Child => return self.finish(),
                    Source::Output => {
                        self.read_outputs();
                    }
                    Source::Control => {
                        // What the agent said before its port closed comes before the news of it.
                        self.hear_agent();
                        let notices = self.control.work();
                        self.take(notices);
                    }
                    Source::AgentListener => self.agent.accept(),
                    Source::Agent => self.hear_agent(),
                    Source::Listener => {
                        let status = self.status();
                        self.clients.accept(&status);
                        greeted = true;
                    }
                    Source::Client(key) => {
                        for command in self.clients.read(key) {
                            self.obey(key, command);
                        }
                    }
                }
            }
            self.end_if_off();
            let status = self.status();
            let changed = std::mem::take(&mut self.changed);
            self.clients.catch_up(&status, changed);
            if greeted {
                // Whoever waited for the start has the answer now. A user may have only so many of these.
                drop(watch.take());
            }
        }
    }

    /// Waits for something to do.
    fn wait(&self) -> Vec<Source> {
        let mut sources = vec![Source::Child, Source::Listener];
        let mut polled = vec![
            PollFd::new(&self.pidfd, PollFlags::IN),
            PollFd::from_borrowed_fd(self.clients.listener(), PollFlags::IN),
        ];
        let mut add = |source, fd, writes: bool| {
            let flags = if writes {
                PollFlags::IN | PollFlags::OUT
            } else {
                PollFlags::IN
            };
            sources.push(source);
            polled.push(PollFd::from_borrowed_fd(fd, flags));
        };
        for output in self.outputs() {
            add(Source::Output, output, false);
        }
        if let Some((fd, writes)) = self.control.interest() {
            add(Source::Control, fd, writes);
        }
        if let Some(fd) = self.agent.listener() {
            add(Source::AgentListener, fd, false);
        }
        if let Some((fd, writes)) = self.agent.interest() {
            add(Source::Agent, fd, writes);
        }
        for (key, fd, writes) in self.clients.interests() {
            add(Source::Client(key), fd, writes);
        }
        let limit = self
            .next_deadline()
            .map(|deadline| process::timespec(deadline.saturating_duration_since(Instant::now())));
        // An interruption or a shortage of memory: look again.
        let _ = rustix::event::poll(&mut polled, limit.as_ref());
        sources
            .into_iter()
            .zip(&polled)
            .filter(|(_, fd)| !fd.revents().is_empty())
            .map(|(source, _)| source)
            .collect()
    }

    fn next_deadline(&self) -> Option<Instant> {
        let ending = match self.ending {
            Some(since) => Some(since + END_LIMIT),
            None => self.off_counts().then(|| self.guest.off_at()).flatten(),
        };
        [ending, self.clients.next_deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Whether a guest that is off leaves its VMM running.
    fn off_counts(&self) -> bool {
        matches!(self.launch.control, Control::Firecracker { .. })
    }

    fn end_if_off(&mut self) {
        let now = Instant::now();
        match self.ending {
            Some(since) if now >= since + END_LIMIT => {
                let _ = self.signal(Signal::KILL);
                // Nothing is left to escalate to; its exit is all that is waited for.
                self.ending = Some(now + Duration::from_secs(3600));
            }
            Some(_) => {}
            None if self.off_counts() && self.guest.is_off(now) => {
                self.guest.off();
                self.log("the guest is off: ending its VMM");
                let _ = self.terminate();
                self.ending = Some(now);
            }
            None => {}
        }
    }

    fn signal(&self, signal: Signal) -> Result<(), String> {
        rustix::process::pidfd_send_signal(&self.pidfd, signal)
            .map_err(|error| format!("cannot signal the VMM: {error}"))
    }

    fn terminate(&self) -> Result<(), String> {
        self.signal(process::ending_signal(self.vmm_pid()))
    }

    fn obey(&mut self, client: u64, command: Command) {
        let ticket = Ticket {
            client,
            id: command.id,
        };
        let outcome = match command.verb {
            Verb::Ping => Some(Ok(())),
            Verb::Shutdown => self.shut_down(ticket),
            Verb::Pause => {
                // Unless it is paused already, this pause is not for want of room.
                self.out_of_space &= self.paused;
                self.ask(Ask::Pause, ticket)
            }
            Verb::PauseForRoom => {
                self.out_of_space = true;
                self.ask(Ask::Pause, ticket)
            }
            Verb::Resume => self.ask(Ask::Resume, ticket),
            Verb::Terminate | Verb::Kill => {
                self.guest.ended = true;
                Some(if command.verb == Verb::Kill {
                    self.signal(Signal::KILL)
                } else {
                    self.terminate()
                })
            }
        };
        if let Some(result) = outcome {
            self.clients.reply(client, command.id, result);
        }
    }

    fn ask(&mut self, ask: Ask, ticket: Ticket) -> Option<Result<(), String>> {
        let notices = self.control.ask(ask, Some(ticket));
        self.take(notices);
        None
    }

    /// The agent first; the button where there is none, or where the agent was asked before and it did not help.
    fn shut_down(&mut self, ticket: Ticket) -> Option<Result<(), String>> {
        if self.paused {
            return Some(Err("the guest is paused".to_owned()));
        }
        let again = std::mem::replace(&mut self.shutdown_asked, true);
        if !again && self.guest.agent && self.agent.say(&ToGuest::Poweroff) {
            return Some(Ok(()));
        }
        self.ask(Ask::Button, ticket)
    }

    fn take(&mut self, notices: Vec<Notice>) {
        for notice in notices {
            match notice {
                Notice::Done {
                    ask,
                    ticket,
                    result,
                } => {
                    if result.is_ok() {
                        self.done(ask);
                    }
                    if let Some(ticket) = ticket {
                        self.clients.reply(ticket.client, ticket.id, result);
                    }
                }
                Notice::Event(event) => self.qmp_event(event),
                Notice::Lost => self.log("the VMM closed its control socket"),
            }
        }
    }

    fn done(&mut self, ask: Ask) {
        match ask {
            Ask::Alive | Ask::Button | Ask::FlushMetrics => {}
            Ask::Pause => self.set_paused(true),
            Ask::Resume => {
                self.set_paused(false);
                if self.guest.agent {
                    let now = SystemTime::now().duration_since(UNIX_EPOCH);
                    let unix_ns =
                        now.map_or(0, |now| i64::try_from(now.as_nanos()).unwrap_or(i64::MAX));
                    self.agent.say(&ToGuest::SetClock { unix_ns });
                }
            }
        }
    }

    /// Has the metrics written where there are any: once a guest is up and once before it goes, since by itself a VMM
    /// tells once a minute, and nothing when it is killed. A guest that says so again and again asks for no more.
    fn flush_metrics(&mut self) {
        if self.files.pipes.metrics.is_some() && self.metrics_flushes < MAX_METRICS_FLUSHES {
            self.metrics_flushes += 1;
            let notices = self.control.ask(Ask::FlushMetrics, None);
            self.take(notices);
        }
    }

    fn set_paused(&mut self, paused: bool) {
        let disk_full = paused && self.out_of_space;
        if !paused {
            self.out_of_space = false;
        }
        self.changed |= self.paused != paused || self.disk_full != disk_full;
        self.paused = paused;
        self.disk_full = disk_full;
    }

    pub(super) fn qmp_event(&mut self, event: qmp::Event) {
        match event {
            qmp::Event::Shutdown { reason } => self.guest.vmm_shutdown(&reason),
            qmp::Event::Stop => self.set_paused(true),
            qmp::Event::Resume => self.set_paused(false),
            qmp::Event::BlockError { stopped, no_space } => {
                if stopped && no_space {
                    self.out_of_space = true;
                    self.log("a disk of the host is full");
                    if self.paused {
                        self.set_paused(true);
                    }
                }
            }
            qmp::Event::Panicked => self.guest.panicked(),
            // What was heard stays: some of it may have come by the very opening that this tells of, by another way.
            qmp::Event::AgentPort { open: true } => self.agent.forget_unsent(),
            qmp::Event::AgentPort { open: false } => self.agent_closed(),
            qmp::Event::Other => {}
        }
    }

    fn agent_closed(&mut self) {
        self.changed |= self.guest.agent;
        self.guest.agent_closed(Instant::now());
    }

    fn hear_agent(&mut self) {
        for heard in self.agent.work() {
            let before = (self.guest.agent, self.guest.ready, self.guest.boot());
            let now = self.now();
            match heard {
                Heard::Message(FromGuest::Stage { stage, uptime_ms }) => {
                    self.guest.stage(stage, uptime_ms, now);
                }
                Heard::Message(FromGuest::Ready) => {
                    self.guest.ready(now);
                    self.flush_metrics();
                }
                Heard::Message(FromGuest::Bye { end }) => {
                    self.guest.bye(end);
                    self.flush_metrics();
                }
                Heard::Message(FromGuest::Pong) => self.guest.agent_speaks(),
                Heard::Message(FromGuest::Warning { text }) => {
                    if let Some(text) = self.guest.warning(&text) {
                        self.log(&format!("the guest warns: {text}"));
                        self.clients.tell(&Event::GuestWarning { text });
                    }
                }
                Heard::Malformed => self.malformed = self.malformed.saturating_add(1),
                Heard::Closed => self.agent_closed(),
            }
            self.changed |= before != (self.guest.agent, self.guest.ready, self.guest.boot());
        }
    }

    /// The VMM has ended: leave word, tell the clients, and go.
    fn finish(mut self) -> ExitCode {
        self.drain_outputs();
        self.hear_agent();
        let notices = self.control.work();
        self.take(notices);
        let status = self.child.wait();
        let code = status.as_ref().ok().and_then(|status| status.code());
        if self.malformed > 0 {
            self.log(&format!(
                "{} lines of the guest's agent were no messages",
                self.malformed
            ));
        }
        let exit = Exit {
            vm: self.launch.vm.clone(),
            attempt: self.launch.attempt.clone(),
            code,
            signal: status.as_ref().ok().and_then(|status| status.signal()),
            last_event: self.guest.last_event(code, self.off_counts()),
            shutdown_asked: self.shutdown_asked,
            at_unix_ms: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |now| i64::try_from(now.as_millis()).unwrap_or(i64::MAX)),
            stderr: self.stderr_text(),
        };
        if let Err(error) = exit::write(&self.launch.exit_file, &exit) {
            self.log(&format!("cannot write the exit file: {error}"));
        }
        self.clients.tell(&Event::Exited { exit });
        remove_sockets(&self.launch, &self.agent);
        ExitCode::SUCCESS
    }
}
