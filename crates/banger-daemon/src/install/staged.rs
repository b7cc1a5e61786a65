//! Files on their way: they are removed again unless they were published.

use super::error::InstallError;
use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use uuid::Uuid;

/// What names of files on their way begin with.
const STAGING: &str = ".new-";
const BLOCK: usize = 256 * 1024;

/// A file beside the one that it may become.
#[derive(Debug)]
pub(super) struct Staged {
    pub(super) path: PathBuf,
    published: bool,
}

impl Staged {
    /// Makes an empty file in `folder`, open for reading and writing.
    pub(super) fn make(folder: &Path) -> Result<(Self, File), InstallError> {
        let path = folder.join(format!("{STAGING}{}", Uuid::now_v7()));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(InstallError::io("make", &path))?;
        let staged = Self {
            path,
            published: false,
        };
        Ok((staged, file))
    }

    /// Makes the written `file` a program, and durable; closes it, since a file open for writing is not run.
    pub(super) fn finish(&self, file: File) -> Result<(), InstallError> {
        file.set_permissions(std::fs::Permissions::from_mode(0o755))
            .and_then(|()| file.sync_all())
            .map_err(InstallError::io("write", &self.path))
    }

    /// Gives it the name `target`, in place of what had it.
    pub(super) fn publish(mut self, target: &Path) -> Result<(), InstallError> {
        std::fs::rename(&self.path, target).map_err(InstallError::io("replace", target))?;
        self.published = true;
        let folder = target.parent().unwrap_or(Path::new("/"));
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(InstallError::io("write", folder))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if self.published {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a staged file is left behind");
        }
    }
}

/// Removes what an installation left that was killed.
pub(super) fn sweep(folder: &Path) -> Result<(), InstallError> {
    let entries = std::fs::read_dir(folder).map_err(InstallError::io("read", folder))?;
    for entry in entries.flatten() {
        if entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(STAGING.as_bytes())
        {
            let path = entry.path();
            std::fs::remove_file(&path).map_err(InstallError::io("remove", &path))?;
        }
    }
    Ok(())
}

/// Why copying ended early.
pub(super) enum CopyError {
    Cancelled,
    TooLarge,
    Read(io::Error),
    Write(io::Error),
}

/// Copies at most `limit` bytes; gives their SHA-256. `told` hears how many have been copied.
pub(super) fn copy(
    from: &mut impl Read,
    to: &mut impl Write,
    limit: u64,
    cancel: &AtomicBool,
    mut told: impl FnMut(u64),
) -> Result<String, CopyError> {
    let mut buffer = vec![0; BLOCK];
    let mut hasher = Sha256::new();
    let mut copied = 0;
    loop {
        if cancel.load(Ordering::Relaxed) {
            return Err(CopyError::Cancelled);
        }
        let read = match from.read(&mut buffer) {
            Ok(0) => return Ok(hex(&hasher.finalize())),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(CopyError::Read(error)),
        };
        copied += read as u64;
        if copied > limit {
            return Err(CopyError::TooLarge);
        }
        hasher.update(&buffer[..read]);
        to.write_all(&buffer[..read]).map_err(CopyError::Write)?;
        told(copied);
    }
}

/// The SHA-256 of a file, if it can be read.
pub(super) fn sha256_of(path: &Path, cancel: &AtomicBool) -> Option<String> {
    let mut file = File::open(path).ok()?;
    copy(&mut file, &mut io::sink(), u64::MAX, cancel, |_| ()).ok()
}

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
