//! `banger daemon logs`: read from the file, so that they can be read when the daemon is down.

use crate::context::Context;
use crate::escape::Escaper;
use crate::output::{print, print_raw};
use crate::report::{Failure, Outcome};
use banger_api::error::ErrorCode;
use rustix::fs::inotify;
use std::fs::File;
use std::io::{IsTerminal as _, Read as _, Seek as _, SeekFrom};
use std::mem::MaybeUninit;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Print the daemon's log
///
/// Works whether the daemon runs or not.
#[derive(Debug, clap::Args)]
pub(crate) struct LogsArgs {
    /// Go on with what comes
    #[arg(short, long)]
    follow: bool,
    /// Print the last lines only
    #[arg(short = 'n', long, value_name = "LINES")]
    lines: Option<usize>,
    /// Do not escape control characters, also on a terminal
    #[arg(long)]
    raw: bool,
}

pub(crate) fn run(args: LogsArgs) -> Outcome {
    let path = Context::from_env()?.paths.daemon_log();
    let failed = |error: std::io::Error| {
        let failure = Failure::new(
            ErrorCode::BadFile,
            format!("cannot read the daemon's log `{}`", path.display()),
        );
        let missing = error.kind() == std::io::ErrorKind::NotFound;
        let failure = failure.caused_by(&error);
        if missing {
            failure.hint("the daemon makes it when it starts: `banger daemon start`")
        } else {
            failure
        }
    };
    // Watched before it is read, so that nothing is missed in between.
    let watch = if args.follow {
        Some(Watch::new(&path).map_err(failed)?)
    } else {
        None
    };
    let mut log = Log::open(&path).map_err(failed)?;
    let mut escaper = (std::io::stdout().is_terminal() && !args.raw).then(Escaper::default);
    let mut write = |bytes: &[u8]| match &mut escaper {
        Some(escaper) => print(&escaper.feed(bytes)),
        None => print_raw(bytes),
    };
    let all = log.read_new().map_err(failed)?;
    write(last_lines(&all, args.lines))?;
    let Some(watch) = watch else { return Ok(0) };
    loop {
        watch.wait().map_err(failed)?;
        write(&log.read_new().map_err(failed)?)?;
        if log.was_replaced(&path) {
            log = Log::open(&path).map_err(failed)?;
            write(&log.read_new().map_err(failed)?)?;
        }
    }
}

fn last_lines(text: &[u8], lines: Option<usize>) -> &[u8] {
    let Some(lines) = lines else { return text };
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    let ends = body
        .iter()
        .enumerate()
        .rev()
        .filter(|(_, byte)| **byte == b'\n');
    match lines
        .checked_sub(1)
        .and_then(|skip| ends.map(|(at, _)| at).nth(skip))
    {
        _ if lines == 0 => &[],
        Some(at) => &text[at + 1..],
        None => text,
    }
}

/// The log, as far as it was read.
struct Log {
    file: File,
}

impl Log {
    fn open(path: &Path) -> std::io::Result<Self> {
        Ok(Self {
            file: File::open(path)?,
        })
    }

    fn read_new(&mut self) -> std::io::Result<Vec<u8>> {
        if self.file.metadata()?.size() < self.file.stream_position()? {
            self.file.seek(SeekFrom::Start(0))?;
        }
        let mut bytes = Vec::new();
        self.file.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Whether the log was rotated: another file is in its place.
    fn was_replaced(&self, path: &Path) -> bool {
        match (self.file.metadata(), std::fs::metadata(path)) {
            (Ok(ours), Ok(now)) => (ours.dev(), ours.ino()) != (now.dev(), now.ino()),
            _ => false,
        }
    }
}

/// Wakes up when the log grows or is rotated.
struct Watch {
    fd: std::os::fd::OwnedFd,
    path: PathBuf,
}

impl Watch {
    fn new(path: &Path) -> std::io::Result<Self> {
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC)?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        inotify::add_watch(
            &fd,
            folder,
            inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO,
        )?;
        let watch = Self {
            fd,
            path: path.to_owned(),
        };
        watch.watch_file()?;
        Ok(watch)
    }

    /// Watches the file that is now in the log's place; the same one twice counts once.
    fn watch_file(&self) -> std::io::Result<()> {
        match inotify::add_watch(&self.fd, &self.path, inotify::WatchFlags::MODIFY) {
            Ok(_) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn wait(&self) -> std::io::Result<()> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        inotify::Reader::new(&self.fd, &mut buffer).next()?;
        self.watch_file()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_whole_lines() {
        let text = b"a\nb\nc\n";
        assert_eq!(last_lines(text, None), text);
        assert_eq!(last_lines(text, Some(2)), b"b\nc\n");
        assert_eq!(last_lines(text, Some(9)), text);
        assert_eq!(last_lines(text, Some(0)), b"");
        assert_eq!(last_lines(b"a\nb", Some(1)), b"b");
    }

    #[test]
    fn a_rotated_log_is_read_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bangerd.log");
        std::fs::write(&path, "one\n").unwrap();
        let watch = Watch::new(&path).unwrap();
        let mut log = Log::open(&path).unwrap();
        assert_eq!(log.read_new().unwrap(), b"one\n");
        std::fs::rename(&path, folder.path().join("bangerd.log.1")).unwrap();
        std::fs::write(&path, "two\n").unwrap();
        watch.wait().unwrap();
        assert!(log.was_replaced(&path));
        assert_eq!(Log::open(&path).unwrap().read_new().unwrap(), b"two\n");
    }
}
