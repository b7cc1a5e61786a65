//! Sockets by folder and name, so that the length of a path does not matter.
//!
//! `sun_path` has room for 107 bytes; `/proc/self/fd/N/NAME` always fits.

use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// How many may wait to be taken; the kernel refuses the next one. It has its own, mostly higher, limit.
const BACKLOG: i32 = 1024;

fn folder_of(path: &Path) -> io::Result<(OwnedFd, PathBuf)> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(folder, flags, Mode::empty())?;
    let short = Path::new("/proc/self/fd")
        .join(folder.as_raw_fd().to_string())
        .join(name);
    Ok((folder, short))
}

fn stream(flags: SocketFlags) -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        flags | SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Listens at `path` (mode 0600, not blocking), in place of a socket that was left there.
pub fn listen(path: &Path) -> io::Result<OwnedFd> {
    remove(path)?;
    let (folder, short) = folder_of(path)?;
    let socket = stream(SocketFlags::NONBLOCK)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(&short)?)?;
    // Nobody can connect before `listen`, so the mode is never too wide.
    rustix::fs::chmod(&short, Mode::RUSR | Mode::WUSR)?;
    rustix::net::listen(&socket, BACKLOG)?;
    drop(folder);
    Ok(socket)
}

/// Connects to `path`; the connection does not block if `flags` say so.
pub fn connect(path: &Path, flags: SocketFlags) -> io::Result<OwnedFd> {
    let (_folder, short) = folder_of(path)?;
    let socket = stream(flags)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(&short)?)?;
    Ok(socket)
}

/// Removes the socket at `path`, if there is one.
pub fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_in_a_very_long_folder_can_be_listened_at_and_connected_to() {
        let folder = tempfile::tempdir().unwrap();
        let long = folder.path().join("x".repeat(200));
        std::fs::create_dir(&long).unwrap();
        let path = long.join("shim.sock");
        std::fs::write(&path, "left over").unwrap();
        let _listener = listen(&path).unwrap();
        connect(&path, SocketFlags::empty()).unwrap();
        let mode = std::fs::symlink_metadata(&path).unwrap();
        assert_eq!(
            std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777,
            0o600
        );
    }
}
