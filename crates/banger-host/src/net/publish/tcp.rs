//! Connections, carried both ways by one thread.

use super::Figures;
use crate::exec::timespec;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use std::io::{self, PipeReader, Read, Write};
use std::net::{Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The most at a time; whoever comes then waits in the listener's queue.
const MAX_CONNECTIONS: usize = 256;
/// What is on its way in one direction of a connection, in bytes.
const BUFFER_BYTES: usize = 32 * 1024;
/// How long a guest may take to accept.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// How long a connection that one side has ended may be silent.
const HALF_OPEN_LIMIT: Duration = Duration::from_secs(300);
/// A side that is gone is found out after 15 minutes of silence: long enough for a VM that is paused for a while.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(600);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(60);
const KEEPALIVE_COUNT: u32 = 5;
/// How long nobody is accepted after the process ran out of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);

pub(super) struct Forwarder {
    listener: TcpListener,
    guest: SocketAddrV4,
    figures: Arc<Figures>,
    connections: Vec<Connection>,
    paused_until: Option<Instant>,
}

impl Forwarder {
    pub(super) fn new(listener: TcpListener, guest: SocketAddrV4, figures: Arc<Figures>) -> Self {
        Self {
            listener,
            guest,
            figures,
            connections: Vec::new(),
            paused_until: None,
        }
    }

    /// Works until the other end of `stopped` is closed.
    pub(super) fn run(mut self, stopped: &PipeReader) {
        while let Ok(ready) = self.wait(stopped) {
            let now = Instant::now();
            for (connection, ready) in self.connections.iter_mut().zip(ready.connections) {
                if ready {
                    connection.step(now);
                } else if connection.is_overdue(now) {
                    connection.state = State::Over;
                }
            }
            let failed = self
                .connections
                .extract_if(.., |one| one.state == State::Failed);
            failed.for_each(|one| {
                self.figures.failed();
                reset(&one.client);
            });
            self.connections.retain(|one| one.state != State::Over);
            if ready.listener {
                self.accept();
            }
            self.figures.now(self.connections.len());
        }
    }

    /// Waits for something to do; an error is the end.
    fn wait(&self, stopped: &PipeReader) -> io::Result<Ready> {
        let now = Instant::now();
        let paused = self.paused_until.filter(|until| *until > now);
        let listens = paused.is_none() && self.connections.len() < MAX_CONNECTIONS;
        let mut fds = vec![PollFd::new(stopped, PollFlags::IN)];
        if listens {
            fds.push(PollFd::new(&self.listener, PollFlags::IN));
        }
        // Where each connection's begin: a side that nothing is wanted of is left out, as its end would be told again
        // and again.
        let mut first = Vec::with_capacity(self.connections.len() + 1);
        for connection in &self.connections {
            first.push(fds.len());
            for (socket, events) in connection.interests() {
                if !events.is_empty() {
                    fds.push(PollFd::new(socket, events));
                }
            }
        }
        first.push(fds.len());
        let deadlines = self.connections.iter().filter_map(Connection::deadline);
        let deadline = deadlines.chain(paused).min();
        let limit = deadline.map(|at| timespec(at.saturating_duration_since(now)));
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        if ready(&fds[0]) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(Ready {
            listener: listens && ready(&fds[1]),
            connections: first
                .windows(2)
                .map(|range| fds[range[0]..range[1]].iter().any(ready))
                .collect(),
        })
    }

    fn accept(&mut self) {
        while self.connections.len() < MAX_CONNECTIONS {
            match self.listener.accept() {
                Ok((client, _)) => match Connection::open(client, self.guest) {
                    Ok(connection) => {
                        self.connections.push(connection);
                        self.figures.began(self.connections.len());
                    }
                    Err(client) => {
                        self.figures.failed();
                        reset(&client);
                    }
                },
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::INTR | Errno::CONNABORTED) => {}
                    Some(Errno::AGAIN) => return,
                    // Out of something that comes back.
                    _ => {
                        self.paused_until = Some(Instant::now() + PAUSE);
                        return;
                    }
                },
            }
        }
    }
}

/// What has something to do.
struct Ready {
    listener: bool,
    connections: Vec<bool>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// The guest has until then to accept.
    Connecting(Instant),
    Open,
    /// The guest cannot be reached.
    Failed,
    Over,
}

struct Connection {
    client: TcpStream,
    guest: TcpStream,
    state: State,
    forth: Direction,
    back: Direction,
    last_word: Instant,
}

