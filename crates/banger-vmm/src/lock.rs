//! `vm.lock`: who may write a VM's disks, and whether a VM is dead.
//!
//! Every process that may write a VM's disks has inherited one locked description of `vm.lock`. A VM is dead when the
//! lock is free, and only then.

use crate::process;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use std::collections::{BTreeSet, HashSet};
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
    let holders = holds_of_all(&HashSet::from([lock]))?;
    Ok(holders.into_iter().map(|(pid, _)| pid).collect())
}

/// The same for many locks by one look at all processes: for each of `paths`, who holds it. Nobody holds a lock that is
/// not there.
pub fn holders_of_each(paths: &[PathBuf]) -> std::io::Result<Vec<Vec<i32>>> {
    let locks: Vec<Option<process::FileId>> = paths
        .iter()
        .map(|path| process::FileId::of(path).ok())
        .collect();
    let all = holds_of_all(&locks.iter().flatten().copied().collect())?;
    let holders = |lock: &Option<process::FileId>| {
        let of_this = all.iter().filter(|(_, held)| Some(*held) == *lock);
        of_this.map(|(pid, _)| *pid).collect()
    };
    Ok(locks.iter().map(holders).collect())
}

/// Which of `locks` processes other than the caller hold, by process.
fn holds_of_all(
    locks: &HashSet<process::FileId>,
) -> std::io::Result<BTreeSet<(i32, process::FileId)>> {
    let own = std::process::id() as i32;
    Ok(std::fs::read_dir("/proc")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&pid| pid != own)
        .flat_map(|pid| process::held(pid, locks).map(move |lock| (pid, lock)))
        .collect())
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
    fn one_look_tells_the_holders_of_many_locks() {
        let folder = tempfile::tempdir().unwrap();
        let paths = ["one", "other", "missing"].map(|name| folder.path().join(name));
        let [one, other] = [0, 1].map(|at: usize| try_lock(&paths[at]).unwrap());
        // It holds the first alone, for as long as its standard input is that.
        #[expect(clippy::disallowed_methods, reason = "a process that holds a lock")]
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .stdin(one.file.try_clone().unwrap())
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let all = holders_of_each(&paths);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(all.unwrap(), [vec![pid], vec![], vec![]]);
        drop(other);
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
