//! Waiting for devices: the kernel's own announcements, never a sleep.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};
use std::io;
use std::time::{Duration, Instant};

/// A non-blocking socket that reads one message for every device that comes, changes or goes.
pub(crate) fn socket() -> io::Result<OwnedFd> {
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        Some(KOBJECT_UEVENT),
    )?;
    bind(&socket, &SocketAddrNetlink::new(0, 1))?;
    Ok(socket)
}

/// Throws away what has been announced.
pub(crate) fn drain(socket: &OwnedFd) {
    let mut buffer = [0; 8192];
    // A full socket buffer is reported once as ENOBUFS; what follows is looked at by the caller anyway.
    while recv(socket, &mut buffer, RecvFlags::DONTWAIT).is_ok() {}
}

/// Waits until `find` finds something, looking again after every announcement, at most for `limit`.
pub(crate) fn wait_for<T>(limit: Duration, mut find: impl FnMut() -> Option<T>) -> Option<T> {
    if let Some(found) = find() {
        return Some(found);
    }
    let socket = socket().ok()?;
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = find() {
            return Some(found);
        }
        let left = deadline.checked_duration_since(Instant::now())?;
        let timeout = Timespec::try_from(left).ok()?;
        let mut fds = [PollFd::new(&socket, PollFlags::IN)];
        if matches!(poll(&mut fds, Some(&timeout)), Ok(0)) {
            return find();
        }
        drain(&socket);
    }
}
