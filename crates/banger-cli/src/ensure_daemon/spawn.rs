//! Spawns `bangerd` and reads its readiness: one JSON line on its stdout.

use crate::report::Failure;
use banger_api::error::{ErrorBody, ErrorCode};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long the daemon may take to get ready; it looks at every VM first.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// The longest line of readiness, in bytes.
const MAX_LINE: usize = 1 << 20;
/// How much of what it said on stderr is shown, in bytes.
const MAX_SAID: usize = 4096;

/// What the daemon says when it is ready, or cannot become so.
#[derive(Debug, serde::Deserialize)]
#[serde(untagged)]
enum Readiness {
    Ready {
        #[expect(dead_code, reason = "its presence is the message")]
        ready: bool,
    },
    Failed {
        error: ErrorBody,
    },
}

/// Starts `program` and returns when it is ready. It leaves this process's session by itself.
pub(super) fn spawn(program: &Path) -> Result<(), Failure> {
    let failed = |what: &str, error: std::io::Error| {
        Failure::new(
            ErrorCode::DaemonUnreachable,
            format!("cannot start `{}`", program.display()),
        )
        .caused_by(&std::io::Error::new(
            error.kind(),
            format!("{what}: {error}"),
        ))
    };
    // Held in memory, so that a daemon that outlives this process never writes to a closed pipe.
    let said = rustix::fs::memfd_create("bangerd-stderr", MemfdFlags::CLOEXEC)
        .map_err(|error| failed("a place for its messages", error.into()))?;
    let said = File::from(said);
    let for_child = said
        .try_clone()
        .map_err(|error| failed("a place for its messages", error))?;
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place where the command line starts the daemon"
    )]
    let mut child = Command::new(program)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(for_child)
        .current_dir("/")
        .spawn()
        .map_err(|error| failed("cannot run it", error))?;
    let line = read_line(&mut child);
    match line {
        Ok(Some(line)) => match serde_json::from_slice(&line) {
            Ok(Readiness::Ready { .. }) => Ok(()),
            Ok(Readiness::Failed { error }) => {
                // It said why; how it ends adds nothing.
                let _ = child.wait();
                Err(error.into())
            }
            Err(error) => {
                end(&mut child);
                let message = format!(
                    "`{}` said something else than that it is ready",
                    program.display()
                );
                Err(Failure::new(ErrorCode::DaemonUnreachable, message).caused_by(&error))
            }
        },
        Ok(None) => {
            let status = child
                .wait()
                .map(|status| status.to_string())
                .unwrap_or_default();
            let message = format!(
                "`{}` ended before it was ready ({status})",
                program.display()
            );
            Err(with_last_words(
                Failure::new(ErrorCode::DaemonUnreachable, message),
                said,
            ))
        }
        Err(error) => {
            end(&mut child);
            let message = format!("`{}` did not get ready", program.display());
            Err(with_last_words(
                Failure::new(ErrorCode::DaemonUnreachable, message).caused_by(&error),
                said,
            ))
        }
    }
}

/// Reads the child's stdout up to a newline; `None` if it ends before one.
fn read_line(child: &mut Child) -> std::io::Result<Option<Vec<u8>>> {
    let Some(mut stdout) = child.stdout.take() else {
        return Ok(None);
    };
    let deadline = Instant::now() + READY_LIMIT;
    let mut line = Vec::new();
    let mut buffer = [0; 4096];
    while line.len() < MAX_LINE {
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = Timespec::try_from(left).map_err(std::io::Error::other)?;
        let mut fds = [PollFd::new(&stdout, PollFlags::IN)];
        match poll(&mut fds, Some(&limit)) {
            Ok(0) => {
                let message = format!("it said nothing for {} s", READY_LIMIT.as_secs());
                return Err(std::io::Error::new(std::io::ErrorKind::TimedOut, message));
            }
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let count = stdout.read(&mut buffer)?;
        line.extend_from_slice(&buffer[..count]);
        if let Some(end) = line.iter().position(|&byte| byte == b'\n') {
            line.truncate(end);
            return Ok(Some(line));
        }
        if count == 0 {
            return Ok((!line.is_empty()).then_some(line));
        }
    }
    Ok(Some(line))
}

/// Ends a daemon that will not get ready; VMs never depend on it.
fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

fn with_last_words(failure: Failure, mut said: File) -> Failure {
    let mut text = Vec::new();
    let read = said.rewind().and_then(|()| said.read_to_end(&mut text));
    let start = text.len().saturating_sub(MAX_SAID);
    let mut failure = failure.hint("`banger daemon logs` shows what the daemon said last");
    if read.is_ok() {
        let lines = String::from_utf8_lossy(&text[start..]);
        failure.0.causes.extend(
            lines
                .lines()
                .filter(|line| !line.trim().is_empty())
                .map(str::to_owned),
        );
    }
    failure
}
