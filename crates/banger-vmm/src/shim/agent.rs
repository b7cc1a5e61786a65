//! The channel to the guest's agent. Nothing that comes from it is believed.

use super::channel::{Input, Lines, Outbox, read};
use crate::protocol::Control;
use crate::socket;
use banger_guest::agent_protocol::{FromGuest, MAX_LINE_BYTES, ToGuest, VSOCK_PORT};
use rustix::net::SocketFlags;
use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

const MAX_OUT_BYTES: usize = 16 * 1024;
/// The most bytes that are read in one turn, so that a chatty guest keeps nobody else waiting.
const TURN_BYTES: usize = 16 * 1024;

/// What comes over the channel.
#[derive(Debug)]
pub(super) enum Heard {
    Message(FromGuest),
    /// A line that is no message.
    Malformed,
    /// The connection is closed.
    Closed,
}

/// The channel.
pub(super) struct Agent {
    /// Under Firecracker the guest connects to us.
    listener: Option<OwnedFd>,
    socket: Option<OwnedFd>,
    lines: Lines,
    out: Outbox,
    path: PathBuf,
}

/// Where Firecracker connects to when its guest connects to the agent's port.
fn vsock_listener_path(vsock_socket: &Path) -> PathBuf {
    let mut path = OsString::from(vsock_socket);
    path.push(format!("_{VSOCK_PORT}"));
    path.into()
}

impl Agent {
    /// Prepares the channel: listens where the guest connects to us. To be done before the VMM starts.
    pub(super) fn prepare(control: &Control) -> std::io::Result<Self> {
        let (path, listener) = match control {
            Control::Qemu { agent_socket, .. } => (agent_socket.clone(), None),
            Control::Firecracker { vsock_socket, .. } => {
                let path = vsock_listener_path(vsock_socket);
                let listener = socket::listen(&path)?;
                (path, Some(listener))
            }
        };
        Ok(Self {
            listener,
            socket: None,
            lines: Lines::new(MAX_LINE_BYTES),
            out: Outbox::new(MAX_OUT_BYTES),
            path,
        })
    }

    /// The socket that the channel uses on the host.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Connects to the VMM, where it is the one that listens.
    pub(super) fn connect(&mut self) -> std::io::Result<()> {
        if self.listener.is_none() {
            self.socket = Some(socket::connect(&self.path, SocketFlags::NONBLOCK)?);
        }
        Ok(())
    }

    pub(super) fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.listener.as_ref().map(AsFd::as_fd)
    }

    pub(super) fn interest(&self) -> Option<(BorrowedFd<'_>, bool)> {
        Some((self.socket.as_ref()?.as_fd(), !self.out.is_empty()))
    }

    /// Takes a connection of the guest. Any user of a guest may connect: whoever came first is the agent while it
    /// stays, and others are turned away.
    pub(super) fn accept(&mut self) {
        let Some(listener) = &self.listener else {
            return;
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        if let Ok(socket) = rustix::net::accept_with(listener, flags)
            && self.socket.is_none()
        {
            self.reset();
            self.socket = Some(socket);
        }
    }

    /// Another connection: begin anew.
    fn reset(&mut self) {
        self.lines.clear();
        self.forget_unsent();
    }

    /// The guest opened its end anew though the connection to the VMM stays: what was not sent was for another agent.
    /// A line that one had begun, the next one ends, since each begins with an empty line.
    pub(super) fn forget_unsent(&mut self) {
        self.out = Outbox::new(MAX_OUT_BYTES);
    }

    /// Reads and writes what can be read and written now.
    pub(super) fn work(&mut self) -> Vec<Heard> {
        let mut heard = Vec::new();
        let mut buffer = [0; 4096];
        let mut total = 0;
        while let Some(socket) = &self.socket {
            if self.out.flush(socket).is_err() {
                self.close(&mut heard);
                break;
            }
            match read(socket, &mut buffer) {
                Input::Empty => break,
                Input::End => self.close(&mut heard),
                Input::Bytes(length) => {
                    let lines = self.lines.push(&buffer[..length]).into_iter();
                    let told = lines.filter(|line| line != &Ok(Vec::new()));
                    heard.extend(told.map(|line| {
                        line.ok()
                            .and_then(|line| serde_json::from_slice(&line).ok())
                            .map_or(Heard::Malformed, Heard::Message)
                    }));
                    total += length;
                    if total >= TURN_BYTES {
                        break;
                    }
                }
            }
        }
        heard
    }

    fn close(&mut self, heard: &mut Vec<Heard>) {
        self.socket = None;
        self.reset();
        heard.push(Heard::Closed);
    }

    /// Says something to the agent; false if it cannot be sent.
    pub(super) fn say(&mut self, message: &ToGuest) -> bool {
        let Some(socket) = &self.socket else {
            return false;
        };
        let Ok(mut line) = serde_json::to_vec(message) else {
            return false;
        };
        line.push(b'\n');
        self.out.send(socket, &line).is_ok()
    }
}
