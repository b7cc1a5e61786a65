//! What happens between the kernel and the image's own init.
//!
//! Modules, drives, root, network, identity, hand-over: each step has a module of its own. A step that the guest can
//! live without warns and goes on; without its root the guest tells why and powers off. Nothing is ever formatted.

mod drives;
mod generators;
mod hostkey;
mod identity;
mod modules;
mod network;
mod populate;
mod root;
mod rooted;
mod switch;
mod text;
pub(crate) mod uevents;

pub(crate) use root::OVERLAY;

use crate::sys;
use banger_guest::boot_config::BootConfig;
use rustix::mount::{MountFlags, mount};
use std::ffi::CString;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Where the image's root is put together.
const NEW_ROOT: &str = "/newroot";
/// How long the agent may take to tell the host why the guest gives up.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(5);

/// Why a guest cannot start: a whole sentence, subject first.
#[derive(Debug)]
pub(crate) struct Fatal(pub(crate) String);

/// What PID 1 tells the agent, one a line on its standard input, which ends when the image's init takes over.
pub(crate) mod note {
    /// `banger-init` started, at this uptime in milliseconds.
    pub(crate) const INIT: &str = "init";
    /// The image's init takes over, at this uptime.
    pub(crate) const IMAGE_INIT: &str = "image-init";
    /// Whether the image has an ssh server: `yes` or `no`.
    pub(crate) const SSHD: &str = "sshd";
    /// Something went wrong.
    pub(crate) const WARNING: &str = "warning";
    /// The guest gives up and powers off.
    pub(crate) const FATAL: &str = "fatal";
}

/// The way to the agent and to the console.
pub(crate) struct Reporter {
    agent: Option<Child>,
}

impl Reporter {
    /// Tells the agent.
    fn note(&mut self, kind: &str, text: impl std::fmt::Display) {
        let line = format!("{kind} {text}").replace(['\n', '\r'], " ");
        if let Some(pipe) = self.agent.as_mut().and_then(|agent| agent.stdin.as_mut()) {
            // Without its agent a guest still boots.
            let _ = pipe.write_all((line + "\n").as_bytes());
        }
    }

    /// Reports what went wrong and did not stop the boot.
    pub(crate) fn warn(&mut self, text: impl std::fmt::Display) {
        console(&format!("warning: {text}"));
        self.note(note::WARNING, text);
    }

    /// Reports a failed step, if it failed.
    pub(crate) fn check<E: std::fmt::Display>(&mut self, what: &str, result: Result<(), E>) {
        if let Err(error) = result {
            self.warn(format_args!("{what}: {error}"));
        }
    }
}

/// Prints a line on the guest's console.
fn console(text: &str) {
    let line = format!("banger-init: {text}\n");
    let console = OpenOptions::new().write(true).open("/dev/console");
    if let Ok(mut console) = console {
        let _ = console.write_all(line.as_bytes());
    }
}

/// PID 1. Does not return: the image's init takes over, or the guest powers off.
pub(crate) fn run() -> ! {
    let started = sys::uptime_ms();
    let mut report = Reporter { agent: None };
    let Err(Fatal(why)) = boot(started, &mut report);
    console(&format!("error: {why}"));
    give_up(report, &why)
}

fn boot(started: u64, report: &mut Reporter) -> Result<std::convert::Infallible, Fatal> {
    mount_kernel_filesystems(Path::new("/"))?;
    let warnings = modules::load_all(Path::new("/modules"));
    report.agent = spawn_agent();
    report.note(note::INIT, started);
    for warning in warnings {
        report.warn(warning);
    }
    let config = drives::read_config()?;
    let drives = drives::check(&config)?;
    root::assemble(&drives, report)?;
    prepare(&config, &drives, report)?;
    switch::hand_over(&config.init, report)
}

/// What the guest has on top of its root. The root is all that it cannot live without.
fn prepare(
    config: &BootConfig,
    drives: &drives::Drives,
    report: &mut Reporter,
) -> Result<(), Fatal> {
    let new_root = rooted::Root::open(Path::new(NEW_ROOT))
        .map_err(|error| Fatal(format!("cannot open the root filesystem: {error}")))?;
    root::mount_kernel_and_temporary(&new_root, report)?;
    root::mount_modules(&new_root, drives, report);
    root::mount_disk(&new_root, drives, report);
    report.check("cannot set the loopback device up", network::loopback_up());
    if let Some(net) = &config.network {
        report.check("cannot set the network up", network::set_up(net));
    }
    identity::write(&new_root, config, drives.overlay.is_some(), report);
    let sshd = if identity::has_ssh_server(&new_root) {
        "yes"
    } else {
        "no"
    };
    report.note(note::SSHD, sshd);
    Ok(())
}

/// Mounts devtmpfs, proc and sysfs below `root`.
fn mount_kernel_filesystems(root: &Path) -> Result<(), Fatal> {
    let quiet = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    for (name, flags) in [
        ("devtmpfs", MountFlags::NOSUID),
        ("proc", quiet),
        ("sysfs", quiet),
    ] {
        let directory = match name {
            "devtmpfs" => "dev",
            "sysfs" => "sys",
            other => other,
        };
        let target = root.join(directory);
        // It is there already in every initrd but a foreign one.
        let _ = std::fs::create_dir(&target);
        mount(name, &target, name, flags, None).map_err(|error| {
            Fatal(format!(
                "cannot mount {name} at {}: {error}",
                target.display()
            ))
        })?;
    }
    Ok(())
}

/// Starts the agent: this very program, kept in memory by being run, with the initrd as its root for ever.
#[expect(
    clippy::disallowed_methods,
    reason = "the agent is the one child that this program starts"
)]
fn spawn_agent() -> Option<Child> {
    let spawned = Command::new("/proc/self/exe")
        .arg0(crate::AGENT_NAME)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    match spawned {
        Ok(child) => Some(child),
        Err(error) => {
            console(&format!("warning: cannot start the agent: {error}"));
            None
        }
    }
}

/// Lets the agent tell the host, then powers off.
fn give_up(mut report: Reporter, why: &str) -> ! {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    report.note(note::FATAL, why);
    if let Some(agent) = report.agent {
        let pid = Pid::from_child(&agent);
        drop(agent.stdin);
        if let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty())
            && let Ok(limit) = Timespec::try_from(LAST_WORDS_LIMIT)
        {
            let _ = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit));
        }
    }
    rustix::fs::sync();
    let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    // Only a kernel without the call comes here; the end of PID 1 makes it panic, which ends the guest as well.
    std::process::exit(1)
}

/// A mount's data argument.
fn mount_data(text: String) -> CString {
    CString::new(text).expect("mount options are made of fixed words and paths without zero bytes")
}
