//! Messages with descriptors over a `SOCK_SEQPACKET` Unix socket whose path may be of any length.

use crate::exec::timespec;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::sockopt::Timeout;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use std::ffi::OsString;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// The most descriptors in one message.
pub const MAX_DESCRIPTORS: usize = 8;

/// A socket's place: the directory, held open, and the name in it.
#[derive(Debug)]
pub struct Place {
    /// The directory.
    pub directory: OwnedFd,
    /// The name in it.
    pub name: OsString,
}

impl Place {
    /// Opens the directory of `path`.
    ///
    /// # Errors
    /// There is no such directory, or `path` names no file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let name = path.file_name().ok_or(Errno::INVAL)?.to_owned();
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(parent, flags, Mode::empty())?;
        Ok(Self { directory, name })
    }

    /// The socket's address: short however long the path is, but good only in this process.
    ///
    /// # Errors
    /// The name alone is too long.
    pub fn address(&self) -> io::Result<SocketAddrUnix> {
        let path = Path::new("/proc/self/fd")
            .join(self.directory.as_raw_fd().to_string())
            .join(&self.name);
        Ok(SocketAddrUnix::new(path)?)
    }
}

/// A new socket with room for the longest message that this machine allows.
///
/// # Errors
/// The process has no descriptors left.
pub fn socket() -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    widen(&socket);
    Ok(socket)
}

/// Allows messages as long as this machine allows.
pub fn widen(socket: impl AsFd) {
    // Limited by `net.core.wmem_max`; what is longer fails to send with a clear error.
    let _ = rustix::net::sockopt::set_socket_send_buffer_size(
        socket.as_fd(),
        crate::op::MAX_MESSAGE_BYTES,
    );
}

/// Sends a request over a connection of its own, and answers with the reply, all within `limit`.
///
/// # Errors
/// Nobody listens at `place`, or it hung up without a word ([`io::ErrorKind::UnexpectedEof`]), or took too long.
pub fn exchange(
    place: &Place,
    message: &[u8],
    descriptors: &[BorrowedFd<'_>],
    limit: Duration,
) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let deadline = Some(Instant::now() + limit);
    let connection = socket()?;
    // A listener that is stopped, and whose queue is full, would else be waited for without end.
    rustix::net::sockopt::set_socket_timeout(&connection, Timeout::Send, Some(limit))?;
    rustix::net::connect(&connection, &place.address()?)?;
    // Who turns its clients away says so and hangs up, before it has read anything.
    let sent = send(&connection, message, descriptors);
    if !matches!(&sent, Err(error) if is_hung_up(error)) {
        sent?;
    }
    let received = match receive(&connection, deadline) {
        // The kernel tells of this first, and then hands out what was said.
        Err(error) if is_hung_up(&error) => receive(&connection, deadline),
        received => received,
    };
    received?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Whether the other side is there no more.
pub(crate) fn is_hung_up(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

/// Sends one message.
///
/// # Errors
/// The other side is gone, or the message is too long.
pub fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Errno::TOOBIG.into());
    }
    let sent = rustix::net::sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    if sent != bytes.len() {
        return Err(Errno::MSGSIZE.into());
    }
    Ok(())
}

/// Receives one message; nothing at the other side's end.
///
/// # Errors
/// The deadline passed ([`io::ErrorKind::TimedOut`]), or the message, or its descriptors, did not fit.
pub fn receive(
    socket: impl AsFd,
    deadline: Option<Instant>,
) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let socket = socket.as_fd();
    wait_readable(socket, deadline)?;
    let mut bytes = vec![0; crate::op::MAX_MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut descriptors = Vec::new();
    for part in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            descriptors.extend(received);
        }
    }
    if message
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(Errno::MSGSIZE.into());
    }
    if message.bytes == 0 {
        return Ok(None);
    }
    bytes.truncate(message.bytes);
    Ok(Some((bytes, descriptors)))
}

/// Waits until there is something to read.
fn wait_readable(socket: BorrowedFd<'_>, deadline: Option<Instant>) -> io::Result<()> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let limit = left.map(timespec);
        match poll(&mut [PollFd::new(&socket, PollFlags::IN)], limit.as_ref()) {
            Ok(0) if left == Some(Duration::ZERO) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_that_hears_nobody_out_is_not_waited_for_without_end() {
        let folder = tempfile::tempdir().unwrap();
        let place = Place::open(&folder.path().join("deaf.sock")).unwrap();
        let listener = socket().unwrap();
        rustix::net::bind(&listener, &place.address().unwrap()).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        // The first of them come into its queue, where nobody answers; the last not even there.
        let kinds = [(); 4].map(|()| {
            let asked = exchange(&place, b"hello", &[], Duration::from_millis(20));
            asked.unwrap_err().kind()
        });
        assert_eq!(kinds[0], io::ErrorKind::TimedOut);
        assert_eq!(kinds[3], io::ErrorKind::WouldBlock);
    }
}
