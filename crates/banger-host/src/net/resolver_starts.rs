//! Hears when systemd-resolved starts: a new one may know nothing of what the last one was told.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use rustix::io::Errno;
use std::io;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};

/// Where its folder is, which is its own and may come and go.
const PARENT: &str = "/run/systemd";
const FOLDER: &str = "resolve";
/// The socket that it makes when it starts.
const SOCKET: &str = "io.systemd.Resolve";

/// Hears of every start of systemd-resolved.
#[derive(Debug)]
pub struct ResolverStarts {
    inotify: OwnedFd,
    folder: PathBuf,
}

impl ResolverStarts {
    /// Listens from now on; `None` where there is no systemd.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn open() -> io::Result<Option<Self>> {
        match Self::below(Path::new(PARENT)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            opened => opened.map(Some),
        }
    }

    fn below(parent: &Path) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        inotify::add_watch(&inotify, parent, WatchFlags::CREATE | WatchFlags::ONLYDIR)?;
        let starts = Self {
            inotify,
            folder: parent.join(FOLDER),
        };
        starts.watch_folder()?;
        Ok(starts)
    }

    /// Watches the folder that there is now; says whether there is one.
    fn watch_folder(&self) -> io::Result<bool> {
        let flags = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::ONLYDIR;
        match inotify::add_watch(&self.inotify, &self.folder, flags) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Takes all that was heard; says whether it has started.
    pub(super) fn drain(&self) -> io::Result<bool> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = Reader::new(&self.inotify, &mut buffer);
        let (mut started, mut new_folder) = (false, false);
        loop {
            match reader.next() {
                Ok(event) => {
                    let name = event.file_name().map(std::ffi::CStr::to_bytes);
                    started |= name == Some(SOCKET.as_bytes());
                    new_folder |= name == Some(FOLDER.as_bytes());
                }
                Err(Errno::WOULDBLOCK) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        // The socket may have come before the watch.
        if new_folder && self.watch_folder()? {
            started |= self.folder.join(SOCKET).exists();
        }
        Ok(started)
    }
}

impl AsFd for ResolverStarts {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_heard_in_a_folder_that_is_there_one_that_comes_and_one_that_comes_again() {
        let parent = tempfile::tempdir().unwrap();
        let starts = ResolverStarts::below(parent.path()).unwrap();
        let folder = parent.path().join(FOLDER);
        assert!(!starts.drain().unwrap());
        for _ in 0..2 {
            std::fs::create_dir(&folder).unwrap();
            assert!(!starts.drain().unwrap());
            // Written all the time.
            std::fs::write(folder.join("stub-resolv.conf"), "").unwrap();
            assert!(!starts.drain().unwrap());
            std::fs::write(folder.join(SOCKET), "").unwrap();
            assert!(starts.drain().unwrap());
            assert!(!starts.drain().unwrap());
            std::fs::remove_dir_all(&folder).unwrap();
        }
        // Both before anybody looks.
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join(SOCKET), "").unwrap();
        assert!(starts.drain().unwrap());
    }

    #[test]
    fn without_systemd_there_is_nothing_to_hear() {
        let error = ResolverStarts::below(Path::new("/nonexistent")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
