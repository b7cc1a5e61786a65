//! The shim's own socket: clients ask, and are told.

use super::channel::{Input, Lines, Outbox, read};
use crate::protocol::{Command, Event, FromShim, Reply, Status};
use rustix::net::SocketFlags;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

const MAX_CLIENTS: usize = 16;
const MAX_LINE_BYTES: usize = 4096;
/// A client that lets more than this pile up, beyond what its socket holds, is dropped.
const MAX_OUT_BYTES: usize = 64 * 1024;
/// How long something may wait for a client to read it.
const STALL_LIMIT: Duration = Duration::from_secs(10);

struct Client {
    key: u64,
    socket: OwnedFd,
    lines: Lines,
    out: Outbox,
    /// It has not been told the newest status yet.
    behind: bool,
    stalled: Option<Instant>,
    dead: bool,
}

impl Client {
    fn send(&mut self, message: &FromShim) {
        let Ok(mut line) = serde_json::to_vec(message) else {
            return;
        };
        line.push(b'\n');
        self.dead |= self.out.send(&self.socket, &line).is_err();
    }

    /// Tells it the status if it lags behind and has read all else, so that statuses never pile up.
    fn catch_up(&mut self, status: &Status, changed: bool) {
        if self.dead || self.out.flush(&self.socket).is_err() {
            self.dead = true;
            return;
        }
        if self.behind && self.out.is_empty() {
            self.behind = false;
            self.send(&FromShim::Status(status.clone()));
            if changed {
                self.send(&FromShim::Event(Event::Changed));
            }
        }
        if self.out.is_empty() {
            self.stalled = None;
        } else {
            let since = *self.stalled.get_or_insert_with(Instant::now);
            self.dead |= since.elapsed() >= STALL_LIMIT;
        }
    }
}

/// All clients.
pub(super) struct Clients {
    listener: OwnedFd,
    clients: Vec<Client>,
    next_key: u64,
}

impl Clients {
    pub(super) fn new(listener: OwnedFd) -> Self {
        Self {
            listener,
            clients: Vec::new(),
            next_key: 1,
        }
    }

    pub(super) fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Each client's key, its socket, and whether to wait for room to write.
    pub(super) fn interests(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>, bool)> {
        self.clients
            .iter()
            .map(|client| (client.key, client.socket.as_fd(), !client.out.is_empty()))
    }

    /// When a stalled client is to be dropped.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.clients
            .iter()
            .filter_map(|client| client.stalled)
            .min()
            .map(|since| since + STALL_LIMIT)
    }

    pub(super) fn accept(&mut self, status: &Status) {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let Ok(socket) = rustix::net::accept_with(&self.listener, flags) else {
            return;
        };
        if self.clients.len() >= MAX_CLIENTS {
            return;
        }
        let mut client = Client {
            key: self.next_key,
            socket,
            lines: Lines::new(MAX_LINE_BYTES),
            out: Outbox::new(MAX_OUT_BYTES),
            behind: true,
            stalled: None,
            dead: false,
        };
        self.next_key += 1;
        client.catch_up(status, false);
        self.clients.push(client);
    }

    /// The commands that client `key` sent. One that sends anything else is dropped.
    pub(super) fn read(&mut self, key: u64) -> Vec<Command> {
        let Some(client) = self.clients.iter_mut().find(|client| client.key == key) else {
            return Vec::new();
        };
        let mut buffer = [0; 4096];
        let length = match read(&client.socket, &mut buffer) {
            Input::Bytes(length) => length,
            Input::Empty => return Vec::new(),
            Input::End => {
                client.dead = true;
                return Vec::new();
            }
        };
        let mut commands = Vec::new();
        for line in client.lines.push(&buffer[..length]) {
            match line
                .ok()
                .and_then(|line| serde_json::from_slice(&line).ok())
            {
                Some(command) => commands.push(command),
                None => client.dead = true,
            }
        }
        commands
    }

    pub(super) fn reply(&mut self, key: u64, id: u64, result: Result<(), String>) {
        if let Some(client) = self.clients.iter_mut().find(|client| client.key == key) {
            client.send(&FromShim::Reply(Reply {
                id,
                error: result.err(),
            }));
        }
    }

    pub(super) fn tell(&mut self, event: &Event) {
        let event = FromShim::Event(event.clone());
        for client in &mut self.clients {
            client.send(&event);
        }
    }

    /// Sends what can be sent, the status with it if it changed, and drops the clients that are gone.
    pub(super) fn catch_up(&mut self, status: &Status, changed: bool) {
        for client in &mut self.clients {
            client.behind |= changed;
            client.catch_up(status, true);
        }
        self.clients.retain(|client| !client.dead);
    }
}
