//! From a launch message to a VMM that has given its first sign of life.

use super::agent::Agent;
use super::clients::Clients;
use super::control::{Connected, Controller, Notice};
use super::machine::{Files, Machine, Sandboxed};
use super::pipes::{self, Pipes};
use super::sandbox::{self, Entered};
use crate::console::RingWriter;
use crate::protocol::{Control, Descriptor, Launch};
use crate::sandbox::Applied;
use crate::{process, socket};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::inotify;
use rustix::fs::{FlockOperation, Mode};
use rustix::io::FdFlags;
use rustix::thread::LinkNameSpaceType;
use std::fmt::Display;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a VMM may take to answer for the first time. Usually it takes a tenth of a second; on a machine that is
/// itself emulated, and busy, fifteen seconds were not enough.
const LIFE_LIMIT: Duration = Duration::from_secs(60);
/// How long a VMM that refused may take to end and to say why.
const REFUSAL_LIMIT: Duration = Duration::from_secs(1);
/// When to try again where a socket is there but nobody listens yet: this moment has no event, and is short.
const CONNECT_RETRY: Duration = Duration::from_micros(200);
/// The same where nobody tells that a socket appears.
const UNTOLD_RETRY: Duration = Duration::from_millis(5);
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a VMM was not started. Everything is gone again.
pub(super) struct Failure {
    pub(super) error: String,
    pub(super) stderr: String,
}

impl From<String> for Failure {
    fn from(error: String) -> Self {
        Self {
            error,
            stderr: String::new(),
        }
    }
}

fn failed<E: Display>(what: impl Display) -> impl FnOnce(E) -> Failure {
    move |error| format!("{what}: {error}").into()
}

/// Starts the VMM of `launch`. Also gives the watch of its run folder: the kernel takes milliseconds to close one, and
/// somebody waits, so that comes later.
pub(super) fn start(
    launch: Launch,
    descriptors: Vec<OwnedFd>,
) -> Result<(Machine, Option<OwnedFd>), Failure> {
    // A session of its own: no terminal's signal reaches it. It fails only where there is one already.
    let _ = rustix::process::setsid();
    rustix::process::umask(Mode::from_raw_mode(0o077));
    let (kept, entered) = take_descriptors(&launch, descriptors)?;
    let folder = launch.sandbox.folder.clone();
    let console = RingWriter::open(launch.console.clone()).map_err(failed(format!(
        "cannot open `{}`",
        launch.console.path.display()
    )))?;
    let log = RingWriter::open(launch.log.clone()).map_err(failed(format!(
        "cannot open `{}`",
        launch.log.path.display()
    )))?;
    // Sockets of an earlier run would be mistaken for ours, and Firecracker refuses to start over them.
    for path in sockets_of(&launch.control) {
        socket::remove(path).map_err(failed(format!("cannot remove `{}`", path.display())))?;
    }
    pipes::remove(&launch.control).map_err(failed("cannot remove the VMM's pipes"))?;
    let listener = socket::listen(&launch.shim_socket).map_err(failed(format!(
        "cannot listen at `{}`",
        launch.shim_socket.display()
    )))?;
    let agent = Agent::prepare(&launch.control).map_err(failed("cannot listen for the agent"))?;
    let pipes = Pipes::make(&launch.control, &launch.metrics)
        .map_err(failed("cannot make the VMM's pipes"))?;
    // A user may have only so many, of all programs together. Without one the socket is looked for again and again.
    let watch = watch(&folder).ok();

    let started = Instant::now();
    let (child, mut applied) = match spawn(&launch, entered) {
        Ok(spawned) => spawned,
        Err(error) => {
            remove_sockets(&launch, &agent);
            return Err(format!("cannot start `{}`: {error}", launch.program.display()).into());
        }
    };
    applied.extend(launch.cgroup.clone());
    // Only now: an ignored signal is inherited, and the VMM must hear SIGTERM.
    ignore_signals();
    let files = Files {
        console,
        log,
        pipes,
        kept,
    };
    let control = Controller::new(&launch.control);
    let clients = Clients::new(listener);
    let child = Sandboxed { child, applied };
    let mut machine = Machine::new(launch, child, started, files, control, agent, clients)
        .map_err(failed("cannot watch the VMM"))?;
    match prove_life(&mut machine, watch.as_ref(), started) {
        Ok(()) => Ok((machine, watch)),
        Err(error) => Err(machine.abandon(error)),
    }
}

