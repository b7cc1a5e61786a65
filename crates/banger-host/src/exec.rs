//! The one place that runs short commands: fixed locale, no stdin unless given, bounded output, a time limit, and
//! an error that says what was run and what it said.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The most that is kept of each of stdout (its beginning) and stderr (its end), in bytes.
pub const MAX_CAPTURED_BYTES: usize = 1024 * 1024;
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
const STDERR_LINES_IN_ERRORS: usize = 5;
/// Where programs are that administrators use. An ordinary user may lack these on PATH, as on Debian.
const ADMINISTRATION: [&str; 2] = ["/usr/sbin", "/sbin"];

/// Where `program` is: on PATH, or where administrators' programs are.
pub fn find(program: &str) -> Option<PathBuf> {
    find_on(&std::env::var_os("PATH").unwrap_or_default(), program)
}

fn find_on(path: &OsStr, program: &str) -> Option<PathBuf> {
    std::env::split_paths(path)
        .chain(ADMINISTRATION.map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|file| {
            file.is_file() && rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok()
        })
}

/// A command about to run.
#[derive(Debug, Clone)]
pub struct Run {
    program: OsString,
    args: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    stdin: Option<Vec<u8>>,
    stdout: Option<Arc<File>>,
    timeout: Duration,
}

/// What a command that succeeded wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its standard output, cut after [`MAX_CAPTURED_BYTES`].
    pub stdout: Vec<u8>,
    /// The end of its standard error, at most [`MAX_CAPTURED_BYTES`].
    pub stderr: Vec<u8>,
}

/// A command that could not run, or did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// There is no such program.
    #[error("program `{program}` is not installed")]
    Missing {
        /// As it was asked for.
        program: String,
    },
    /// It ended with something else than success.
    #[error("`{command}` failed ({status}){}", said(.stderr))]
    Failed {
        /// Program and arguments.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// Its last lines on standard error, escaped.
        stderr: String,
    },
    /// It was killed because it took too long.
    #[error("`{command}` did not end within {} s and was killed{}", .timeout.as_secs_f32(), said(.stderr))]
    TimedOut {
        /// Program and arguments.
        command: String,
        /// The limit.
        timeout: Duration,
        /// Its last lines on standard error, escaped.
        stderr: String,
    },
    /// It could not be started or heard.
    #[error("cannot run `{command}`")]
    Io {
        /// Program and arguments.
        command: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn said(stderr: &str) -> String {
    if stderr.is_empty() {
        String::new()
    } else {
        format!(": {stderr}")
    }
}

impl Run {
    /// A command that runs `program`, which [`find`] looks for if it has no slash.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            environment: Vec::new(),
            stdin: None,
            stdout: None,
            timeout: DEFAULT_TIMEOUT,
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets a variable of its environment, beside what it inherits.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// What it reads on standard input; nothing without this.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    /// Where it writes its standard output, which is then not captured; it has this open until it ends.
    #[must_use]
    pub fn stdout_to(mut self, file: Arc<File>) -> Self {
        self.stdout = Some(file);
        self
    }

    /// How long it may take; 30 s without this.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Runs it to its end. It, and what it started, is killed when the time is over.
    ///
    /// # Errors
    /// The program is missing, ends with something else than success, or takes too long.
    pub fn run(self) -> Result<Output, ExecError> {
        let command = self.command_line();
        tracing::debug!(command, "run");
        let failed = |source| ExecError::Io {
            command: command.clone(),
            source,
        };
        let mut child = match self.spawn() {
            Ok(child) => child,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ExecError::Missing {
                    program: self.program.to_string_lossy().into_owned(),
                });
            }
            Err(source) => return Err(failed(source)),
        };
        let heard = Heard::listen(&mut child, self.stdin.as_deref(), self.timeout);
        // The child is not reaped yet, so its id, and its group's, is still its own. What it left behind goes too.
        if let Some(group) = Pid::from_raw(child.id().cast_signed()) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let status = child.wait().map_err(failed)?;
        let heard = heard.map_err(failed)?;
        let stderr = last_lines(&heard.stderr);
        if !heard.ended {
            return Err(ExecError::TimedOut {
                command,
                timeout: self.timeout,
                stderr,
            });
        }
        if !status.success() {
            return Err(ExecError::Failed {
                command,
                status,
                stderr,
            });
        }
        Ok(Output {
            stdout: heard.stdout,
            stderr: heard.stderr,
        })
    }

    fn spawn(&self) -> io::Result<Child> {
        #[expect(
            clippy::disallowed_methods,
            reason = "the one place that runs short commands"
        )]
        let mut command = Command::new(self.place());
        command
            .args(&self.args)
            .env("LC_ALL", "C")
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(if self.stdin.is_some() {
                Stdio::piped()
            } else {
                Stdio::null()
            })
            .stdout(match &self.stdout {
                Some(file) => file.try_clone()?.into(),
                None => Stdio::piped(),
            })
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
    }

    /// The program's path; its name as it is if it is nowhere.
    fn place(&self) -> OsString {
        let name = self.program.to_str().filter(|name| !name.contains('/'));
        name.and_then(find)
            .map_or_else(|| self.program.clone(), PathBuf::into_os_string)
    }

    fn command_line(&self) -> String {
        std::iter::once(&self.program)
            .chain(&self.args)
            .map(|word| {
                let word = word.to_string_lossy();
                if word.is_empty() || word.contains(|c: char| c.is_whitespace() || c.is_control()) {
                    format!("{word:?}")
                } else {
                    word.into_owned()
                }
            })
            .collect::<Vec<_>>()
            .join(" ")
    }
}

