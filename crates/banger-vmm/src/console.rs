//! The guest's console: a bounded ring on disk, and the few lines of a kernel that say how a guest ends.

use crate::protocol::Ring;
use rustix::fs::{Mode, OFlags};
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// The writer of a [`Ring`]. What cannot be written is dropped, so that a guest or a full disk never blocks it.
#[derive(Debug)]
pub struct RingWriter {
    ring: Ring,
    file: Option<OwnedFd>,
    length: u64,
}

impl RingWriter {
    /// Opens the ring, to be written on from where it is.
    pub fn open(ring: Ring) -> io::Result<Self> {
        let mut writer = Self {
            ring,
            file: None,
            length: 0,
        };
        writer.reopen()?;
        Ok(writer)
    }

    fn reopen(&mut self) -> io::Result<()> {
        let flags = OFlags::WRONLY
            | OFlags::APPEND
            | OFlags::CREATE
            | OFlags::CLOEXEC
            | OFlags::NOFOLLOW
            | OFlags::NONBLOCK;
        let file = rustix::fs::open(&self.ring.path, flags, Mode::RUSR | Mode::WUSR)?;
        self.length = rustix::fs::fstat(&file)?.st_size.unsigned_abs();
        self.file = Some(file);
        Ok(())
    }

    fn half(&self) -> u64 {
        (self.ring.max_bytes / 2).max(1)
    }

    /// The older half's path.
    fn older(&self) -> PathBuf {
        let mut older = OsString::from(&self.ring.path);
        older.push(".1");
        older.into()
    }

    /// Appends `bytes`, starting the file anew as often as it is full.
    pub fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.length >= self.half() {
                let _ = std::fs::rename(&self.ring.path, self.older());
                self.file = None;
            }
            if self.file.is_none() && self.reopen().is_err() {
                return;
            }
            let room = self.half().saturating_sub(self.length);
            // The rename did not help: better to lose text than to grow without end.
            if room == 0 {
                return;
            }
            let chunk = &bytes[..bytes.len().min(usize::try_from(room).unwrap_or(usize::MAX))];
            let Some(Ok(written)) = self
                .file
                .as_ref()
                .map(|file| rustix::io::write(file, chunk))
            else {
                return;
            };
            self.length += written as u64;
            bytes = &bytes[written..];
            if written == 0 {
                return;
            }
        }
    }
}

/// What a guest's kernel said last, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelWord {
    /// `reboot: Power down` or `reboot: System halted`.
    PowerDown,
    /// `reboot: Restarting system`.
    Restarting,
    /// `Kernel panic - not syncing`.
    Panic,
}

const MAX_LINE_BYTES: usize = 256;

/// Watches the console for a kernel's last words. Only whole lines of the kernel's own form count.
#[derive(Debug, Default)]
pub struct Watcher {
    line: Vec<u8>,
}

impl Watcher {
    /// Reads on, and gives what was said in these bytes.
    pub fn read(&mut self, bytes: &[u8]) -> Vec<KernelWord> {
        let mut words = Vec::new();
        for &byte in bytes {
            if byte == b'\n' || byte == b'\r' {
                words.extend(judge(&self.line));
                self.line.clear();
            } else if self.line.len() < MAX_LINE_BYTES {
                self.line.push(byte);
            }
        }
        words
    }
}

fn judge(line: &[u8]) -> Option<KernelWord> {
    let line = std::str::from_utf8(line).ok()?;
    // A time such as `[    1.234567] ` comes before the text unless it was turned off.
    let text = match line
        .strip_prefix('[')
        .and_then(|rest| rest.split_once("] "))
    {
        Some((time, text))
            if time
                .chars()
                .all(|c| c.is_ascii_digit() || matches!(c, ' ' | '.' | 'T' | 'C')) =>
        {
            text
        }
        _ => line,
    };
    match text {
        "reboot: Power down" | "reboot: System halted" => Some(KernelWord::PowerDown),
        "reboot: Restarting system" => Some(KernelWord::Restarting),
        _ if text.starts_with("Kernel panic - not syncing") => Some(KernelWord::Panic),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(folder: &tempfile::TempDir, max_bytes: u64) -> RingWriter {
        RingWriter::open(Ring {
            path: folder.path().join("console.log"),
            max_bytes,
        })
        .unwrap()
    }

    #[test]
    fn both_halves_together_never_exceed_the_limit_and_the_newest_bytes_stay() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = ring(&folder, 100);
        for number in 0..200u32 {
            writer.write(format!("{number:07}").as_bytes());
            let size = |name: &str| {
                std::fs::metadata(folder.path().join(name)).map_or(0, |metadata| metadata.len())
            };
            assert!(size("console.log") + size("console.log.1") <= 100);
        }
        let text = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        let all = text("console.log.1") + &text("console.log");
        assert!(all.ends_with("00001980000199"), "{all}");
        assert!(all.len() >= 50, "{all}");
    }

    #[test]
    fn one_write_larger_than_the_ring_keeps_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = ring(&folder, 20);
        writer.write(b"abcdefghijklmnopqrstuvwxyz0123456789");
        assert_eq!(
            std::fs::read(folder.path().join("console.log")).unwrap(),
            b"456789"
        );
        assert_eq!(
            std::fs::read(folder.path().join("console.log.1")).unwrap(),
            b"uvwxyz0123"
        );
    }

    #[test]
    fn an_opened_ring_is_written_on_and_begun_anew_under_a_new_inode() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        ring(&folder, 100).write(b"first boot\n");
        let mut writer = ring(&folder, 100);
        writer.write(b"second boot\n");
        let path = folder.path().join("console.log");
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "first boot\nsecond boot\n"
        );
        let before = std::fs::metadata(&path).unwrap().ino();
        writer.write(&[b'x'; 60]);
        assert_ne!(std::fs::metadata(&path).unwrap().ino(), before);
    }

    #[test]
    fn a_kernels_last_words_are_heard_however_they_are_cut() {
        let text = b"hello\r\n[   12.345678] reboot: Power down\r\n";
        for cut in 0..text.len() {
            let mut watcher = Watcher::default();
            let mut words = watcher.read(&text[..cut]);
            words.extend(watcher.read(&text[cut..]));
            assert_eq!(words, [KernelWord::PowerDown], "{cut}");
        }
        let mut watcher = Watcher::default();
        assert_eq!(
            watcher.read(b"Kernel panic - not syncing: Attempted to kill init!\n"),
            [KernelWord::Panic]
        );
        assert_eq!(
            watcher.read(b"[    3.1] reboot: Restarting system\n"),
            [KernelWord::Restarting]
        );
    }

    #[test]
    fn a_line_that_only_quotes_a_kernel_is_not_its_word() {
        let mut watcher = Watcher::default();
        for quote in [
            "echo reboot: Power down\n",
            "log: [    1.0] reboot: Power down\n",
            "[tag] Kernel panic - not syncing\n",
            "reboot: Power downwards\n",
        ] {
            assert_eq!(watcher.read(quote.as_bytes()), [], "{quote}");
        }
        assert_eq!(watcher.read(&vec![b'x'; 1 << 20]), []);
        assert!(watcher.line.len() <= MAX_LINE_BYTES);
    }
}
