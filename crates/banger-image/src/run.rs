//! The one place that starts programs: mmdebstrap, apt, mke2fs and e2fsck.

use crate::context::Context;
use crate::error::BuildError;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The most that is kept of what a program writes to its standard output.
const MAX_OUTPUT: u64 = 16 << 20;
/// The longest line of standard error that is passed on.
const MAX_LINE: u64 = 4096;
/// How many lines of standard error an error message quotes.
const TAIL_LINES: usize = 12;
/// How often a running program's build is asked whether it is cancelled.
const CANCEL_GRAIN: Duration = Duration::from_millis(50);
/// How long a program may clean up after itself before it is killed.
const GRACE: Duration = Duration::from_secs(10);

/// A program to run, with everything that it may see.
pub(crate) struct Program<'a> {
    /// Its name, looked up in `PATH` and the system's own folders.
    pub(crate) name: &'static str,
    /// The Debian package that has it.
    pub(crate) package: &'static str,
    /// Its arguments.
    pub(crate) arguments: Vec<OsString>,
    /// The folder it runs in.
    pub(crate) folder: Option<&'a Path>,
    /// More environment; it is always given `LC_ALL=C`.
    pub(crate) environment: Vec<(&'static str, OsString)>,
    /// After this time it is killed.
    pub(crate) limit: Duration,
    /// The stage under which its lines of standard error are reported; `None` reports nothing.
    pub(crate) stage: Option<&'static str>,
}

/// How a program ended and what it said.
pub(crate) struct Outcome {
    /// How it ended.
    pub(crate) status: ExitStatus,
    /// The start of its standard output, at most 16 MiB.
    pub(crate) stdout: Vec<u8>,
    /// The last lines of its standard error.
    pub(crate) stderr: String,
}

/// What reads a program's standard output.
pub(crate) type Reader<'a> = &'a mut (dyn FnMut(&mut dyn Read) -> Result<(), BuildError> + Send);

/// Where `program` is, if it is installed.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join(program))
        .find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok())
}

impl Program<'_> {
    /// Runs the program to its end; its standard output is kept.
    pub(crate) fn run(self, context: &Context) -> Result<Outcome, BuildError> {
        let mut stdout = Vec::new();
        let name = self.name;
        let mut outcome = self.stream(context, &mut |pipe| {
            pipe.take(MAX_OUTPUT)
                .read_to_end(&mut stdout)
                .map_err(|source| BuildError::ProgramStart {
                    program: name,
                    source,
                })?;
            Ok(())
        })?;
        outcome.stdout = stdout;
        Ok(outcome)
    }

    /// Runs the program to its end and fails unless it succeeded.
    pub(crate) fn succeed(self, context: &Context) -> Result<Outcome, BuildError> {
        let name = self.name;
        self.run(context)?.check(name)
    }

    /// Runs the program while `reader` takes its standard output. The program is killed when the build is cancelled,
    /// its time is over or `reader` fails.
    pub(crate) fn stream(
        self,
        context: &Context,
        reader: Reader<'_>,
    ) -> Result<Outcome, BuildError> {
        context.check()?;
        let path = find(self.name).ok_or(BuildError::ProgramMissing {
            program: self.name,
            package: self.package,
        })?;
        let failed = |source| BuildError::ProgramStart {
            program: self.name,
            source,
        };
        #[expect(
            clippy::disallowed_methods,
            reason = "builds run for minutes, stream their output and can be cancelled"
        )]
        let mut command = std::process::Command::new(path);
        command
            .args(&self.arguments)
            .env("LC_ALL", "C")
            .envs(self.environment.iter().map(|(k, v)| (k, v)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        if let Some(folder) = self.folder {
            command.current_dir(folder);
        }
        let mut child = command.spawn().map_err(failed)?;
        let stdout = child.stdout.take().expect("standard output is piped");
        let stderr = child.stderr.take().expect("standard error is piped");
        let stage = self.stage;
        let deadline = Instant::now() + self.limit;
        std::thread::scope(|scope| {
            let errors = scope.spawn(move || read_lines(stderr, stage, context));
            let output = scope.spawn(move || {
                let mut stdout = stdout;
                reader(&mut stdout)
            });
            let waited = wait(&mut child, deadline, context);
            let read = output
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let stderr = errors
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            match waited.map_err(failed)? {
                // A reader that gave up is why the program then failed.
                End::Exited(status) => read.map(|()| (status, stderr)),
                End::Cancelled => Err(BuildError::Cancelled),
                End::TimedOut => Err(BuildError::TimedOut {
                    program: self.name,
                    seconds: self.limit.as_secs(),
                }),
            }
        })
        .map(|(status, stderr)| Outcome {
            status,
            stdout: Vec::new(),
            stderr,
        })
    }
}

