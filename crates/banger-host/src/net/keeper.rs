//! The client's side of `banger-netns`, the small process that lives in the instance's network namespace.

use super::seqpacket::{self, Place};
use crate::crash::{Side, point};
use crate::exec::{Run, timespec};
use crate::op::{NamespaceAnswer, NamespaceOp, NamespaceReply, NamespaceRequest};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::io::{self, BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long a keeper may take to be ready.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long an operation may take, beside what it was itself told to wait.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_READY_BYTES: usize = 64 * 1024;
/// A longer line is two.
const MAX_COMPLAINT_BYTES: u64 = 1024;

/// The one line that `banger-netns` writes to standard output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Readiness {
    /// Its socket accepts.
    Ready(bool),
    /// It gave up, and why.
    Error(String),
}

/// A door to a running `banger-netns`. Every request has a connection of its own, so one value serves any number of
/// threads.
#[derive(Debug)]
pub struct Keeper {
    socket: PathBuf,
    place: Place,
}

/// The keeper could not be started, reached, or did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// The program is not there or cannot be run.
    #[error("cannot start `{}`", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It started and gave up, or ended, or said nothing in time.
    #[error("the network namespace could not be made: {why}")]
    NotReady {
        /// What it said.
        why: String,
    },
    /// Nobody answers at the socket.
    #[error("cannot reach the keeper of the network namespace at `{}`", socket.display())]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its reply makes no sense to us.
    #[error("the keeper of the network namespace at `{}` gave a reply that is not understood", socket.display())]
    BadReply {
        /// The socket.
        socket: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// It tried and failed.
    #[error("{operation} failed in the network namespace: {why}")]
    Refused {
        /// The operation's name.
        operation: &'static str,
        /// The cause and its causes, in the keeper's words.
        why: String,
    },
}

impl Keeper {
    /// Starts `program` (a `banger-netns`) in new namespaces and waits until it serves `socket`. The process is in a
    /// session of its own and outlives this one as long as a [`NamespaceOp::Keepalive`] descriptor is held; ask for
    /// one within 30 s.
    ///
    /// # Errors
    /// It cannot be started, or says why it cannot make the namespaces, or is not ready in time.
    pub fn spawn(program: &Path, socket: &Path, user_namespace: bool) -> Result<Self, KeeperError> {
        let mut args = vec![OsStr::new("--socket"), socket.as_os_str()];
        if user_namespace {
            args.push(OsStr::new("--user-namespace"));
        }
        point("keeper", "spawn", Side::Before);
        start(program, &args)?;
        point("keeper", "spawn", Side::After);
        Self::connect(socket)
    }

    /// As [`Keeper::spawn`], in namespaces that are there already and have lost their keeper: files like
    /// `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// As [`Keeper::spawn`], or the namespaces may not be entered.
    pub fn join(
        program: &Path,
        socket: &Path,
        network: &Path,
        user: Option<&Path>,
    ) -> Result<Self, KeeperError> {
        let mut args = vec![OsStr::new("--socket"), socket.as_os_str()];
        args.extend([OsStr::new("--join-network"), network.as_os_str()]);
        if let Some(user) = user {
            args.extend([OsStr::new("--join-user"), user.as_os_str()]);
        }
        start(program, &args)?;
        Self::connect(socket)
    }

    /// The keeper at `socket`, checked to be there.
    ///
    /// # Errors
    /// Nobody answers.
    pub fn connect(socket: &Path) -> Result<Self, KeeperError> {
        let place = Place::open(socket).map_err(|source| KeeperError::Unreachable {
            socket: socket.to_owned(),
            source,
        })?;
        let keeper = Self {
            socket: socket.to_owned(),
            place,
        };
        keeper.request(NamespaceOp::Hello)?;
        Ok(keeper)
    }

    /// Does `op` and answers with its descriptors, within 30 s (for [`NamespaceOp::Connect`], beside its own limit).
    ///
    /// # Errors
    /// The keeper is gone, or the operation failed.
    pub fn request(&self, op: NamespaceOp) -> Result<(NamespaceAnswer, Vec<OwnedFd>), KeeperError> {
        self.request_with(op, &[])
    }