fn last_lines(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    lines[lines.len().saturating_sub(STDERR_LINES_IN_ERRORS)..]
        .iter()
        .map(|line| line.escape_debug().to_string())
        .collect::<Vec<_>>()
        .join("; ")
}

/// What was heard of a child, and whether it ended by itself.
struct Heard {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    ended: bool,
}

impl Heard {
    /// Feeds and hears the child until it ends or the time is over, all in one thread. A grandchild that keeps a
    /// pipe open does not keep us.
    fn listen(child: &mut Child, stdin: Option<&[u8]>, timeout: Duration) -> io::Result<Self> {
        let deadline = Instant::now() + timeout;
        let pid = Pid::from_raw(child.id().cast_signed()).ok_or(Errno::SRCH)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let mut input = child.stdin.take().zip(stdin);
        let mut stdout = child.stdout.take();
        let mut stderr = child.stderr.take();
        for fd in [
            input
                .as_ref()
                .map(|(pipe, _)| rustix::fd::AsFd::as_fd(pipe)),
            stdout.as_ref().map(rustix::fd::AsFd::as_fd),
            stderr.as_ref().map(rustix::fd::AsFd::as_fd),
        ]
        .into_iter()
        .flatten()
        {
            rustix::io::ioctl_fionbio(fd, true)?;
        }
        let mut heard = Self {
            stdout: Vec::new(),
            stderr: Vec::new(),
            ended: false,
        };
        while !heard.ended {
            let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN)];
            if let Some((pipe, _)) = &input {
                fds.push(PollFd::new(pipe, PollFlags::OUT));
            }
            if let Some(pipe) = &stdout {
                fds.push(PollFd::new(pipe, PollFlags::IN));
            }
            if let Some(pipe) = &stderr {
                fds.push(PollFd::new(pipe, PollFlags::IN));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match poll(&mut fds, Some(&timespec(left))) {
                Ok(0) => return Ok(heard),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            heard.ended = !fds[0].revents().is_empty();
            drop(fds);
            if let Some((pipe, rest)) = &mut input
                && feed(pipe, rest)
            {
                input = None;
            }
            if let Some(pipe) = &mut stdout
                && drain(pipe, &mut heard.stdout, Keep::Beginning)?
            {
                stdout = None;
            }
            if let Some(pipe) = &mut stderr
                && drain(pipe, &mut heard.stderr, Keep::End)?
            {
                stderr = None;
            }
        }
        Ok(heard)
    }
}

/// `duration` as system calls take it.
pub fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