/// Starts the VMM. In its own root it has no links, so it is called by the path that they lead to.
fn spawn(launch: &Launch, entered: Entered) -> std::io::Result<(Child, Vec<Applied>)> {
    let program = std::fs::canonicalize(&launch.program)?;
    #[expect(
        clippy::disallowed_methods,
        reason = "the one exec of a VMM: a long-lived child that outlives its parent"
    )]
    let mut command = Command::new(&program);
    command
        .arg0(&launch.program)
        .args(&launch.args)
        .env_clear()
        .env("PATH", SEARCH_PATH)
        .current_dir(&launch.sandbox.folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    sandbox::spawn(command, &program, &launch.sandbox, entered)
}

/// Enters namespaces, checks the lock, and lets the VMM inherit what it must. Returns what the shim keeps open, and
/// which namespaces there were.
fn take_descriptors(
    launch: &Launch,
    descriptors: Vec<OwnedFd>,
) -> Result<(Vec<OwnedFd>, Entered), Failure> {
    let mut entered = Entered::default();
    let mut kept = Vec::new();
    let mut namespaces = Vec::new();
    let mut locked = false;
    for (kind, descriptor) in launch.descriptors.iter().zip(descriptors) {
        match kind {
            Descriptor::Lock => {
                // Succeeds on the very description that carries the lock, and fails if another one does.
                rustix::fs::flock(&descriptor, FlockOperation::NonBlockingLockExclusive)
                    .map_err(failed("the VM's lock is held by somebody else"))?;
                locked = true;
                kept.push(descriptor);
            }
            Descriptor::Keepalive => kept.push(descriptor),
            Descriptor::UserNamespace => {
                entered.user = true;
                namespaces.push((LinkNameSpaceType::User, descriptor));
            }
            Descriptor::NetworkNamespace => {
                entered.network = true;
                namespaces.push((LinkNameSpaceType::Network, descriptor));
            }
        }
    }
    if !locked {
        return Err("the launch brought no lock".to_owned().into());
    }
    // The user namespace first: the right to enter the other one comes from it.
    namespaces.sort_by_key(|(kind, _)| !matches!(kind, LinkNameSpaceType::User));
    for (kind, descriptor) in namespaces {
        rustix::thread::move_into_link_name_space(descriptor.as_fd(), Some(kind))
            .map_err(failed(format!("cannot enter the namespace ({kind:?})")))?;
    }
    for descriptor in &kept {
        rustix::io::fcntl_setfd(descriptor, FdFlags::empty())
            .map_err(failed("cannot hand on the lock"))?;
    }
    Ok((kept, entered))
}

pub(super) fn sockets_of(control: &Control) -> [&Path; 2] {
    match control {
        Control::Qemu {
            qmp_socket,
            agent_socket,
        } => [qmp_socket, agent_socket],
        Control::Firecracker {
            api_socket,
            vsock_socket,
            ..
        } => [api_socket, vsock_socket],
    }
}

/// Removes all sockets and pipes of a run, as far as they are there.
pub(super) fn remove_sockets(launch: &Launch, agent: &Agent) {
    for path in sockets_of(&launch.control) {
        let _ = socket::remove(path);
    }
    let _ = pipes::remove(&launch.control);
    let _ = socket::remove(agent.path());
    let _ = socket::remove(&launch.shim_socket);
}

fn watch(folder: &Path) -> rustix::io::Result<OwnedFd> {
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(&watch, folder, inotify::WatchFlags::CREATE)?;
    Ok(watch)
}

