//! The VMM's control socket: QMP or Firecracker's API behind one face.

use super::channel::{Input, Lines, Outbox, read};
use crate::firecracker::api::{self, Request, Response};
use crate::protocol::Control;
use crate::qemu::qmp;
use crate::socket;
use rustix::io::Errno;
use rustix::net::SocketFlags;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

const MAX_OUT_BYTES: usize = 64 * 1024;
/// The most requests that wait for an answer.
const MAX_PENDING: usize = 64;

/// What a VMM is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    /// Whether it lives.
    Alive,
    Pause,
    Resume,
    /// Press the button that asks the guest to shut down.
    Button,
    /// Write the metrics now. Only of a VMM that has a pipe for them.
    FlushMetrics,
}

/// For whom it is asked: a client and the id of its command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ticket {
    pub(super) client: u64,
    pub(super) id: u64,
}

/// What comes of it.
#[derive(Debug)]
pub(super) enum Notice {
    Done {
        ask: Ask,
        ticket: Option<Ticket>,
        result: Result<(), String>,
    },
    Event(qmp::Event),
    /// The socket is closed; what was asked has failed.
    Lost,
}

struct Pending {
    ask: Ask,
    ticket: Option<Ticket>,
}

impl Pending {
    fn done(self, result: Result<(), String>) -> Notice {
        Notice::Done {
            ask: self.ask,
            ticket: self.ticket,
            result,
        }
    }
}

/// Whether a connection was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Connected {
    Yes,
    /// The socket is not there yet.
    Absent,
    /// It is there, but nobody listens yet.
    Refused,
}

/// The one client of a VMM's control socket.
pub(super) enum Controller {
    Qmp(Qmp),
    Api(Api),
}

impl Controller {
    pub(super) fn new(control: &Control) -> Self {
        match control {
            Control::Qemu { qmp_socket, .. } => Self::Qmp(Qmp {
                path: qmp_socket.clone(),
                socket: None,
                lines: Lines::new(qmp::MAX_LINE_BYTES),
                out: Outbox::new(MAX_OUT_BYTES),
                next_id: 1,
                pending: VecDeque::new(),
            }),
            Control::Firecracker { api_socket, .. } => Self::Api(Api {
                path: api_socket.clone(),
                connection: None,
                queue: VecDeque::new(),
            }),
        }
    }

    /// Connects and asks for a sign of life; to be called again while the answer is not `Yes`.
    pub(super) fn connect(&mut self) -> std::io::Result<Connected> {
        let path = match self {
            Self::Qmp(qmp) => &qmp.path,
            Self::Api(api) => &api.path,
        };
        let socket = match socket::connect(path, SocketFlags::NONBLOCK) {
            Ok(socket) => socket,
            Err(error) => {
                let error = Errno::from_io_error(&error).ok_or(error)?;
                return match error {
                    Errno::NOENT => Ok(Connected::Absent),
                    Errno::CONNREFUSED | Errno::AGAIN => Ok(Connected::Refused),
                    error => Err(error.into()),
                };
            }
        };
        match self {
            // The greeting comes by itself.
            Self::Qmp(qmp) => qmp.socket = Some(socket),
            Self::Api(api) => {
                api.queue.push_back(Pending {
                    ask: Ask::Alive,
                    ticket: None,
                });
                api.begin(socket);
            }
        }
        Ok(Connected::Yes)
    }

    /// The descriptor to poll, and whether to wait for room to write.
    pub(super) fn interest(&self) -> Option<(BorrowedFd<'_>, bool)> {
        match self {
            Self::Qmp(qmp) => Some((qmp.socket.as_ref()?.as_fd(), !qmp.out.is_empty())),
            Self::Api(api) => {
                let connection = api.connection.as_ref()?;
                Some((connection.socket.as_fd(), !connection.out.is_empty()))
            }
        }
    }

    /// Asks. The answer comes as a [`Notice`], at once if it cannot be asked.
    pub(super) fn ask(&mut self, ask: Ask, ticket: Option<Ticket>) -> Vec<Notice> {
        let pending = Pending { ask, ticket };
        match self {
            Self::Qmp(qmp) => qmp.ask(pending),
            Self::Api(api) => api.ask(pending),
        }
    }

    /// Reads and writes what can be read and written.
    pub(super) fn work(&mut self) -> Vec<Notice> {
        match self {
            Self::Qmp(qmp) => qmp.work(),
            Self::Api(api) => api.work(),
        }
    }
}

pub(super) struct Qmp {
    path: PathBuf,
    socket: Option<OwnedFd>,
    lines: Lines,
    out: Outbox,
    next_id: u64,
    pending: VecDeque<(u64, Pending)>,
}

