//! The socket at which `banger-helper` hears the machine's users: handed over by systemd, or made here.

use banger_host::net::seqpacket::{self, Place};
use rustix::fd::{FromRawFd, OwnedFd, RawFd};
use rustix::fs::{AtFlags, Mode};
use rustix::io::{Errno, FdFlags};
use rustix::net::{AddressFamily, SocketType};
use std::io;
use std::path::{Path, PathBuf};

/// The first descriptor that systemd hands over.
const FIRST: RawFd = 3;
const BACKLOG: i32 = 128;

/// There is no socket to listen at.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// Neither systemd nor the command line named one.
    #[error("no socket: start it by `banger-helper.socket`, or with `--listen PATH`")]
    None,
    /// What systemd handed over is something else.
    #[error("the socket that was handed over is not one of `ListenSequentialPacket=`")]
    Wrong,
    /// It could not be made.
    #[error("cannot listen at `{}`", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The socket that systemd handed to this very process, by the words of its environment. Only once, and before
/// anything else is opened.
///
/// # Errors
/// There is none, or it is of another kind.
pub fn handed_over(
    listen_pid: Option<&str>,
    listen_fds: Option<&str>,
) -> Result<OwnedFd, DoorError> {
    let own = rustix::process::getpid().as_raw_nonzero().to_string();
    if listen_pid != Some(own.as_str()) {
        return Err(DoorError::None);
    }
    if listen_fds != Some("1") {
        return Err(DoorError::Wrong);
    }
    #[expect(unsafe_code, reason = "a descriptor that comes with the process")]
    // SAFETY: systemd says that this descriptor is this process's, and nobody else here knows of it.
    let socket = unsafe { OwnedFd::from_raw_fd(FIRST) };
    let is_ours = rustix::net::sockopt::socket_domain(&socket) == Ok(AddressFamily::UNIX)
        && rustix::net::sockopt::socket_type(&socket) == Ok(SocketType::SEQPACKET)
        && rustix::net::sockopt::socket_acceptconn(&socket) == Ok(true);
    if !is_ours || rustix::io::fcntl_setfd(&socket, FdFlags::CLOEXEC).is_err() {
        return Err(DoorError::Wrong);
    }
    Ok(socket)
}

/// Listens at `path`, for everybody, in place of a socket that nobody serves any more.
///
/// # Errors
/// Somebody listens there, or the folder cannot be written.
pub fn listen(path: &Path) -> Result<OwnedFd, DoorError> {
    listen_at(path).map_err(|source| DoorError::Listen {
        path: path.to_owned(),
        source,
    })
}

fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let place = Place::open(path)?;
    let address = place.address()?;
    match rustix::net::connect(seqpacket::socket()?, &address) {
        Ok(()) => return Err(Errno::ADDRINUSE.into()),
        Err(Errno::CONNREFUSED) => {
            rustix::fs::unlinkat(&place.directory, &place.name, AtFlags::empty())?;
        }
        // Nothing there; anything else is for `bind` to say.
        Err(_) => {}
    }
    let listener = seqpacket::socket()?;
    let before = rustix::process::umask(Mode::empty());
    let bound = rustix::net::bind(&listener, &address);
    rustix::process::umask(before);
    bound?;
    rustix::net::listen(&listener, BACKLOG)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_meant_for_this_process_is_taken() {
        let own = std::process::id().to_string();
        let other = (std::process::id() + 1).to_string();
        for (pid, fds) in [
            (None, None),
            (None, Some("1")),
            (Some(other.as_str()), Some("1")),
        ] {
            assert!(matches!(handed_over(pid, fds), Err(DoorError::None)));
        }
        for fds in [None, Some("0"), Some("2"), Some("x")] {
            assert!(matches!(
                handed_over(Some(&own), fds),
                Err(DoorError::Wrong)
            ));
        }
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_served_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("helper.sock");
        let served = listen(&path).unwrap();
        assert!(listen(&path).is_err());
        drop(served);
        let _again = listen(&path).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &std::fs::metadata(&path).unwrap().permissions(),
        );
        assert_eq!(mode & 0o777, 0o777);
    }
}