/// Waits until the VMM answers.
fn prove_life(
    machine: &mut Machine,
    watch: Option<&OwnedFd>,
    started: Instant,
) -> Result<(), String> {
    let program = machine.program();
    let mut connected = Connected::Absent;
    let mut limit_at = started + LIFE_LIMIT;
    let mut refusal = None;
    loop {
        if connected != Connected::Yes {
            connected = machine
                .control
                .connect()
                .map_err(|error| format!("cannot connect to `{program}`: {error}"))?;
        }
        let left = limit_at.saturating_duration_since(Instant::now());
        if left.is_zero() {
            if let Some(error) = refusal {
                return Err(format!("`{program}` refused: {error}"));
            }
            return Err(format!(
                "`{program}` did not answer within {} seconds",
                LIFE_LIMIT.as_secs()
            ));
        }
        let limit = match connected {
            Connected::Refused => left.min(CONNECT_RETRY),
            Connected::Absent if watch.is_none() => left.min(UNTOLD_RETRY),
            Connected::Absent | Connected::Yes => left,
        };
        let ended = {
            let mut polled = vec![PollFd::new(&machine.pidfd, PollFlags::IN)];
            polled.extend(watch.map(|watch| PollFd::new(watch, PollFlags::IN)));
            if let Some((control, _)) = machine.control.interest() {
                polled.push(PollFd::from_borrowed_fd(control, PollFlags::IN));
            }
            for output in machine.outputs() {
                polled.push(PollFd::from_borrowed_fd(output, PollFlags::IN));
            }
            match rustix::event::poll(&mut polled, Some(&process::timespec(limit))) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(format!("cannot wait for `{program}`: {error}")),
            }
            !polled[0].revents().is_empty()
        };
        machine.read_outputs();
        if ended {
            return Err(machine.ended_early());
        }
        if let Some(watch) = watch {
            // It does not block, and mostly there is nothing.
            let mut events = [0; 4096];
            let _ = rustix::io::read(watch, &mut events);
        }
        for notice in machine.control.work() {
            match notice {
                Notice::Done { result: Ok(()), .. } => return machine.alive(),
                Notice::Done {
                    result: Err(error), ..
                } => {
                    // Mostly it is ending, and its exit, which comes next, tells more.
                    refusal = Some(error);
                    limit_at = limit_at.min(Instant::now() + REFUSAL_LIMIT);
                }
                Notice::Lost => {
                    refusal.get_or_insert_with(|| "it closed its control socket".to_owned());
                    limit_at = limit_at.min(Instant::now() + REFUSAL_LIMIT);
                }
                Notice::Event(event) => machine.qmp_event(event),
            }
        }
    }
}

/// Lets go of the socket on standard input.
pub(super) fn detach_stdin() {
    let null = rustix::fs::open(
        "/dev/null",
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
        Mode::empty(),
    );
    if let Ok(null) = null {
        let _ = rustix::stdio::dup2_stdin(&null);
    }
}

/// Closes what a careless parent left open beyond the standard three: neither the shim nor the VMM shall hold it for
/// as long as a VM may run.
#[expect(unsafe_code, reason = "there is no safe call that closes a range")]
pub(super) fn close_inherited() {
    unsafe extern "C" {
        fn close_range(first: u32, last: u32, flags: i32) -> i32;
    }
    // SAFETY: this is the first thing the process does, so that nothing owns a descriptor yet.
    unsafe { close_range(3, u32::MAX, 0) };
}

#[expect(unsafe_code, reason = "there is no safe call that ignores a signal")]
fn ignore_signals() {
    const SIG_IGN: usize = 1;
    unsafe extern "C" {
        safe fn signal(number: i32, handler: usize) -> usize;
    }
    use rustix::process::Signal;
    for number in [Signal::TERM, Signal::INT, Signal::HUP] {
        signal(number.as_raw(), SIG_IGN);
    }
}