impl Qmp {
    fn ask(&mut self, pending: Pending) -> Vec<Notice> {
        let command = match pending.ask {
            Ask::Alive => "qmp_capabilities",
            Ask::Pause => "stop",
            Ask::Resume => "cont",
            Ask::Button => "system_powerdown",
            Ask::FlushMetrics => {
                return vec![pending.done(Err("QEMU has no metrics".to_owned()))];
            }
        };
        let Some(socket) = &self.socket else {
            return vec![pending.done(Err("QEMU's control socket is closed".to_owned()))];
        };
        if self.pending.len() >= MAX_PENDING {
            return vec![pending.done(Err("QEMU does not answer".to_owned()))];
        }
        let id = self.next_id;
        self.next_id += 1;
        self.pending.push_back((id, pending));
        match self.out.send(socket, &qmp::command(command, id)) {
            Ok(()) => Vec::new(),
            Err(_) => self.lose(),
        }
    }

    fn lose(&mut self) -> Vec<Notice> {
        self.socket = None;
        let mut notices: Vec<Notice> = self
            .pending
            .drain(..)
            .map(|(_, pending)| pending.done(Err("QEMU closed its control socket".to_owned())))
            .collect();
        notices.push(Notice::Lost);
        notices
    }

    fn work(&mut self) -> Vec<Notice> {
        let mut notices = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let Some(socket) = &self.socket else {
                return notices;
            };
            if self.out.flush(socket).is_err() {
                notices.extend(self.lose());
                return notices;
            }
            let length = match read(socket, &mut buffer) {
                Input::Bytes(length) => length,
                Input::Empty => return notices,
                Input::End => {
                    notices.extend(self.lose());
                    return notices;
                }
            };
            for line in self.lines.push(&buffer[..length]) {
                let Some(message) = line.ok().and_then(|line| qmp::parse(&line)) else {
                    continue;
                };
                match message {
                    qmp::Message::Greeting => notices.extend(self.ask(Pending {
                        ask: Ask::Alive,
                        ticket: None,
                    })),
                    qmp::Message::Event(event) => notices.push(Notice::Event(event)),
                    qmp::Message::Answer { id, result } => {
                        let found = self.pending.iter().position(|(sent, _)| Some(*sent) == id);
                        if let Some((_, pending)) = found.and_then(|at| self.pending.remove(at)) {
                            notices.push(pending.done(result.map(drop)));
                        }
                    }
                }
            }
        }
    }
}

struct Connection {
    socket: OwnedFd,
    out: Outbox,
    input: Vec<u8>,
}

/// Each request has a connection of its own, one after the other: the front of the queue is under way.
pub(super) struct Api {
    path: PathBuf,
    connection: Option<Connection>,
    queue: VecDeque<Pending>,
}

impl Api {
    fn ask(&mut self, pending: Pending) -> Vec<Notice> {
        if self.queue.len() >= MAX_PENDING {
            return vec![pending.done(Err("Firecracker does not answer".to_owned()))];
        }
        self.queue.push_back(pending);
        self.next()
    }

    fn begin(&mut self, socket: OwnedFd) {
        let Some(front) = self.queue.front() else {
            return;
        };
        let request = match front.ask {
            Ask::Alive => Request::Describe,
            Ask::Pause => Request::Pause,
            Ask::Resume => Request::Resume,
            Ask::Button => Request::CtrlAltDel,
            Ask::FlushMetrics => Request::FlushMetrics,
        };
        let mut out = Outbox::new(MAX_OUT_BYTES);
        // An error here shows as the end of the connection.
        let _ = out.send(&socket, &request.to_bytes());
        self.connection = Some(Connection {
            socket,
            out,
            input: Vec::new(),
        });
    }

    /// Begins the next request, if none is under way.
    fn next(&mut self) -> Vec<Notice> {
        let mut notices = Vec::new();
        while self.connection.is_none() && !self.queue.is_empty() {
            match socket::connect(&self.path, SocketFlags::NONBLOCK) {
                Ok(socket) => self.begin(socket),
                Err(error) => notices.extend(
                    self.finish(Err(format!("Firecracker's API cannot be reached: {error}"))),
                ),
            }
        }
        notices
    }

    fn finish(&mut self, result: Result<(), String>) -> Option<Notice> {
        self.connection = None;
        Some(self.queue.pop_front()?.done(result))
    }

    fn work(&mut self) -> Vec<Notice> {
        let mut notices = Vec::new();
        let mut buffer = [0; 4096];
        while let Some(connection) = &mut self.connection {
            let mut outcome = None;
            if connection.out.flush(&connection.socket).is_err() {
                outcome = Some(Err("Firecracker closed the connection".to_owned()));
            } else {
                match read(&connection.socket, &mut buffer) {
                    Input::Empty => return notices,
                    Input::End => {
                        outcome = Some(Err("Firecracker closed the connection".to_owned()));
                    }
                    Input::Bytes(length) => {
                        connection.input.extend_from_slice(&buffer[..length]);
                        match Response::parse(&connection.input) {
                            Ok(None) if connection.input.len() <= 2 * api::MAX_RESPONSE_BYTES => {}
                            Ok(None) => outcome = Some(Err("its answer is too long".to_owned())),
                            Ok(Some(response)) => outcome = Some(response.outcome()),
                            Err(error) => outcome = Some(Err(error.to_string())),
                        }
                    }
                }
            }
            if let Some(result) = outcome {
                notices.extend(self.finish(result));
                notices.extend(self.next());
            }
        }
        notices
    }
}
