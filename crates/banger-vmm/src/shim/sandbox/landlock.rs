//! Landlock: what of the file system a VMM may use, whatever its root shows.

use super::calls::{self, Ruleset};
use crate::sandbox::{Access, Entry};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::AsFd;

const EXECUTE: u64 = 1;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
const REMOVE_FILE: u64 = 1 << 5;
const MAKE_SOCK: u64 = 1 << 9;
const TRUNCATE: u64 = 1 << 14;
const IOCTL_DEV: u64 = 1 << 15;
/// What can be allowed on a file.
const OF_A_FILE: u64 = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV;

/// The rights on files that version `version` knows, all of which are withheld unless they are allowed.
fn handled_files(version: u32) -> u64 {
    let bits = match version {
        0 | 1 => 13,
        2 => 14,
        3 | 4 => 15,
        _ => 16,
    };
    (1 << bits) - 1
}

/// All that is withheld.
fn handled(version: u32) -> Ruleset {
    Ruleset {
        handled_files: handled_files(version),
        // To bind and to connect TCP sockets.
        handled_network: if version >= 4 { 0b11 } else { 0 },
        // Abstract sockets and signals to processes outside.
        scoped: if version >= 6 { 0b11 } else { 0 },
    }
}

/// The rights of an access.
fn rights(access: Access) -> u64 {
    match access {
        Access::Read => READ_FILE | IOCTL_DEV,
        Access::Run => EXECUTE | READ_FILE | READ_DIR,
        Access::Write => READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV,
        Access::Device => READ_FILE | WRITE_FILE | IOCTL_DEV,
        // No links and no files: what the shim opens here later is what was here before, or a socket.
        Access::Folder => READ_FILE | WRITE_FILE | READ_DIR | REMOVE_FILE | MAKE_SOCK,
    }
}

/// Holds this process to `entries`. It must have given up gaining privileges.
pub(super) fn restrict(entries: &[Entry]) -> io::Result<()> {
    let handled = handled(calls::landlock_version()?);
    let ruleset = calls::landlock_ruleset(&handled)?;
    for entry in entries {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let path = match rustix::fs::open(&entry.path, flags, Mode::empty()) {
            Ok(path) => path,
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(error.into()),
        };
        let mut allowed = rights(entry.access) & handled.handled_files;
        let mode = rustix::fs::fstat(&path)?.st_mode;
        if FileType::from_raw_mode(mode) != FileType::Directory {
            allowed &= OF_A_FILE;
        }
        calls::landlock_allow(ruleset.as_fd(), path.as_fd(), allowed)?;
    }
    calls::landlock_restrict(ruleset.as_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_landlock_is_asked_for_what_it_knows() {
        for (version, files) in [
            (1, 0x1fff),
            (2, 0x3fff),
            (3, 0x7fff),
            (5, 0xffff),
            (9, 0xffff),
        ] {
            assert_eq!(handled_files(version), files, "{version}");
        }
        assert_eq!((handled(3).handled_network, handled(5).scoped), (0, 0));
        assert_eq!((handled(4).handled_network, handled(6).scoped), (3, 3));
    }

    #[test]
    fn nobody_may_make_links_files_or_devices() {
        const MAKES: u64 = 1 << 6 | 1 << 7 | 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13;
        for access in [
            Access::Read,
            Access::Run,
            Access::Write,
            Access::Device,
            Access::Folder,
        ] {
            assert_eq!(rights(access) & MAKES, 0, "{access:?}");
            let writes = rights(access) & WRITE_FILE != 0;
            assert_eq!(writes, access > Access::Run, "{access:?}");
            let executes = rights(access) & EXECUTE != 0;
            assert_eq!(executes, access == Access::Run, "{access:?}");
        }
    }
}
