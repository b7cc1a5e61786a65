//! The sandbox's effects. A part that this host or kernel refuses is left out and told; the VMM starts all the same.
//!
//! What must be done before the fork is done to the shim itself: it enters the instance's namespaces, and its one child
//! is the first process of a pid namespace. The rest is done in the child, between fork and exec, so that the shim
//! keeps seeing the files it writes.

mod calls;
mod landlock;
mod root;

use crate::sandbox::{self, Applied, Entry, Layer, Sandbox};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

/// The most bytes of the child's report.
const MAX_REPORT_BYTES: u64 = 16 * 1024;

/// What the shim has of an instance's namespaces.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Entered {
    pub(super) user: bool,
    pub(super) network: bool,
}

/// What the child shall do to itself.
struct Confinement {
    /// What it may see; or why no list of it could be made.
    entries: Result<Vec<Entry>, String>,
    folder: PathBuf,
    /// It has to make a user namespace of its own.
    make_user: bool,
}

/// Starts `command`, which is `program` (without links), in its sandbox. Gives what became of each layer.
pub(super) fn spawn(
    mut command: Command,
    program: &Path,
    sandbox: &Sandbox,
    entered: Entered,
) -> io::Result<(Child, Vec<Applied>)> {
    let mut applied = Vec::new();
    if entered.user {
        applied.push(is(Layer::User, Ok(())));
    }
    let network = if entered.network {
        Ok(())
    } else {
        Err("the launch brought none".to_owned())
    };
    applied.push(is(Layer::Network, network));
    let pid = calls::unshare(UnshareFlags::NEWPID);
    applied.push(is(Layer::Pid, pid.map_err(|error| error.to_string())));
    let confinement = Confinement {
        entries: if is_elf(program)? {
            sandbox::entries(sandbox, program)
        } else {
            Err(format!(
                "`{}` is a script, and what it needs is not known",
                program.display()
            ))
        },
        folder: sandbox.folder.clone(),
        make_user: !entered.user,
    };
    let (mut report, child_report) = report_pipe()?;
    before_exec(&mut command, move || {
        let applied = confinement.apply();
        let report = serde_json::to_vec(&applied)?;
        rustix::io::write(&child_report, &report)?;
        // Last, since a root of its own left it outside.
        std::env::set_current_dir(&confinement.folder)
    });
    let mut child = command.spawn()?;
    // It holds the other end of the pipe.
    drop(command);
    match read_report(&mut report) {
        Ok(inside) => {
            applied.extend(inside);
            Ok((child, applied))
        }
        Err(error) => {
            // Nobody would know of it.
            let _ = child.kill();
            let _ = child.wait();
            Err(error)
        }
    }
}

fn read_report(report: &mut std::fs::File) -> io::Result<Vec<Applied>> {
    let mut bytes = Vec::new();
    report.take(MAX_REPORT_BYTES).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

fn report_pipe() -> io::Result<(std::fs::File, OwnedFd)> {
    let (ours, theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    Ok((ours.into(), theirs))
}

#[expect(
    unsafe_code,
    reason = "there is no safe way to do anything between fork and exec"
)]
fn before_exec(
    command: &mut Command,
    work: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    // SAFETY: the shim has one thread, so that no lock was held by another one, and memory can be allocated, at the
    // moment of the fork.
    unsafe { command.pre_exec(work) };
}

fn is(layer: Layer, outcome: Result<(), String>) -> Applied {
    Applied {
        layer,
        missing: outcome.err(),
    }
}

fn is_elf(program: &Path) -> io::Result<bool> {
    let mut magic = [0; 4];
    let mut file = std::fs::File::open(program)?;
    Ok(file.read_exact(&mut magic).is_ok() && magic == *b"\x7fELF")
}

impl Confinement {
    /// Applies what can be applied.
    fn apply(&self) -> Vec<Applied> {
        let text = |error: io::Error| error.to_string();
        let mut applied = Vec::new();
        if self.make_user {
            applied.push(is(Layer::User, own_user_namespace().map_err(text)));
        }
        applied.push(is(Layer::Mount, self.own_root()));
        let ipc = calls::unshare(UnshareFlags::NEWIPC);
        applied.push(is(Layer::Ipc, ipc.map_err(text)));
        applied.push(is(Layer::Capabilities, drop_privileges().map_err(text)));
        let landlock = match &self.entries {
            Ok(entries) => landlock::restrict(entries).map_err(text),
            Err(why) => Err(why.clone()),
        };
        applied.push(is(Layer::Landlock, landlock));
        applied
    }

    fn own_root(&self) -> Result<(), String> {
        let entries = self.entries.as_ref().map_err(String::clone)?;
        calls::unshare(UnshareFlags::NEWNS).map_err(|error| error.to_string())?;
        root::enter(entries, &self.folder).map_err(|error| error.to_string())
    }
}

/// A user namespace in which this user, and no other, has its own number.
fn own_user_namespace() -> io::Result<()> {
    let user = rustix::process::geteuid().as_raw();
    let group = rustix::process::getegid().as_raw();
    calls::unshare(UnshareFlags::NEWUSER)?;
    std::fs::write("/proc/self/uid_map", format!("{user} {user} 1"))?;
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/gid_map", format!("{group} {group} 1"))
}

/// Gives up every capability, and the ways to new ones.
fn drop_privileges() -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    rustix::thread::clear_ambient_capability_set()?;
    for number in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The first number that this kernel does not know.
            Err(Errno::INVAL) => break,
            // Without the right to, there are none to gain: `no_new_privs` sees to that.
            Err(Errno::PERM) => break,
            Err(error) => return Err(error.into()),
        }
    }
    let none = CapabilitySet::empty();
    let sets = CapabilitySets {
        effective: none,
        permitted: none,
        inheritable: none,
    };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}
