//! A VM's folder: where its files are, and how they are staged and made.

use crate::images::STAGING;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::paths::Paths;
use banger_core::id::VmId;
use banger_core::name::VmName;
use banger_vmm::lock::{LockError, try_lock};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The paths inside a VM's folder.
#[derive(Debug, Clone)]
pub(crate) struct VmFiles {
    pub(crate) folder: PathBuf,
}

impl VmFiles {
    pub(crate) fn of(paths: &Paths, id: VmId) -> Self {
        Self {
            folder: paths.vm(id),
        }
    }

    /// Where a VM that is being created is put together.
    pub(crate) fn staging(paths: &Paths, id: VmId) -> Self {
        Self {
            folder: paths.vms().join(format!("{STAGING}{id}")),
        }
    }

    /// The VM's own layer, or its own copy of the image.
    pub(crate) fn overlay(&self) -> PathBuf {
        self.folder.join("overlay.img")
    }

    pub(crate) fn disk(&self) -> PathBuf {
        self.folder.join("disk.img")
    }

    pub(crate) fn console(&self) -> PathBuf {
        self.folder.join("console.log")
    }

    pub(crate) fn vmm_log(&self) -> PathBuf {
        self.folder.join("vmm.log")
    }

    pub(crate) fn metrics(&self) -> PathBuf {
        self.folder.join("metrics.log")
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.folder.join("vm.lock")
    }

    pub(crate) fn run(&self) -> PathBuf {
        self.folder.join("run")
    }

    /// Where the VMM works: it may make and change things there, so nothing of ours is written to it while it runs.
    pub(crate) fn vmm_folder(&self) -> PathBuf {
        self.run().join("vmm")
    }

    pub(crate) fn shim_socket(&self) -> PathBuf {
        self.run().join("shim.sock")
    }

    pub(crate) fn attempt(&self) -> PathBuf {
        self.run().join("attempt.json")
    }

    pub(crate) fn exit(&self) -> PathBuf {
        self.run().join("exit.json")
    }

    /// Whether no run left anything here and nobody may write to the disks. An error in looking says no.
    pub(crate) fn are_at_rest(&self) -> bool {
        let absent = |path: &Path| matches!(path.symlink_metadata(), Err(error) if error.kind() == ErrorKind::NotFound);
        let lock = self.lock();
        absent(&self.run()) && (absent(&lock) || try_lock(&lock).is_ok())
    }

    pub(crate) fn config_drive(&self) -> PathBuf {
        self.run().join("config.img")
    }
}

/// Makes a folder that only its owner may enter.
pub(crate) fn make_folder(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

/// A file operation's error on the wire.
pub(crate) fn io_error(action: &str, path: &Path, error: &std::io::Error) -> ErrorBody {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    let message = format!("cannot {action} `{}`", path.display());
    if matches!(error.kind(), StorageFull | QuotaExceeded) {
        return ErrorBody::new(ErrorCode::NoSpace, message)
            .caused_by(error)
            .hint("free some space and repeat the command");
    }
    ErrorBody::new(ErrorCode::Internal, message).caused_by(error)
}

/// Why the lock of a VM that should be stopped cannot be taken; `verb` is what it was to be taken for.
pub(crate) fn lock_error(name: &VmName, verb: &str, error: &LockError) -> ErrorBody {
    match error {
        LockError::Held(path) => ErrorBody::new(
            ErrorCode::Unreachable,
            format!("cannot {verb} VM `{name}`: another process holds its lock"),
        )
        .caused_by(error)
        .hint(format!(
            "`fuser -v {}` shows which; if `banger vm list` shows the VM as running then, `banger vm kill {name}` ends it",
            path.display()
        )),
        LockError::Io { path, source } => io_error("lock", path, source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_lock_is_refused_with_the_verb_that_was_asked_for() {
        let name = VmName::new("otter").unwrap();
        let held = LockError::Held(PathBuf::from("/vms/1/vm.lock"));
        let error = lock_error(&name, "reset", &held);
        assert_eq!(error.code, ErrorCode::Unreachable);
        assert_eq!(
            error.message,
            "cannot reset VM `otter`: another process holds its lock"
        );
        assert!(error.hints[0].contains("fuser -v /vms/1/vm.lock"));
    }

    #[test]
    fn a_vm_is_at_rest_when_its_lock_is_free_and_no_run_left_anything() {
        let folder = tempfile::tempdir().unwrap();
        let files = VmFiles {
            folder: folder.path().to_owned(),
        };
        assert!(files.are_at_rest(), "never started");
        let held = try_lock(&files.lock()).unwrap();
        assert!(!files.are_at_rest(), "somebody may write");
        drop(held);
        assert!(files.are_at_rest());
        make_folder(&files.run()).unwrap();
        assert!(!files.are_at_rest(), "a run was not cleared away");
        std::fs::remove_dir(files.run()).unwrap();
        std::fs::remove_file(files.lock()).unwrap();
        std::os::unix::fs::symlink("/nonexistent", files.lock()).unwrap();
        assert!(!files.are_at_rest(), "the lock cannot be tried");
    }
}