    /// As [`Keeper::request`], with copies of `descriptors` for the operation.
    ///
    /// # Errors
    /// The keeper is gone, or the operation failed.
    pub fn request_with(
        &self,
        op: NamespaceOp,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(NamespaceAnswer, Vec<OwnedFd>), KeeperError> {
        let own = match &op {
            NamespaceOp::Connect { timeout_ms, .. } => Duration::from_millis((*timeout_ms).into()),
            _ => Duration::ZERO,
        };
        let (operation, changes) = (op.name(), op.changes_something());
        let unreachable = |source| KeeperError::Unreachable {
            socket: self.socket.clone(),
            source,
        };
        let bad = |source| KeeperError::BadReply {
            socket: self.socket.clone(),
            source,
        };
        let message = serde_json::to_vec(&NamespaceRequest { op }).map_err(bad)?;
        let limit = own + REQUEST_TIMEOUT;
        let exchange = || seqpacket::exchange(&self.place, &message, descriptors, limit);
        let exchanged = if changes {
            point("keeper", operation, Side::Before);
            let exchanged = exchange();
            point("keeper", operation, Side::After);
            exchanged
        } else {
            exchange()
        };
        let (bytes, descriptors) = exchanged.map_err(unreachable)?;
        let reply: NamespaceReply = serde_json::from_slice(&bytes).map_err(bad)?;
        match reply.result {
            Ok(answer) => Ok((answer, descriptors)),
            Err(why) => Err(KeeperError::Refused { operation, why }),
        }
    }
}

/// Whether this user may have namespaces of the own, by a child of `program` (a `banger-netns`) that makes some and
/// ends at once. The program is what a security module judges by, so nobody else can tell.
///
/// # Errors
/// It cannot be run, or says what forbids them.
pub fn probe_namespaces(program: &Path) -> Result<(), KeeperError> {
    let ran = Run::new(program).arg("--probe-namespaces").run();
    let said = ran.map_err(|error| KeeperError::NotReady {
        why: crate::error_chain(&error),
    })?;
    read_line(&said.stdout).map_err(|why| KeeperError::NotReady { why })
}

/// Starts `program` (a `banger-netns`) and waits until it says that it is ready. It outlives this process.
///
/// # Errors
/// It cannot be started, or says why it gave up, or is not ready in time.
pub(super) fn start(program: &Path, args: &[&OsStr]) -> Result<(), KeeperError> {
    let failed = |source| KeeperError::Start {
        program: program.to_owned(),
        source,
    };
    #[expect(
        clippy::disallowed_methods,
        reason = "the named place that starts the namespace's keeper"
    )]
    let mut command = Command::new(program);
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().map_err(failed)?;
    let stdout = child.stdout.take();
    let ready = match stdout {
        Some(mut pipe) => wait_ready(&mut pipe, Instant::now() + READY_TIMEOUT),
        None => Err("its standard output is missing".to_owned()),
    };
    if let Err(why) = ready {
        let _ = child.kill();
        let _ = child.wait();
        return Err(KeeperError::NotReady { why });
    }
    // It may end long before this process does; somebody has to collect it, and to hear what it complains of.
    std::thread::Builder::new()
        .name("keeper-wait".to_owned())
        .spawn(move || {
            if let Some(complaints) = child.stderr.take() {
                log_lines(complaints);
            }
            child.wait()
        })
        .map_err(failed)?;
    Ok(())
}

/// Each line of what a keeper says, as a warning, until it has ended.
fn log_lines(said: impl Read) {
    let mut said = BufReader::new(said);
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut bounded = said.by_ref().take(MAX_COMPLAINT_BYTES);
        match bounded.read_until(b'\n', &mut line) {
            Ok(1..) => {
                let text = String::from_utf8_lossy(&line);
                tracing::warn!("the keeper: {}", text.trim_end().escape_debug());
            }
            Ok(0) | Err(_) => return,
        }
    }
}

/// Reads the readiness line.
fn wait_ready(pipe: &mut (impl Read + rustix::fd::AsFd), deadline: Instant) -> Result<(), String> {
    let mut line = Vec::new();
    let mut buffer = [0; 4096];
    while !line.contains(&b'\n') {
        let left = deadline.saturating_duration_since(Instant::now());
        match poll(
            &mut [PollFd::new(pipe, PollFlags::IN)],
            Some(&timespec(left)),
        ) {
            Ok(0) => return Err(format!("not ready within {} s", READY_TIMEOUT.as_secs())),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.to_string()),
        }
        match pipe.read(&mut buffer) {
            Ok(0) => return Err("it ended without a word".to_owned()),
            Ok(read) if line.len() + read <= MAX_READY_BYTES => {
                line.extend_from_slice(&buffer[..read]);
            }
            Ok(_) => return Err("it said too much".to_owned()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.to_string()),
        }
    }
    read_line(&line)
}

/// What the readiness line says.
fn read_line(line: &[u8]) -> Result<(), String> {
    match serde_json::from_slice(line) {
        Ok(Readiness::Ready(_)) => Ok(()),
        Ok(Readiness::Error(why)) => Err(why),
        Err(_) => Err(format!(
            "it said `{}`",
            String::from_utf8_lossy(line).trim().escape_debug()
        )),
    }
}
