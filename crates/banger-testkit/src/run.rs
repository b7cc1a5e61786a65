//! Running programs in tests, and the one place where tests wait for something that sends no word.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take before a test fails.
pub const LIMIT: Duration = Duration::from_secs(180);

/// How long what is promised to happen at once may take on a machine that is busy with something else.
pub const PROMPT: Duration = Duration::from_secs(10);

/// How often [`eventually`] looks.
const LOOK: Duration = Duration::from_millis(10);

/// What a program left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit code; 128 and the signal's number if a signal ended it.
    pub status: i32,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

/// A program that runs.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdout: File,
    stderr: File,
    name: String,
    folder: PathBuf,
}

impl Running {
    /// Starts `command` with its output kept aside.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn start(command: &mut Command) -> Self {
        let name = format!("{command:?}");
        let file = || tempfile::tempfile().expect("the folder for temporary files is writable");
        let (stdout, stderr) = (file(), file());
        let copy =
            |file: &File| Stdio::from(file.try_clone().expect("descriptors are not used up"));
        let child = command
            .stdin(Stdio::null())
            .stdout(copy(&stdout))
            .stderr(copy(&stderr))
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {name}: {error}"));
        Self {
            child,
            stdout,
            stderr,
            name,
            folder: command
                .get_current_dir()
                .map_or_else(|| PathBuf::from("/nowhere"), Path::to_owned),
        }
    }

    /// Waits until it ends.
    ///
    /// # Panics
    /// It does not end within [`LIMIT`].
    pub fn finish(mut self) -> Output {
        use std::os::unix::process::ExitStatusExt;
        let pid = i32::try_from(self.child.id()).expect("process ids are small");
        if !wait_exit(pid, LIMIT) {
            let threads = crate::host::threads(&self.folder);
            // It is ours; how it ends no longer matters.
            let _ = self.child.kill();
            let _ = self.child.wait();
            panic!("{} did not end within {LIMIT:?}\n{threads}", self.name);
        }
        let status = self.child.wait().expect("the child is ours");
        let text = |file: &mut File| {
            let mut bytes = Vec::new();
            file.rewind()
                .and_then(|()| file.read_to_end(&mut bytes))
                .expect("a temporary file can be read");
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Output {
            status: status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or_default()),
            stdout: text(&mut self.stdout),
            stderr: text(&mut self.stderr),
        }
    }
}

/// Waits until process `pid` has ended (a zombie has). `false` if it still lives after `limit`.
///
/// # Panics
/// It cannot be waited for.
pub fn wait_exit(pid: i32, limit: Duration) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    let Some(pid) = Pid::from_raw(pid) else {
        return true;
    };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
        return true;
    };
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).expect("limits are short");
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("cannot wait for a process: {error}"),
        }
    }
}

/// Sends `signal` to `pid`; no matter if it is gone.
pub fn signal(pid: i32, signal: rustix::process::Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Looks until `look` answers something.
///
/// # Panics
/// It does not within [`LIMIT`].
#[track_caller]
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        std::thread::sleep(LOOK);
    }
}
