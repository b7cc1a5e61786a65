//! The way out of an ordinary user's namespace: `pasta`, held outside of it by a small process of its own.
//!
//! `pasta` keeps the namespace that it serves alive and never ends by itself (its watch for the end of a namespace
//! knows only those with a name on disk), so somebody must end it with the keeper: this process, which nobody needs to
//! keep alive. If it is killed itself, the kernel kills `pasta`.

use banger_host::exec::timespec;
use banger_host::net::keeper::Readiness;
use banger_host::op::UPLINK;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long `pasta` may take to set up the namespace's device.
const READY_LIMIT: Duration = Duration::from_secs(20);
/// The end of what it said that is kept for an error, in bytes.
const KEPT_WORDS: usize = 2048;

/// There is no way out, or none any more.
#[derive(Debug, thiserror::Error)]
pub enum WayOutError {
    /// The keeper has ended.
    #[error("the keeper of the network namespace (process {0}) is gone")]
    NoKeeper(i32, #[source] io::Error),
    /// It cannot be started.
    #[error("cannot start `{}` (is `passt` installed?)", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It gave up.
    #[error("`{}` {how}{}", program.display(), said(.words))]
    Failed {
        /// The program.
        program: PathBuf,
        /// `ended with …`.
        how: String,
        /// The end of what it said.
        words: String,
    },
    /// It cannot be waited for.
    #[error("cannot wait for `pasta`")]
    Wait(#[source] io::Error),
}

fn said(words: &str) -> String {
    if words.is_empty() {
        String::new()
    } else {
        format!(": {words}")
    }
}

/// Gives the namespace of the process `keeper` a way out, says `ready` when it is there, and holds it until the keeper
/// ends. No port of the host leads in, and no address leads to the host's loopback.
///
/// # Errors
/// `pasta` could not be started, or ended by itself.
pub fn hold(keeper: i32, pasta: &Path, ready: impl FnOnce(&Readiness)) -> Result<(), WayOutError> {
    let gone = |errno: Errno| WayOutError::NoKeeper(keeper, errno.into());
    let pid = Pid::from_raw(keeper).ok_or_else(|| gone(Errno::INVAL))?;
    let keeper_ends = pidfd_open(pid, PidfdFlags::empty()).map_err(gone)?;
    let mut child = start(pid, pasta).map_err(|source| WayOutError::Start {
        program: pasta.to_owned(),
        source,
    })?;
    let held = watch(&mut child, &keeper_ends, pasta, ready);
    let _ = child.kill();
    let _ = child.wait();
    held
}

fn start(keeper: Pid, pasta: &Path) -> io::Result<Child> {
    let namespace = |name| format!("/proc/{}/ns/{name}", keeper.as_raw_nonzero());
    #[expect(
        clippy::disallowed_methods,
        reason = "the named place that starts the way out"
    )]
    let mut command = Command::new(pasta);
    // Only what the `pasta` of 2023 knows as well.
    command
        .args(["--foreground", "--quiet", "--ipv4-only", "--config-net"])
        .args(["--netns", &namespace("net"), "--userns", &namespace("user")])
        .args(["--ns-ifname", UPLINK])
        .args([
            "--no-map-gw",
            "--no-dhcp",
            "--no-dhcpv6",
            "--no-ra",
            "--no-ndp",
        ])
        .args(["-t", "none", "-u", "none", "-T", "none", "-U", "none"])
        // It writes its number when all is set up: here.
        .args(["--pid", "/proc/self/fd/1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    end_with_this_process(&mut command);
    command.spawn()
}

#[expect(unsafe_code, reason = "one system call between fork and exec")]
fn end_with_this_process(command: &mut Command) {
    let parent = rustix::process::getpid();
    let work = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // It may have ended before the call.
        if rustix::process::getppid() == Some(parent) {
            Ok(())
        } else {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    };
    // SAFETY: it makes system calls only, and allocates nothing.
    unsafe { command.pre_exec(work) };
}

/// Until the keeper's end, or an error about the child.
fn watch(
    child: &mut Child,
    keeper_ends: &OwnedFd,
    pasta: &Path,
    ready: impl FnOnce(&Readiness),
) -> Result<(), WayOutError> {
    let failed = |errno: Errno| WayOutError::Wait(errno.into());
    let missing = || WayOutError::Wait(io::ErrorKind::NotConnected.into());
    let child_ends = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).map_err(failed)?;
    let mut number = child.stdout.take();
    let mut errors = Some(child.stderr.take().ok_or_else(missing)?);
    let mut words = Vec::new();
    let mut ready = Some(ready);
    let deadline = Instant::now() + READY_LIMIT;
    loop {
        let mut fds = vec![
            PollFd::new(keeper_ends, PollFlags::IN),
            PollFd::new(&child_ends, PollFlags::IN),
        ];
        let pipes = [
            number.as_ref().map(AsFd::as_fd),
            errors.as_ref().map(AsFd::as_fd),
        ];
        let there = pipes.map(|pipe| pipe.is_some());
        for pipe in pipes.into_iter().flatten() {
            fds.push(PollFd::from_borrowed_fd(pipe, PollFlags::IN));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = ready.is_some().then(|| timespec(left));
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(failed(errno)),
        }
        let mut signalled = fds.iter().map(|fd| !fd.revents().is_empty());
        let [keeper_ended, child_ended] = [signalled.next(), signalled.next()];
        let [wrote, spoke] = there.map(|there| there && signalled.next().unwrap_or_default());
        if spoke && !listen(&mut errors, &mut words) {
            errors = None;
        }
        if keeper_ended == Some(true) {
            return Ok(());
        }
        if child_ended == Some(true) {
            let how = match child.wait() {
                Ok(status) => format!("ended ({status})"),
                Err(error) => return Err(WayOutError::Wait(error)),
            };
            while listen(&mut errors, &mut words) {}
            return Err(given_up(pasta, how, &words));
        }
        if wrote {
            let written = number.as_mut().map(|pipe| pipe.read(&mut [0; 64]));
            if matches!(written, Some(Ok(1..)))
                && let Some(ready) = ready.take()
            {
                ready(&Readiness::Ready(true));
            }
            number = None;
        }
        if ready.is_some() && left.is_zero() {
            let how = format!("was not ready within {} s", READY_LIMIT.as_secs());
            return Err(given_up(pasta, how, &words));
        }
    }
}

/// Reads on; nothing more comes if this is false.
fn listen(pipe: &mut Option<impl Read>, words: &mut Vec<u8>) -> bool {
    let mut buffer = [0; 1024];
    match pipe.as_mut().map(|pipe| pipe.read(&mut buffer)) {
        Some(Ok(length @ 1..)) => {
            words.extend_from_slice(&buffer[..length]);
            let surplus = words.len().saturating_sub(KEPT_WORDS);
            words.drain(..surplus);
            true
        }
        _ => false,
    }
}

fn given_up(pasta: &Path, how: String, words: &[u8]) -> WayOutError {
    WayOutError::Failed {
        program: pasta.to_owned(),
        how,
        words: told(words),
    }
}

/// What matters of it, in one line.
fn told(words: &[u8]) -> String {
    let text = String::from_utf8_lossy(words);
    let lines = text
        .lines()
        .map(|line| line.trim().replace(char::is_control, "?"))
        // It says this of every line where there is no system logger.
        .filter(|line| !line.is_empty() && !line.ends_with("bytes to syslog"));
    lines.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_pasta_said_without_its_noise() {
        let words = b"Failed to send 51 bytes to syslog\nCouldn't pick external interface: please specify\n";
        let error = given_up(
            Path::new("pasta"),
            "ended (exit status: 1)".to_owned(),
            words,
        );
        assert_eq!(
            error.to_string(),
            "`pasta` ended (exit status: 1): Couldn't pick external interface: please specify"
        );
    }
}
