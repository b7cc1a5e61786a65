//! The daemon's log: a file bounded to two halves, the older of which is renamed away.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Half of what the log may take, in bytes.
const HALF_BYTES: u64 = 2 << 20;

/// A log file that never grows past its bound.
#[derive(Debug, Clone)]
pub(crate) struct BoundedLog(Arc<Mutex<Halves>>);

#[derive(Debug)]
struct Halves {
    path: PathBuf,
    file: File,
    written: u64,
    half: u64,
}

impl BoundedLog {
    /// Opens the log at `path` (mode 0600) to append to it.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::with_half(path, HALF_BYTES)
    }

    fn with_half(path: &Path, half: u64) -> io::Result<Self> {
        let file = append(path)?;
        let written = file.metadata()?.len();
        Ok(Self(Arc::new(Mutex::new(Halves {
            path: path.to_owned(),
            file,
            written,
            half,
        }))))
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

impl Write for &BoundedLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut halves = self
            .0
            .lock()
            .map_err(|_| io::Error::other("the log's lock is poisoned"))?;
        if halves.written > halves.half {
            let mut older = halves.path.as_os_str().to_owned();
            older.push(".1");
            std::fs::rename(&halves.path, older)?;
            halves.file = append(&halves.path)?;
            halves.written = 0;
        }
        halves.file.write_all(bytes)?;
        halves.written += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends the program's `tracing` events to the log. `BANGER_LOG` filters them; `info` without it.
pub(crate) fn init(log: BoundedLog) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("BANGER_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(move || Writer(log.clone()))
        .finish();
    // Only a second call could fail, and there is none.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

struct Writer(BoundedLog);

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&self.0).write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_never_outgrows_its_two_halves() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let log = BoundedLog::with_half(&path, 1000).unwrap();
        for number in 0..500 {
            writeln!(&log, "line {number}").unwrap();
        }
        let sizes: u64 = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|e| e.unwrap().metadata().unwrap().len())
            .sum();
        assert!(sizes <= 2 * 1100, "{sizes}");
        assert!(
            std::fs::read_to_string(&path)
                .unwrap()
                .ends_with("line 499\n")
        );
    }
}
