//! Facts about filesystems and the machine, and the few durable file operations that everything else is built from.

pub mod dm;
pub mod loopdev;
pub mod ops;
mod reflink;
pub mod snapshot_files;

pub use reflink::{ReflinkError, filesystem_name, mount_point, try_reflink};

use rustix::fs::{FallocateFlags, Mode, OFlags};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A file or filesystem could not be measured, made or made durable.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} `{}`", path.display())]
pub struct StorageError {
    what: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl StorageError {
    fn new(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self {
            what,
            path: path.to_owned(),
            source,
        }
    }

    /// Whether it was a full disk or an exhausted quota.
    pub fn is_no_space(&self) -> bool {
        matches!(
            self.source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        )
    }

    /// Whether the filesystem cannot do this at all.
    pub fn is_unsupported(&self) -> bool {
        self.source.kind() == io::ErrorKind::Unsupported
    }
}

/// The room of a filesystem, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// In all.
    pub total: u64,
    /// Free for us (what root alone may use does not count).
    pub available: u64,
}

/// The room of the filesystem that `path` is on.
///
/// # Errors
/// `path` does not exist or cannot be reached.
pub fn space(path: &Path) -> Result<Space, StorageError> {
    let facts = rustix::fs::statvfs(path)
        .map_err(|errno| StorageError::new("measure the filesystem of", path)(errno.into()))?;
    Ok(Space {
        total: facts.f_blocks.saturating_mul(facts.f_frsize),
        available: facts.f_bavail.saturating_mul(facts.f_frsize),
    })
}

/// The bytes that the file at `path` takes on its filesystem: less than its size if it is sparse.
///
/// # Errors
/// `path` does not exist or cannot be reached.
pub fn allocated(path: &Path) -> Result<u64, StorageError> {
    let facts = std::fs::symlink_metadata(path).map_err(StorageError::new("measure", path))?;
    Ok(facts.blocks().saturating_mul(512))
}

/// Makes a new sparse file of `size` bytes and `mode`.
///
/// # Errors
/// Something has that name already, or the filesystem refuses.
pub fn create_sparse(path: &Path, size: u64, mode: u32) -> Result<File, StorageError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(StorageError::new("create", path))?;
    if let Err(source) = file.set_len(size) {
        let _ = std::fs::remove_file(path);
        return Err(StorageError::new("set the size of", path)(source));
    }
    Ok(file)
}

/// Writes `bytes` to the beginning of `file` (named `path` in errors).
///
/// # Errors
/// The filesystem refuses.
pub fn write_at_start(file: &File, path: &Path, bytes: &[u8]) -> Result<(), StorageError> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, 0)
        .map_err(StorageError::new("write", path))
}

/// Has the filesystem write the blocks of `file` (named `path` in errors), which is empty, where they are: else btrfs
/// gives each write a new place, and room that was reserved is room for the first write alone.
///
/// # Errors
/// The filesystem refuses.
pub fn write_in_place(file: &File, path: &Path) -> Result<(), StorageError> {
    let set = || {
        if reflink::filesystem_of(rustix::fs::fstatfs(file)?.f_type) != Some("btrfs") {
            return Ok(());
        }
        let flags = rustix::fs::ioctl_getflags(file)?;
        rustix::fs::ioctl_setflags(file, flags | rustix::fs::IFlags::NOCOW)
    };
    set().map_err(|errno| StorageError::new("keep the blocks of", path)(errno.into()))
}

/// Makes sure that writing to the first `size` bytes of `file` (named `path` in errors) will not run out of room.
/// What is in the file stays.
///
/// # Errors
/// There is no room; nothing is promised then.
pub fn preallocate(file: &File, path: &Path, size: u64) -> Result<(), StorageError> {
    rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size)
        .map_err(|errno| StorageError::new("reserve room for", path)(errno.into()))
}

