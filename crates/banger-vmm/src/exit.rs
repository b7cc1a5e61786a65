//! `exit.json`: written once, whole or not at all.

use crate::protocol::Exit;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Writes `exit` to `path`.
pub(crate) fn write(path: &Path, exit: &Exit) -> io::Result<()> {
    let mut temporary = OsString::from(path);
    temporary.push(".tmp");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(&serde_json::to_vec_pretty(exit)?)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)
}

/// Reads the exit file at `path`; `None` if there is none.
pub fn read(path: &Path) -> io::Result<Option<Exit>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