impl Outcome {
    /// Fails unless the program succeeded.
    pub(crate) fn check(self, program: &'static str) -> Result<Self, BuildError> {
        if self.status.success() {
            return Ok(self);
        }
        Err(BuildError::ProgramFailed {
            program,
            status: self.status.to_string(),
            stderr: self.stderr,
        })
    }
}

enum End {
    Exited(ExitStatus),
    Cancelled,
    TimedOut,
}

/// Waits for the child's exit, a cancel or the deadline. A reader that gives up closes the pipe, so that the child
/// ends by itself.
fn wait(child: &mut Child, deadline: Instant, context: &Context) -> std::io::Result<End> {
    let pid = Pid::from_child(child);
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    loop {
        if exited(&pidfd, CANCEL_GRAIN)? {
            return child.wait().map(End::Exited);
        }
        let end = if context.check().is_err() {
            End::Cancelled
        } else if Instant::now() >= deadline {
            End::TimedOut
        } else {
            continue;
        };
        // The program may have to clean up (mmdebstrap removes its folder), so it is asked first.
        let _ = rustix::process::kill_process(pid, Signal::TERM);
        exited(&pidfd, GRACE)?;
        // The group outlives its leader while a grandchild holds the pipes.
        let _ = rustix::process::kill_process_group(pid, Signal::KILL);
        child.wait()?;
        return Ok(end);
    }
}

fn exited(pidfd: &OwnedFd, limit: Duration) -> std::io::Result<bool> {
    let limit = Timespec::try_from(limit).map_err(std::io::Error::other)?;
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    match rustix::event::poll(&mut fds, Some(&limit)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Reads lines to the end of the pipe, reports them and returns the last ones, printable.
fn read_lines(pipe: impl Read, stage: Option<&'static str>, context: &Context) -> String {
    let mut reader = BufReader::new(pipe);
    let mut tail = std::collections::VecDeque::new();
    loop {
        let mut line = Vec::new();
        match reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        let line = printable(&line);
        if line.is_empty() {
            continue;
        }
        if let Some(stage) = stage {
            context.tell(stage, &line);
        }
        if tail.len() == TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(line);
    }
    tail.make_contiguous().join("; ")
}

/// The text of `bytes` without control characters.
pub(crate) fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .trim()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn shell(script: &str) -> Program<'static> {
        Program {
            name: "sh",
            package: "dash",
            arguments: vec!["-c".into(), script.into()],
            folder: None,
            environment: Vec::new(),
            limit: Duration::from_secs(20),
            stage: Some("test"),
        }
    }

    #[test]
    fn a_failing_program_is_quoted_without_its_control_characters() {
        let context = Context::quiet("/nonexistent");
        let error = shell("printf 'a\\033[2Jb\\n' >&2; exit 3")
            .succeed(&context)
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("exit status: 3"), "{error}");
        assert!(
            error.contains("a [2Jb") && !error.contains('\u{1b}'),
            "{error:?}"
        );
    }

    #[test]
    fn a_program_that_is_not_there_names_its_package() {
        let program = Program {
            name: "banger-no-such-program",
            package: "some-package",
            ..shell("")
        };
        let error = program.run(&Context::quiet("/nonexistent")).err().unwrap();
        assert!(error.hint().unwrap().contains("some-package"));
    }

    #[test]
    fn a_cancel_ends_the_program_and_its_children() {
        let cancel = Arc::new(AtomicBool::new(false));
        let context = Context {
            cancel: Arc::clone(&cancel),
            progress: Box::new(move |_| cancel.store(true, Ordering::Relaxed)),
            ..Context::quiet("/nonexistent")
        };
        let started = Instant::now();
        let result = shell("(sleep 600) & echo running >&2; wait").run(&context);
        assert!(matches!(result, Err(BuildError::Cancelled)));
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_program_that_takes_too_long_is_killed() {
        let program = Program {
            limit: Duration::from_millis(100),
            ..shell("sleep 600")
        };
        let result = program.run(&Context::quiet("/nonexistent"));
        assert!(matches!(result, Err(BuildError::TimedOut { .. })));
    }

    #[test]
    fn a_reader_that_fails_ends_the_program() {
        let context = Context::quiet("/nonexistent");
        let result = shell("yes").stream(&context, &mut |_| Err(BuildError::NoAptLists));
        assert!(matches!(result, Err(BuildError::NoAptLists)));
    }
}
