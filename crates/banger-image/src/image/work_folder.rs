//! Where mmdebstrap works. It does not always clean up when it is ended, so its folder is ours to remove.

use crate::context::Context;
use crate::error::BuildError;
use crate::run::Program;
use rustix::fs::{FlockOperation, Mode, OFlags};
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use uuid::Uuid;

const PREFIX: &str = "banger-build-";

/// A folder for one build, which is locked for as long as the build lives and goes with it.
pub(super) struct WorkFolder {
    path: PathBuf,
    _lock: OwnedFd,
}

impl WorkFolder {
    /// Makes one for temporary files.
    pub(super) fn make() -> Result<Self, BuildError> {
        let all = std::env::temp_dir();
        loop {
            let path = all.join(format!("{PREFIX}{}", Uuid::now_v7()));
            std::fs::create_dir(&path).map_err(BuildError::io("create", &path))?;
            // Somebody who sweeps may have taken it for one that was left.
            let Some(lock) = lock(&path) else {
                continue;
            };
            let work = Self { path, _lock: lock };
            // As for /tmp itself: the ids that mmdebstrap runs as are not ours.
            let mode = std::fs::Permissions::from_mode(0o1777);
            std::fs::set_permissions(&work.path, mode)
                .map_err(BuildError::io("open", &work.path))?;
            return Ok(work);
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// The lock of the folder `path` if nobody holds it and it is still there.
fn lock(path: &Path) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = rustix::fs::open(path, flags, Mode::empty()).ok()?;
    rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive).ok()?;
    let locked = rustix::fs::fstat(&folder).ok()?.st_ino;
    let there = std::fs::symlink_metadata(path).ok()?.ino();
    (locked == there).then_some(folder)
}

/// Removes what builds of this user left in `folder` that were killed, one for temporary files.
pub(super) fn sweep(folder: &Path) {
    let own = rustix::process::geteuid().as_raw();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let ours = entry.file_name().to_string_lossy().starts_with(PREFIX)
            && entry.metadata().is_ok_and(|found| found.uid() == own);
        if ours && let Some(_lock) = lock(&entry.path()) {
            remove(&entry.path());
        }
    }
}

fn remove(path: &Path) {
    if std::fs::remove_dir_all(path).is_ok() {
        return;
    }
    // What belongs to subordinate ids is removed as their root; a cancelled build must not stop this.
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    let arguments = ["--unshare-helper", "rm", "-rf", "--"].map(OsString::from);
    let program = Program {
        name: "mmdebstrap",
        package: "mmdebstrap",
        arguments: arguments
            .into_iter()
            .chain(entries.map(|entry| entry.path().into()))
            .collect(),
        folder: Some(Path::new("/")),
        environment: Vec::new(),
        limit: Duration::from_secs(60),
        stage: None,
    };
    // It cannot remove what is this user's own, so it may fail: what counts is what is left afterwards.
    let _ = program.run(&Context::quiet(std::env::temp_dir()));
    if std::fs::remove_dir_all(path).is_err() {
        tracing::warn!(folder = %path.display(), "a build's folder is left behind");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_build_left_is_swept_and_a_living_ones_is_not() {
        let all = tempfile::tempdir().unwrap();
        let [left, alive, other] = ["banger-build-1", "banger-build-2", "other"].map(|name| {
            let path = all.path().join(name);
            std::fs::create_dir(&path).unwrap();
            std::fs::write(path.join("file"), "").unwrap();
            path
        });
        let _lock = lock(&alive).unwrap();
        sweep(all.path());
        assert!(!left.exists());
        assert!(alive.join("file").exists() && other.join("file").exists());
    }

    #[test]
    fn a_work_folder_goes_with_its_build() {
        let work = WorkFolder::make().unwrap();
        let path = work.path().to_owned();
        assert!(lock(&path).is_none(), "it is locked");
        drop(work);
        assert!(!path.exists());
    }
}
