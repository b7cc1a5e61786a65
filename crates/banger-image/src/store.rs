//! Moving finished folders into a store, durably, and out of it.

use crate::error::BuildError;
use rustix::fs::{Mode, OFlags};
use std::io::Write;
use std::path::Path;

/// Makes `staging` durable and gives it its final name: every file and folder in it is synced, it is renamed to
/// `final_dir` (which must be on the same filesystem and not exist), and the folder that holds it is synced.
pub fn publish(staging: &Path, final_dir: &Path) -> Result<(), BuildError> {
    sync_tree(staging)?;
    rustix::fs::renameat_with(
        rustix::fs::CWD,
        staging,
        rustix::fs::CWD,
        final_dir,
        rustix::fs::RenameFlags::NOREPLACE,
    )
    .map_err(|errno| BuildError::io("rename", staging)(errno.into()))?;
    sync_parent(final_dir)
}

/// Removes a folder of a store and makes that durable. A folder that does not exist is no error.
pub fn remove(dir: &Path) -> Result<(), BuildError> {
    match std::fs::remove_dir_all(dir) {
        Ok(()) => sync_parent(dir),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(BuildError::io("remove", dir)(error)),
    }
}

/// The time in seconds since 1970.
pub(crate) fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |duration| i64::try_from(duration.as_secs()).unwrap_or(0))
}

/// Reads the JSON file `path`, which is to be small.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, BuildError> {
    let json = std::fs::read(path).map_err(BuildError::io("read", path))?;
    serde_json::from_slice(&json).map_err(|source| BuildError::Manifest {
        path: path.to_owned(),
        source,
    })
}

/// Writes `value` as JSON to `path`, which is replaced as a whole.
pub(crate) fn write_json<T: serde::Serialize>(path: &Path, value: &T) -> Result<(), BuildError> {
    let json = serde_json::to_vec_pretty(value).map_err(|source| BuildError::Manifest {
        path: path.to_owned(),
        source,
    })?;
    replace(path, &[&json, b"\n"])
}

/// Writes `parts` one after another to `path`, which is replaced as a whole and durably.
pub(crate) fn replace(path: &Path, parts: &[&[u8]]) -> Result<(), BuildError> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = std::path::PathBuf::from(partial);
    let mut file = std::fs::File::create(&partial).map_err(BuildError::io("create", &partial))?;
    for part in parts {
        file.write_all(part)
            .map_err(BuildError::io("write", &partial))?;
    }
    file.sync_all().map_err(BuildError::io("sync", &partial))?;
    std::fs::rename(&partial, path).map_err(BuildError::io("rename", &partial))?;
    sync_parent(path)
}

fn sync_parent(path: &Path) -> Result<(), BuildError> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync(parent),
        _ => sync(Path::new(".")),
    }
}

fn sync(path: &Path) -> Result<(), BuildError> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::open(path, flags, Mode::empty())
        .and_then(rustix::fs::fsync)
        .map_err(|errno| BuildError::io("sync", path)(errno.into()))
}

fn sync_tree(dir: &Path) -> Result<(), BuildError> {
    let entries = std::fs::read_dir(dir).map_err(BuildError::io("list", dir))?;
    for entry in entries {
        let entry = entry.map_err(BuildError::io("list", dir))?;
        let kind = entry
            .file_type()
            .map_err(BuildError::io("look at", &entry.path()))?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            sync(&entry.path())?;
        }
    }
    sync(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn publishing_moves_the_whole_folder_and_never_replaces_one() {
        let dir = tempfile::tempdir().unwrap();
        let staging = dir.path().join("staging");
        let target = dir.path().join("final");
        std::fs::create_dir_all(staging.join("inner")).unwrap();
        std::fs::write(staging.join("inner/file"), "content").unwrap();
        publish(&staging, &target).unwrap();
        assert!(!staging.exists());
        assert_eq!(
            std::fs::read(target.join("inner/file")).unwrap(),
            b"content"
        );

        std::fs::create_dir(&staging).unwrap();
        assert!(publish(&staging, &target).is_err());
        assert!(target.join("inner/file").exists());
    }

    #[test]
    fn removing_what_is_not_there_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("image");
        std::fs::create_dir(&target).unwrap();
        std::fs::write(target.join("root.img"), "").unwrap();
        remove(&target).unwrap();
        assert!(!target.exists());
        remove(&target).unwrap();
    }
}