/// Writes what fits; says whether this was all (a child that reads no more is done too).
fn feed(pipe: &mut impl Write, rest: &mut &[u8]) -> bool {
    while !rest.is_empty() {
        match pipe.write(rest) {
            Ok(written) => *rest = &rest[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return true,
        }
    }
    true
}

#[derive(Clone, Copy)]
enum Keep {
    Beginning,
    End,
}

/// Reads what is there; says whether the pipe is at its end.
fn drain(pipe: &mut impl Read, into: &mut Vec<u8>, keep: Keep) -> io::Result<bool> {
    let mut buffer = [0; 16 * 1024];
    loop {
        match pipe.read(&mut buffer) {
            Ok(0) => return Ok(true),
            Ok(read) => {
                into.extend_from_slice(&buffer[..read]);
                if into.len() > MAX_CAPTURED_BYTES {
                    match keep {
                        Keep::Beginning => into.truncate(MAX_CAPTURED_BYTES),
                        Keep::End => drop(into.drain(..into.len() - MAX_CAPTURED_BYTES)),
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    fn shell(script: &str) -> Run {
        Run::new("sh").args(["-c", script])
    }

    #[test]
    fn what_goes_in_comes_out_even_when_it_is_larger_than_a_pipe() {
        let bytes = vec![b'x'; 300_000];
        let output = Run::new("cat").stdin(bytes.clone()).run().unwrap();
        assert_eq!(output.stdout, bytes);
    }

    #[test]
    fn what_it_writes_goes_where_it_is_sent_and_that_is_open_until_it_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("said");
        let file = Arc::new(File::create(&path).unwrap());
        file.lock().unwrap();
        let running = shell("read go; echo hello").stdin("go\n").stdout_to(file);
        assert_eq!(running.clone().run().unwrap().stdout, b"");
        assert_eq!(std::fs::read(&path).unwrap(), b"hello\n");
        // Somebody else's view of the file, as long as the program has it open and after that.
        let other = File::open(&path).unwrap();
        let mut child = running.spawn().unwrap();
        drop(running);
        assert!(other.try_lock().is_err());
        drop(child.stdin.take());
        child.wait().unwrap();
        other.try_lock().unwrap();
    }

    #[test]
    fn without_input_a_command_reads_the_end_at_once() {
        assert_eq!(Run::new("cat").run().unwrap().stdout, b"");
    }

    #[test]
    fn a_failure_names_command_status_and_last_words() {
        let error = shell("echo one >&2; echo 'two three' >&2; exit 7")
            .run()
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("exit status: 7") && error.ends_with(": one; two three"),
            "{error}"
        );
    }

    #[test]
    fn a_missing_program_is_told_apart() {
        let error = Run::new("banger-no-such-program").run().unwrap_err();
        assert!(
            matches!(error, ExecError::Missing { program } if program == "banger-no-such-program")
        );
    }

    #[test]
    fn what_administrators_use_is_found_without_a_path_to_it() {
        let folder = tempfile::tempdir().unwrap();
        // What everybody has there.
        let program = ["ip", "ldconfig", "chroot"].into_iter().find(|program| {
            ADMINISTRATION
                .iter()
                .any(|folder| Path::new(folder).join(program).exists())
        });
        let found = find_on(folder.path().as_os_str(), program.unwrap()).unwrap();
        assert!(found.is_absolute());

        let own = folder.path().join(program.unwrap());
        std::fs::write(&own, "").unwrap();
        let find_own = || find_on(folder.path().as_os_str(), program.unwrap()).unwrap();
        assert_eq!(find_own(), found, "what cannot be executed is no program");
        std::fs::set_permissions(&own, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(find_own(), own);
        assert_eq!(find_on(OsStr::new(""), "banger-no-such-program"), None);
    }

    #[test]
    fn a_command_that_takes_too_long_is_killed_with_what_it_started() {
        let started = Instant::now();
        let error = shell("echo begun >&2; sleep 60 & sleep 60")
            .timeout(Duration::from_secs(2))
            .run()
            .unwrap_err();
        assert!(
            matches!(&error, ExecError::TimedOut { stderr, .. } if stderr == "begun"),
            "{error}"
        );
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_grandchild_that_keeps_the_pipes_open_does_not_keep_us() {
        let started = Instant::now();
        assert_eq!(
            shell("sleep 60 & echo done").run().unwrap().stdout,
            b"done\n"
        );
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn output_is_bounded() {
        let output =
            shell("head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2; printf end >&2")
                .run()
                .unwrap();
        assert_eq!(output.stdout.len(), MAX_CAPTURED_BYTES);
        assert_eq!(output.stderr.len(), MAX_CAPTURED_BYTES);
        assert!(output.stderr.ends_with(b"end"));
    }
}
