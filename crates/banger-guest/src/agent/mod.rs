//! What stays of `banger-init` when the image's init runs: one single-threaded process in the initrd's own tree.
//!
//! It holds nothing of the image's root. It waits for everything in one `epoll`: PID 1's notes on its standard input,
//! the channel to the host, devices that come, SIGTERM, and PID 1 turning into `systemd-shutdown`. Time limits are
//! kept only for the ssh port, which nothing announces, and for connecting again.

mod channel;
mod ending;
mod listening;
mod protocol;
mod state;

use crate::init::uevents;
use crate::sys::{self, ReadSome};
use banger_guest::agent_protocol::{FromGuest, GuestEnd, GuestStage, ToGuest};
use channel::Channel;
use rustix::event::{Timespec, epoll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use state::State;
use std::io;
use std::time::{Duration, Instant};

/// How long what was said last may take to reach the host.
const FLUSH_LIMIT: Duration = Duration::from_millis(1500);

/// How often and for how long an init that is starting is asked again to power off.
const ASK_AGAIN: Duration = Duration::from_millis(50);
const ASK_LIMIT: Duration = Duration::from_secs(10);

const NOTES: u64 = 1;
const CHANNEL: u64 = 2;
const DEVICES: u64 = 3;
const TERM: u64 = 4;
const SHUTDOWN: u64 = 5;
const MOUNTS: u64 = 6;

/// The agent's main function. Ends only with the guest, or when nothing can be waited for.
pub(crate) fn run() {
    // Its own session: a terminal's signals are not for it. It leads none yet, so this cannot fail.
    let _ = rustix::process::setsid();
    let _ = rustix::process::chdir("/");
    let _ = rustix::thread::set_name(c"banger-agent");
    if let Ok(mut agent) = Agent::new() {
        // Nobody is left to tell: the channel is what failed.
        let _ = agent.serve();
    }
}

struct Agent {
    epoll: OwnedFd,
    term: OwnedFd,
    devices: Option<OwnedFd>,
    shutdown: Option<OwnedFd>,
    mounts: Option<std::fs::File>,
    notes: protocol::Lines,
    channel: Option<Channel>,
    reconnect_at: Option<Instant>,
    backoff: Duration,
    /// When init is to be asked again to power off, and when that has been tried for long enough.
    ask_again: Option<(Instant, Instant)>,
    state: State,
}

impl Agent {
    fn new() -> io::Result<Self> {
        let agent = Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            term: sys::sigterm_fd()?,
            devices: uevents::socket().ok(),
            shutdown: None,
            mounts: None,
            notes: protocol::Lines::default(),
            channel: None,
            reconnect_at: Some(Instant::now()),
            backoff: channel::FIRST_BACKOFF,
            ask_again: None,
            state: State::new(sys::uptime_ms()),
        };
        let stdin = std::io::stdin();
        rustix::io::ioctl_fionbio(&stdin, true)?;
        agent.watch(stdin.as_fd(), NOTES, epoll::EventFlags::IN)?;
        agent.watch(agent.term.as_fd(), TERM, epoll::EventFlags::IN)?;
        if let Some(devices) = &agent.devices {
            agent.watch(devices.as_fd(), DEVICES, epoll::EventFlags::IN)?;
        }
        Ok(agent)
    }

    fn watch(&self, fd: BorrowedFd<'_>, token: u64, flags: epoll::EventFlags) -> io::Result<()> {
        Ok(epoll::add(
            &self.epoll,
            fd,
            epoll::EventData::new_u64(token),
            flags,
        )?)
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            let now = Instant::now();
            if self.channel.is_none() && self.reconnect_at.is_some_and(|at| at <= now) {
                self.connect();
            }
            self.state
                .look_for_ssh(now, sys::uptime_ms, listening::ssh_listens);
            if self.ask_again.is_some_and(|(at, _)| at <= now) {
                self.power_off();
            }
            self.flush();
            for (token, flags) in self.wait()? {
                match token {
                    NOTES => self.read_notes(),
                    CHANNEL => self.read_channel(flags),
                    DEVICES => {
                        if let Some(devices) = &self.devices {
                            uevents::drain(devices);
                        }
                        if self.channel.is_none() {
                            self.reconnect_at = Some(Instant::now());
                        }
                    }
                    TERM => return self.terminated(),
                    SHUTDOWN => self.shutdown_program_opened(),
                    MOUNTS => ending::overlay_read_only(),
                    _ => {}
                }
            }
        }
    }

    /// Waits for the next event or the next time limit.
    fn wait(&self) -> io::Result<Vec<(u64, epoll::EventFlags)>> {
        let now = Instant::now();
        let reconnect_at = self.reconnect_at.filter(|_| self.channel.is_none());
        let ask_again = self.ask_again.map(|(at, _)| at);
        let next = [reconnect_at, self.state.next_look(), ask_again]
            .into_iter()
            .flatten()
            .min();
        let timeout =
            next.and_then(|at| Timespec::try_from(at.saturating_duration_since(now)).ok());
        let mut events = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }; 8];
        let count = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => 0,
            other => other?,
        };
        let seen = events[..count].iter();
        Ok(seen
            .map(|event| ({ event.data }.u64(), { event.flags }))
            .collect())
    }

    fn connect(&mut self) {
        match Channel::connect() {
            Ok(Some(channel)) => {
                use epoll::EventFlags;
                // Edge-triggered: a virtio port whose host end is not connected hangs up all the time.
                let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
                if self.watch(channel.as_fd(), CHANNEL, flags).is_ok() {
                    self.backoff = channel::FIRST_BACKOFF;
                    self.reconnect_at = None;
                    self.channel = Some(channel);
                    self.state.say_all_again();
                    return;
                }
                self.retry_later();
            }
            // No device yet: its coming is announced.
            Ok(None) => {
                self.reconnect_at = self
                    .devices
                    .is_none()
                    .then(|| Instant::now() + channel::LAST_BACKOFF)
            }
            Err(_) => self.retry_later(),
        }
    }

    fn retry_later(&mut self) {
        self.reconnect_at = Some(Instant::now() + self.backoff);
        self.backoff = (self.backoff * 2).min(channel::LAST_BACKOFF);
    }

    /// Says what is to be said, as far as the host takes it.
    fn flush(&mut self) {
        let Some(channel) = &mut self.channel else {
            return;
        };
        for message in self.state.take_unsaid() {
            channel.say(&message);
        }
        if channel.flush().is_err() {
            self.channel = None;
            self.retry_later();
        }
    }

    fn read_notes(&mut self) {
        let mut buffer = [0; 4096];
        loop {
            match sys::read_some(std::io::stdin(), &mut buffer) {
                Ok(ReadSome::Bytes(count)) => {
                    for line in self.notes.push(&buffer[..count]) {
                        self.note(&line);
                    }
                }
                Ok(ReadSome::Nothing) => return,
                Ok(ReadSome::End) | Err(_) => {
                    let _ = epoll::delete(&self.epoll, std::io::stdin());
                    self.image_init_runs();
                    return;
                }
            }
        }
    }

    fn note(&mut self, line: &[u8]) {
        let line = String::from_utf8_lossy(line);
        let (kind, text) = line.split_once(' ').unwrap_or((&line, ""));
        use crate::init::note;
        match kind {
            note::INIT => self.state.reached_at(GuestStage::Init, text),
            note::IMAGE_INIT => self.state.reached_at(GuestStage::ImageInit, text),
            note::SSHD => self.state.has_sshd = text == "yes",
            note::WARNING => self.state.warn(text),
            note::FATAL => {
                self.state.warn(text);
                self.state.say(FromGuest::Bye {
                    end: GuestEnd::Poweroff,
                });
                self.flush_wholly();
                // PID 1 waits for this and powers off.
                std::process::exit(0);
            }
            _ => {}
        }
    }

    /// PID 1's end of the pipe was closed by its exec.
    fn image_init_runs(&mut self) {
        self.state.image_init_runs(Instant::now());
        self.shutdown = ending::watch_systemd_shutdown();
        if let Some(shutdown) = &self.shutdown {
            let _ = self.watch(shutdown.as_fd(), SHUTDOWN, epoll::EventFlags::IN);
        }
    }

    fn read_channel(&mut self, flags: epoll::EventFlags) {
        let Some(channel) = &mut self.channel else {
            return;
        };
        let told = match channel.receive(flags) {
            Ok(told) => told,
            Err(_) => {
                self.channel = None;
                self.retry_later();
                return;
            }
        };
        if told.connected_again {
            self.state.say_all_again();
        }
        for message in told.messages {
            match message {
                Ok(ToGuest::Ping) => {
                    // Whoever asks may have connected between two looks at the port.
                    self.state.say_all_again();
                    self.state.say(FromGuest::Pong);
                }
                Ok(ToGuest::SetClock { unix_ns }) => {
                    if let Err(error) = ending::set_clock(unix_ns) {
                        self.state.warn(&format!("cannot set the clock: {error}"));
                    }
                }
                Ok(ToGuest::Poweroff) => self.power_off(),
                Err(error) => self.state.warn(&error),
            }
        }
    }

    fn power_off(&mut self) {
        self.state.asked_to_power_off = true;
        let now = Instant::now();
        let (_, limit) = self.ask_again.take().unwrap_or((now, now + ASK_LIMIT));
        match ending::ask_init_to_power_off() {
            ending::Asked::Init => {}
            ending::Asked::NotYet if now < limit => {
                self.ask_again = Some((now + ASK_AGAIN, limit));
            }
            ending::Asked::NotYet | ending::Asked::Nobody => {
                let end = GuestEnd::Poweroff;
                self.state.say(FromGuest::Bye { end });
                self.flush_wholly();
                ending::power_off_without_init();
            }
            ending::Asked::Failed(error) => {
                self.state
                    .warn(&format!("cannot ask init to power off: {error}"));
            }
        }
    }

    /// Something was opened beside systemd's programs; if PID 1 is `systemd-shutdown` now, the guest ends.
    fn shutdown_program_opened(&mut self) {
        let Some(shutdown) = &self.shutdown else {
            return;
        };
        if !ending::opened_systemd_shutdown(shutdown) {
            return;
        }
        let Some(end) = ending::verb_of_systemd_shutdown() else {
            return;
        };
        self.shutdown = None;
        self.state.say(FromGuest::Bye { end });
        // From now on mounts go; as soon as nobody writes to the overlay any more it is made clean.
        if let Ok(mounts) = std::fs::File::open("/proc/self/mountinfo")
            && self
                .watch(
                    mounts.as_fd(),
                    MOUNTS,
                    epoll::EventFlags::PRI | epoll::EventFlags::ET,
                )
                .is_ok()
        {
            self.mounts = Some(mounts);
        }
    }

    /// An init that sends SIGTERM to everything ends the guest.
    fn terminated(&mut self) -> io::Result<()> {
        let end = match ending::verb_of_systemd_shutdown() {
            Some(end) => end,
            None if self.state.asked_to_power_off => GuestEnd::Poweroff,
            None => GuestEnd::Unknown,
        };
        self.state.say(FromGuest::Bye { end });
        self.flush_wholly();
        ending::overlay_read_only();
        Ok(())
    }

    /// Says everything, waiting for the host for a moment.
    fn flush_wholly(&mut self) {
        let deadline = Instant::now() + FLUSH_LIMIT;
        loop {
            let now = Instant::now();
            if self.channel.is_none() && self.reconnect_at.is_some_and(|at| at <= now) {
                self.connect();
            }
            self.flush();
            let done = self.channel.as_ref().is_some_and(Channel::is_flushed);
            if done || now >= deadline {
                return;
            }
            let next = self
                .reconnect_at
                .filter(|_| self.channel.is_none())
                .unwrap_or(deadline);
            let left = next.min(deadline).saturating_duration_since(now);
            let Ok(left) = Timespec::try_from(left) else {
                return;
            };
            let (fd, flags) = match (&self.channel, &self.devices) {
                (Some(channel), _) => (channel.as_fd(), rustix::event::PollFlags::OUT),
                (None, Some(devices)) => (devices.as_fd(), rustix::event::PollFlags::IN),
                (None, None) => return,
            };
            let mut fds = [rustix::event::PollFd::from_borrowed_fd(fd, flags)];
            let polled = rustix::event::poll(&mut fds, Some(&left));
            // A port without a host hangs up at once and for good.
            let hung_up = fds[0].revents().contains(rustix::event::PollFlags::HUP);
            if polled.is_err() || hung_up {
                return;
            }
            if self.channel.is_none() {
                self.reconnect_at = Some(Instant::now());
                if let Some(devices) = &self.devices {
                    uevents::drain(devices);
                }
            }
        }
    }
}