impl Connection {
    /// Begins to connect to the guest; if that cannot be, the client comes back.
    fn open(client: TcpStream, guest: SocketAddrV4) -> Result<Self, TcpStream> {
        let now = Instant::now();
        match prepare(&client).and_then(|()| begin(guest)) {
            Ok(guest) => Ok(Self {
                client,
                guest,
                state: State::Connecting(now + CONNECT_LIMIT),
                forth: Direction::default(),
                back: Direction::default(),
                last_word: now,
            }),
            Err(_) => Err(client),
        }
    }

    fn interests(&self) -> [(&TcpStream, PollFlags); 2] {
        if let State::Connecting(_) = self.state {
            return [
                (&self.client, PollFlags::empty()),
                (&self.guest, PollFlags::OUT),
            ];
        }
        let of = |from: &Direction, to: &Direction| {
            let mut events = PollFlags::empty();
            events.set(PollFlags::IN, from.has_room());
            events.set(PollFlags::OUT, to.has_data());
            events
        };
        [
            (&self.client, of(&self.forth, &self.back)),
            (&self.guest, of(&self.back, &self.forth)),
        ]
    }

    fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Connecting(until) => Some(until),
            State::Open if self.forth.ended || self.back.ended => {
                Some(self.last_word + HALF_OPEN_LIMIT)
            }
            State::Open => None,
            State::Failed | State::Over => Some(self.last_word),
        }
    }

    fn is_overdue(&mut self, now: Instant) -> bool {
        let overdue = self.deadline().is_some_and(|deadline| deadline <= now);
        if overdue && matches!(self.state, State::Connecting(_)) {
            self.state = State::Failed;
            return false;
        }
        overdue
    }

    fn step(&mut self, now: Instant) {
        if let State::Connecting(_) = self.state {
            self.state = match self.guest.take_error() {
                Ok(None) => State::Open,
                Ok(Some(_)) | Err(_) => State::Failed,
            };
        }
        if self.state != State::Open {
            return;
        }
        let forth = self.forth.carry(&self.client, &self.guest);
        let back = self.back.carry(&self.guest, &self.client);
        match (forth, back) {
            (Ok(forth), Ok(back)) => {
                if forth || back {
                    self.last_word = now;
                }
                if self.forth.closed && self.back.closed {
                    self.state = State::Over;
                }
            }
            // One side broke it off, so the other side hears that it was broken off.
            _ => {
                reset(&self.client);
                reset(&self.guest);
                self.state = State::Over;
            }
        }
    }
}

/// What one side says to the other.
#[derive(Default)]
struct Direction {
    buffer: Vec<u8>,
    sent: usize,
    /// The one has said its last word.
    ended: bool,
    /// The other has been told.
    closed: bool,
}

impl Direction {
    fn has_data(&self) -> bool {
        self.sent < self.buffer.len()
    }

    fn has_room(&self) -> bool {
        !self.ended && !self.has_data()
    }

    /// Reads once if all was passed on, and passes on what can be; says whether anything moved.
    fn carry(&mut self, mut from: &TcpStream, mut to: &TcpStream) -> io::Result<bool> {
        let mut moved = false;
        if self.has_room() {
            self.buffer.resize(BUFFER_BYTES, 0);
            self.sent = 0;
            let read = attempt(|| from.read(&mut self.buffer));
            self.buffer
                .truncate(read.as_ref().map_or(0, |read| read.unwrap_or(0)));
            match read? {
                Some(0) => self.ended = true,
                Some(_) => moved = true,
                None => {}
            }
        }
        while self.has_data() {
            match attempt(|| to.write(&self.buffer[self.sent..]))? {
                Some(written) => self.sent += written,
                None => break,
            }
            moved = true;
        }
        if self.ended && !self.has_data() && !self.closed {
            self.closed = true;
            self.buffer = Vec::new();
            self.sent = 0;
            to.shutdown(Shutdown::Write)?;
        }
        Ok(moved)
    }
}

/// Nothing if it would have to wait.
fn attempt(work: impl FnOnce() -> io::Result<usize>) -> io::Result<Option<usize>> {
    match work() {
        Ok(count) => Ok(Some(count)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
        Err(error) => Err(error),
    }
}

fn prepare(socket: &TcpStream) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    socket.set_nodelay(true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(socket, KEEPALIVE_COUNT)?;
    Ok(())
}

fn begin(guest: SocketAddrV4) -> io::Result<TcpStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    let socket = TcpStream::from(socket);
    prepare(&socket)?;
    match rustix::net::connect(&socket, &guest) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}

/// From now on closing it tells the other side that the connection broke.
fn reset(socket: &TcpStream) {
    let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}
