//! Processes by pidfd: a number may name another process by the time it is used, a pidfd cannot.

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Which file it is, whatever it is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::metadata(path)?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }
}

/// Why a holder of a lock was not signalled.
#[derive(Debug, thiserror::Error)]
pub enum KillError {
    /// The process is gone, or is another one that does not hold the lock.
    #[error("process {pid} does not hold the lock `{}`", lock.display())]
    NotHolder {
        /// The process.
        pid: i32,
        /// The lock.
        lock: PathBuf,
    },
    /// It was killed, and has not ended: it waits for something in the kernel.
    #[error("process {pid} has not ended {} s after SIGKILL", limit.as_secs())]
    Lives {
        /// The process.
        pid: i32,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The signal could not be sent.
    #[error("cannot signal process {pid}")]
    Io {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A pidfd of `pid`.
pub fn open(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// Which of `locks` process `pid` holds: it has that very file open, by a description that carries a lock.
pub(crate) fn held(pid: i32, locks: &HashSet<FileId>) -> impl Iterator<Item = FileId> {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd"));
    let descriptors = descriptors.into_iter().flatten().flatten();
    descriptors.filter_map(move |descriptor| {
        let file = FileId::of(&descriptor.path()).ok()?;
        locks.get(&file)?;
        let name = descriptor.file_name();
        let info = format!("/proc/{pid}/fdinfo/{}", name.to_string_lossy());
        let info = std::fs::read_to_string(info).ok()?;
        let locked = |line: &str| line.starts_with("lock:") && line.contains("FLOCK");
        info.lines().any(locked).then_some(file)
    })
}

/// Whether process `pid` holds `lock`.
pub(crate) fn holds(pid: i32, lock: FileId) -> bool {
    held(pid, &HashSet::from([lock])).next().is_some()
}

/// Sends `signal` to process `pid` if, and only if, it holds the lock at `lock`.
///
/// The process is pinned first and looked at afterwards, so that no other one can be hit.
pub fn kill_holder(pid: i32, lock: &Path, signal: Signal) -> Result<(), KillError> {
    let file = FileId::of(lock).map_err(|source| KillError::Io { pid, source })?;
    signal_holder(pid, file, lock, signal).map(drop)
}

/// Ends process `pid` by SIGKILL if, and only if, it holds the lock at `lock`, and waits for its end, at most for
/// `limit`.
///
/// # Errors
/// It does not hold the lock, cannot be signalled, or does not die in time.
pub fn end_holder(pid: i32, lock: &Path, limit: Duration) -> Result<(), KillError> {
    let file = FileId::of(lock).map_err(|source| KillError::Io { pid, source })?;
    end(pid, file, lock, limit)
}

/// As [`end_holder`], for a lock that may have no name any more.
pub(crate) fn end(pid: i32, file: FileId, lock: &Path, limit: Duration) -> Result<(), KillError> {
    let pidfd = signal_holder(pid, file, lock, Signal::KILL)?;
    match wait_any(&[pidfd], limit) {
        Ok(true) => Ok(()),
        Ok(false) => Err(KillError::Lives { pid, limit }),
        Err(source) => Err(KillError::Io { pid, source }),
    }
}

fn signal_holder(
    pid: i32,
    file: FileId,
    lock: &Path,
    signal: Signal,
) -> Result<OwnedFd, KillError> {
    let not_holder = || KillError::NotHolder {
        pid,
        lock: lock.to_owned(),
    };
    let failed = |source| KillError::Io { pid, source };
    let pidfd = match open(pid) {
        Ok(pidfd) => pidfd,
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {
            return Err(not_holder());
        }
        Err(error) => return Err(failed(error)),
    };
    if !holds(pid, file) {
        return Err(not_holder());
    }
    rustix::process::pidfd_send_signal(&pidfd, signal).map_err(|error| failed(error.into()))?;
    Ok(pidfd)
}

/// The signal that asks process `pid` to end: SIGTERM, but SIGKILL where it has no handler for that. SIGTERM would then
/// only have killed it, and as the first process of a pid namespace it would be spared even that.
pub fn ending_signal(pid: i32) -> Signal {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    if leaves_to_default(&status, Signal::TERM) {
        Signal::KILL
    } else {
        Signal::TERM
    }
}

/// Whether a process with this `/proc/<pid>/status` neither handles nor ignores `signal`.
fn leaves_to_default(status: &str, signal: Signal) -> bool {
    let has = |field: &str| {
        let mask = status.lines().find_map(|line| line.strip_prefix(field));
        let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        mask.map(|mask| mask >> (signal.as_raw() - 1) & 1 == 1)
    };
    has("SigCgt:") == Some(false) && has("SigIgn:") == Some(false)
}

/// Waits until one of the processes has ended, at most for `limit`. Tells whether one has.
pub fn wait_any(pidfds: &[OwnedFd], limit: Duration) -> io::Result<bool> {
    let mut polled: Vec<PollFd<'_>> = pidfds
        .iter()
        .map(|pidfd| PollFd::new(pidfd, PollFlags::IN))
        .collect();
    match rustix::event::poll(&mut polled, Some(&timespec(limit))) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: duration.as_secs().min(i32::MAX as u64) as i64,
        tv_nsec: duration.subsec_nanos().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_does_not_hold_the_lock_is_never_signalled() {
        let folder = tempfile::tempdir().unwrap();
        let lock = folder.path().join("vm.lock");
        std::fs::write(&lock, "").unwrap();
        // Open, but not locked: this test itself would die if it were taken for a holder.
        let _open = std::fs::File::open(&lock).unwrap();
        let own = std::process::id() as i32;
        assert!(matches!(
            kill_holder(own, &lock, Signal::KILL),
            Err(KillError::NotHolder { .. })
        ));
    }

    #[test]
    fn sigterm_is_for_those_that_do_something_about_it() {
        let status = |caught: &str, ignored: &str| {
            format!(
                "Name:\tvmm\nSigBlk:\t0000000000004000\nSigIgn:\t{ignored}\nSigCgt:\t{caught}\n"
            )
        };
        let none = "0000000000000000";
        let term = "0000000000004002";
        for (status, expected) in [
            (status(none, none), true),
            (status(term, none), false),
            (status(none, term), false),
            (String::new(), false),
        ] {
            assert_eq!(
                leaves_to_default(&status, Signal::TERM),
                expected,
                "{status}"
            );
        }
    }

    #[test]
    fn a_file_is_held_only_where_its_description_carries_the_lock() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm.lock");
        let own = std::process::id() as i32;
        let lock = crate::lock::try_lock(&path).unwrap();
        let file = FileId::of(&path).unwrap();
        assert!(holds(own, file));
        drop(lock);
        assert!(!holds(own, file));
    }
}
