//! `vm.lock`: who may write a VM's disks, and whether a VM is dead.
//!
//! Every process that may write a VM's disks has inherited one locked description of `vm.lock`. A VM is dead when the
//! lock is free, and only then.

use crate::process::{self, KillError};
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
    let held = |pid| process::held(pid, locks).map(move |lock| (pid, lock));
    Ok(processes()?.into_iter().flat_map(held).collect())
}

/// All processes other than the caller.
fn processes() -> std::io::Result<Vec<i32>> {
    let own = std::process::id() as i32;
    Ok(std::fs::read_dir("/proc")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&pid| pid != own)
        .collect())
}

/// A process that holds the lock of a VM whose folder was removed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stray {
    /// The process.
    pub pid: i32,
    /// The name of the folder that was removed.
    pub folder: String,
    lock: process::FileId,
}

/// The processes that hold a lock which was in a folder of `vms` and has no name any more.
pub fn strays(vms: &Path) -> std::io::Result<Vec<Stray>> {
    // As the kernel shows it, unless it is gone itself.
    let vms = vms.canonicalize().unwrap_or_else(|_| vms.to_owned());
    let folder = |file: &Path| {
        let text = file.to_str()?.strip_suffix(" (deleted)")?;
        let folder = Path::new(text).strip_prefix(&vms).ok()?;
        let name = folder.parent()?.to_str()?;
        let is_lock = folder.file_name()? == "vm.lock" && !name.is_empty() && !name.contains('/');
        is_lock.then(|| name.to_owned())
    };
    let mut found = Vec::new();
    for pid in processes()? {
        let open = std::fs::read_dir(format!("/proc/{pid}/fd"));
        for descriptor in open.into_iter().flatten().flatten() {
            let path = descriptor.path();
            let name = std::fs::read_link(&path).ok();
            let Some(folder) = name.and_then(|name| folder(&name)) else {
                continue;
            };
            if let Ok(lock) = process::FileId::of(&path)
                && process::holds(pid, lock)
            {
                found.push(Stray { pid, folder, lock });
            }
        }
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

impl Stray {
    /// Ends it by SIGKILL if, and only if, it holds that lock, and waits until it has ended, at most for `limit`.
    ///
    /// # Errors
    /// It holds it no longer, cannot be signalled, or does not die in time.
    pub fn end(&self, limit: Duration) -> Result<(), KillError> {
        process::end(self.pid, self.lock, Path::new(&self.folder), limit)
    }
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
    fn a_process_whose_lock_has_no_name_any_more_is_found_and_ended_by_that_lock() {
        let folder = tempfile::tempdir().unwrap();
        let vms = folder.path().join("vms");
        std::fs::create_dir_all(vms.join("one")).unwrap();
        let lock = vms.join("one/vm.lock");
        let held = try_lock(&lock).unwrap();
        #[expect(clippy::disallowed_methods, reason = "a process that holds a lock")]
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .stdin(held.file.try_clone().unwrap())
            .spawn()
            .unwrap();
        drop(held);
        assert_eq!(strays(&vms).unwrap(), [], "its lock has a name");
        std::fs::remove_dir_all(vms.join("one")).unwrap();
        let found = strays(&vms).unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert_eq!((found.len(), found[0].pid), (1, pid));
        assert_eq!(found[0].folder, "one");
        // A process that does not hold this lock is not it.
        let other = Stray {
            pid: std::process::id() as i32,
            ..found[0].clone()
        };
        other.end(Duration::from_secs(10)).unwrap_err();
        found[0].end(Duration::from_secs(10)).unwrap();
        child.wait().unwrap();
        assert_eq!(strays(&vms).unwrap(), []);
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