/// Makes the content of the file at `path` durable.
///
/// # Errors
/// The file cannot be opened, or the disk failed.
pub fn sync_file(path: &Path) -> Result<(), StorageError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(StorageError::new("make durable", path))
}

/// Makes the names in the directory at `path` durable.
///
/// # Errors
/// The directory cannot be opened, or the disk failed.
pub fn sync_directory(path: &Path) -> Result<(), StorageError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
        .and_then(rustix::fs::fsync)
        .map_err(|errno| StorageError::new("make durable", path)(errno.into()))
}

/// Puts `bytes` at `path` so that a reader, or a power cut, finds the old content or the new, and makes it durable.
/// Writers of one path must take turns.
///
/// # Errors
/// The filesystem refuses; the old content is there then.
pub fn replace_file(path: &Path, bytes: &[u8], mode: u32) -> Result<(), StorageError> {
    replace(path, bytes, mode, File::sync_all).map_err(StorageError::new("write", path))?;
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_directory(parent),
        _ => sync_directory(Path::new(".")),
    }
}

/// As [`replace_file`], but without waiting for the disk: a power cut may leave the old content, or an empty file.
///
/// # Errors
/// The filesystem refuses; the old content is there then.
pub fn replace_unsynced(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    replace(path, bytes, mode, |_| Ok(()))
}

fn replace(
    path: &Path,
    bytes: &[u8],
    mode: u32,
    finish: impl FnOnce(&File) -> io::Result<()>,
) -> io::Result<()> {
    use std::io::Write as _;
    let mut staged = path.as_os_str().to_owned();
    staged.push(".new");
    let staged = PathBuf::from(staged);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(&staged)?;
    let written = file
        .write_all(bytes)
        .and_then(|()| finish(&file))
        .and_then(|()| std::fs::rename(&staged, path));
    if written.is_err() {
        // What was staged is of no use; the first failure is what counts.
        let _ = std::fs::remove_file(&staged);
    }
    written
}

/// The id of this boot of the machine.
///
/// # Errors
/// `/proc` is not mounted.
pub fn boot_id() -> Result<String, StorageError> {
    read_id(Path::new("/proc/sys/kernel/random/boot_id"))
}

/// The id of this installation, or nothing where the machine has none.
///
/// # Errors
/// The file is there but cannot be read.
pub fn machine_id() -> Result<Option<String>, StorageError> {
    for path in ["/etc/machine-id", "/var/lib/dbus/machine-id"] {
        match read_id(Path::new(path)) {
            Ok(id) if !id.is_empty() && id != "uninitialized" => return Ok(Some(id)),
            Ok(_) => {}
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn read_id(path: &Path) -> Result<String, StorageError> {
    let text = std::fs::read_to_string(path).map_err(StorageError::new("read", path))?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sparse_file_takes_no_room_until_it_is_reserved() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let file = create_sparse(&path, 8 << 20, 0o600).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 8 << 20);
        assert!(allocated(&path).unwrap() < 1 << 20);
        preallocate(&file, &path, 4 << 20).unwrap();
        assert!(allocated(&path).unwrap() >= 4 << 20);
        assert_eq!(file.metadata().unwrap().len(), 8 << 20);
        let error = create_sparse(&path, 1, 0o600).unwrap_err();
        assert!(error.to_string().contains("cannot create `"), "{error}");
        assert_eq!(file.metadata().unwrap().len(), 8 << 20);
    }

    #[test]
    fn a_replaced_file_leaves_nothing_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.json");
        replace_file(&path, b"one", 0o600).unwrap();
        replace_file(&path, b"two", 0o600).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        sync_file(&path).unwrap();
    }

    #[test]
    fn room_and_ids_are_there() {
        let space = space(Path::new("/")).unwrap();
        assert!(space.total >= space.available && space.total > 0);
        assert_eq!(boot_id().unwrap().len(), 36);
        machine_id().unwrap();
        assert!(super::space(Path::new("/no/such/place")).is_err());
    }
}
