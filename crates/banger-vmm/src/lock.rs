//! `vm.lock`: who may write a VM's disks, and whether a VM is dead.
//!
//! Every process that may write a VM's disks has inherited one locked description of `vm.lock`. A VM is dead when the
//! lock is free, and only then.

use crate::process;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long to wait before looking again, where a lock is held by a process that cannot be waited for.
const RETRY: Duration = Duration::from_millis(20);

/// A locked `vm.lock`. Dropping it frees the lock unless another process inherited it.
#[derive(Debug)]
pub struct Locked {
    file: OwnedFd,
}

impl AsFd for Locked {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Why a lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// A living process holds it.
    #[error("the lock `{}` is held", .0.display())]
    Held(PathBuf),
    /// It could not be tried.
    #[error("cannot take the lock `{}`", path.display())]
    Io {
        /// The lock.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Takes the lock at `path`, making the file where it is missing. Never waits.
pub fn try_lock(path: &Path) -> Result<Locked, LockError> {
    let failed = |error: Errno| LockError::Io {
        path: path.to_owned(),
        source: error.into(),
    };
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Locked { file }),
        Err(Errno::WOULDBLOCK) => Err(LockError::Held(path.to_owned())),
        Err(error) => Err(failed(error)),
    }
}

/// The processes other than the caller that hold the lock at `path`, as far as the caller may see them.
///
/// The numbers are for display and for [`process::kill_holder`], which checks them again.
pub fn holders(path: &Path) -> std::io::Result<Vec<i32>> {
    let lock = process::FileId::of(path)?;
    let own = std::process::id() as i32;
    let mut holders: Vec<i32> = std::fs::read_dir("/proc")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&pid| pid != own && process::holds(pid, lock))
        .collect();
    holders.sort_unstable();
    Ok(holders)
}

/// Waits until the lock at `path` is free, and takes it. Gives up at `deadline`.
pub fn wait_free(path: &Path, deadline: Instant) -> Result<Locked, LockError> {
    loop {
        match try_lock(path) {
            Err(LockError::Held(_)) => {}
            outcome => return outcome,
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(LockError::Held(path.to_owned()));
        }
        let failed = |source| LockError::Io {
            path: path.to_owned(),
            source,
        };
        let pidfds: Vec<OwnedFd> = holders(path)
            .map_err(failed)?
            .into_iter()
            .filter_map(|pid| process::open(pid).ok())
            .collect();
        // A process that ends between the two looks, or that belongs to another user, leaves nothing to wait for.
        let limit = if pidfds.is_empty() {
            left.min(RETRY)
        } else {
            left
        };
        process::wait_any(&pidfds, limit).map_err(failed)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_held_once_and_free_when_its_last_descriptor_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm.lock");
        let first = try_lock(&path).unwrap();
        assert!(matches!(try_lock(&path), Err(LockError::Held(_))));
        let second = first.as_fd().try_clone_to_owned().unwrap();
        drop(first);
        assert!(matches!(try_lock(&path), Err(LockError::Held(_))));
        drop(second);
        try_lock(&path).unwrap();
    }

    #[test]
    fn a_lock_of_ones_own_is_no_holder_to_kill() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm.lock");
        let _lock = try_lock(&path).unwrap();
        assert_eq!(holders(&path).unwrap(), Vec::<i32>::new());
    }

    #[test]
    fn waiting_for_a_held_lock_ends_at_its_deadline() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm.lock");
        let _lock = try_lock(&path).unwrap();
        let deadline = Instant::now() + Duration::from_millis(30);
        assert!(matches!(
            wait_free(&path, deadline),
            Err(LockError::Held(_))
        ));
    }

    #[test]
    fn a_lock_that_is_a_symbolic_link_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm.lock");
        std::os::unix::fs::symlink(folder.path().join("elsewhere"), &path).unwrap();
        assert!(matches!(try_lock(&path), Err(LockError::Io { .. })));
        assert!(!folder.path().join("elsewhere").exists());
    }
}
