//! The line to the host: a virtio-serial port by its name, else vsock.

use super::protocol::{self, Lines};
use crate::sys::{self, ReadSome, VsockAddr};
use banger_guest::agent_protocol::{FromGuest, PORT_NAME, ToGuest, VSOCK_PORT};
use rustix::event::epoll::EventFlags;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};
use std::io;
use std::path::Path;
use std::time::Duration;

/// The first and the longest pause before connecting again.
pub(crate) const FIRST_BACKOFF: Duration = Duration::from_millis(20);
pub(crate) const LAST_BACKOFF: Duration = Duration::from_secs(2);
/// What may wait for a slow host; a host that lets more pile up has lost it.
const UNSENT_BYTES: usize = 256 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Stays open whether or not a host is connected.
    Port,
    /// Is one connection.
    Vsock,
}

/// What the host told.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// A host connected that may be another one than before.
    pub(crate) connected_again: bool,
    /// Its messages, or why they cannot be read.
    pub(crate) messages: Vec<Result<ToGuest, String>>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Channel {
    fd: OwnedFd,
    kind: Kind,
    hung_up: bool,
    lines: Lines,
    unsent: Vec<u8>,
}

impl Channel {
    /// Connects; `None` if there is no device to connect by.
    pub(crate) fn connect() -> io::Result<Option<Self>> {
        let (fd, kind) = if let Some(device) = port() {
            let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            (open(device, flags, Mode::empty())?, Kind::Port)
        } else if Path::new("/dev/vsock").exists() {
            (connect_vsock()?, Kind::Vsock)
        } else {
            return Ok(None);
        };
        Ok(Some(Self {
            fd,
            kind,
            hung_up: false,
            lines: Lines::default(),
            // Ends what an agent before this one may have begun: the host does not hear from where on it is another's.
            unsent: b"\n".to_vec(),
        }))
    }

    /// Queues a message.
    pub(crate) fn say(&mut self, message: &FromGuest) {
        let line = protocol::encode(message);
        if self.unsent.len() + line.len() <= UNSENT_BYTES {
            self.unsent.extend_from_slice(&line);
        }
    }

    /// Whether nothing is queued.
    pub(crate) fn is_flushed(&self) -> bool {
        self.unsent.is_empty()
    }

    /// Sends what the host takes at present.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match rustix::io::retry_on_intr(|| rustix::io::write(&self.fd, &self.unsent)) {
                Ok(0) => return Ok(()),
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Handles an event: reads all there is. An error means that this connection is over.
    pub(crate) fn receive(&mut self, flags: EventFlags) -> io::Result<Told> {
        let mut told = Told::default();
        if self.kind == Kind::Port {
            let hung_up = flags.contains(EventFlags::HUP);
            told.connected_again = self.hung_up && !hung_up;
            if self.hung_up || hung_up {
                // What was queued was for the host that went; the next one is told everything.
                self.unsent.clear();
                self.lines.clear();
            }
            self.hung_up = hung_up;
        }
        let mut buffer = [0; 4096];
        loop {
            match sys::read_some(&self.fd, &mut buffer)? {
                ReadSome::Bytes(count) => {
                    let lines = self.lines.push(&buffer[..count]);
                    told.messages
                        .extend(lines.iter().map(|line| protocol::decode(line)));
                }
                ReadSome::Nothing => break,
                ReadSome::End if self.kind == Kind::Port => break,
                ReadSome::End => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        Ok(told)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The device of the port with banger's name.
fn port() -> Option<String> {
    std::fs::read_dir("/sys/class/virtio-ports")
        .ok()?
        .filter_map(Result::ok)
        .find(|entry| {
            std::fs::read_to_string(entry.path().join("name"))
                .is_ok_and(|name| name.trim_end() == PORT_NAME)
        })
        .and_then(|entry| entry.file_name().into_string().ok())
        .map(|name| format!("/dev/{name}"))
}

/// Connects to the host's vsock port. The host answers at once or refuses, so this may block.
fn connect_vsock() -> io::Result<OwnedFd> {
    const AF_VSOCK: AddressFamily = AddressFamily::from_raw(40);
    let socket = socket_with(AF_VSOCK, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    connect(&socket, &VsockAddr::host(VSOCK_PORT))?;
    rustix::io::ioctl_fionbio(&socket, true)?;
    Ok(socket)
}
