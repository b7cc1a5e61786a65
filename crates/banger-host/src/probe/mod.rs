//! Whether `/dev/kvm` can run an ordinary guest. That it exists, opens and makes machines proves nothing: nested hosts
//! have one that runs no ordinary kernel. So a throw-away guest does what a kernel does first, in a child process with
//! a time limit.

mod code;
mod machine;

use crate::exec::{ExecError, Run, timespec};
use crate::storage;
use kvm_ioctls::Kvm;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const DEVICE: &str = "/dev/kvm";
/// How long the guest may take: it needs milliseconds, or a second where the machine is itself emulated.
const GUEST_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the whole child may take.
const CHILD_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a kernel may take to its first word on an ordinary machine, where it needs a tenth of that.
const KERNEL_TIMEOUT: Duration = Duration::from_secs(5);

/// What `/dev/kvm` is good for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Verdict {
    /// It runs what a kernel does first.
    Works,
    /// There is no `/dev/kvm`.
    NoDevice,
    /// It is there, and this user may not open it.
    NoPermission {
        /// The owning group's name or number.
        group: String,
        /// The mode bits.
        mode: u32,
    },
    /// It opens, but an ordinary guest would not run.
    CannotRunGuests {
        /// What went wrong.
        why: String,
    },
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Works => write!(f, "KVM works"),
            Self::NoDevice => write!(
                f,
                "there is no {DEVICE}: the CPU or the hypervisor around this machine offers no virtualization, or the \
                 module kvm_intel or kvm_amd is not loaded"
            ),
            Self::NoPermission { group, mode } if mode & 0o060 == 0o060 && group != "root" => {
                write!(
                    f,
                    "{DEVICE} may be opened by group `{group}` only; as root run `usermod -aG {group} USER`, then log \
                     in again"
                )
            }
            Self::NoPermission { mode, .. } => write!(
                f,
                "{DEVICE} has mode {mode:04o} and may not be opened by this user; as root run `chmod 0666 {DEVICE}`"
            ),
            Self::CannotRunGuests { why } => {
                write!(
                    f,
                    "{DEVICE} is there, but cannot run ordinary guests: {why}"
                )
            }
        }
    }
}

fn cannot(why: impl Into<String>) -> Verdict {
    Verdict::CannotRunGuests { why: why.into() }
}

/// Asks `program --probe-kvm` (a `banger-netns`) in a process of its own; takes at most 5 s.
pub fn run(program: &Path) -> Verdict {
    if !Path::new(DEVICE).exists() {
        return Verdict::NoDevice;
    }
    let output = Run::new(program)
        .arg("--probe-kvm")
        .timeout(CHILD_TIMEOUT)
        .run();
    match output {
        Ok(output) => serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|_| cannot("the probe said nothing that is understood")),
        Err(error @ ExecError::TimedOut { .. }) => cannot(format!("the probe hung: {error}")),
        Err(error) => cannot(format!("the probe failed: {}", crate::error_chain(&error))),
    }
}

/// What the child process of [`run`] does: probes, and writes the verdict to standard output as JSON.
pub fn child_main() -> ExitCode {
    let verdict = probe();
    let written = serde_json::to_vec(&verdict)
        .map_err(std::io::Error::from)
        .and_then(|bytes| {
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(&bytes)?;
            stdout.flush()
        });
    // A virtual CPU that hangs must not keep the process: the exit ends its thread too.
    std::process::exit(i32::from(written.is_err()))
}

fn probe() -> Verdict {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return cannot_open(Errno::from_raw_os_error(error.errno())),
    };
    static REACHED: AtomicUsize = AtomicUsize::new(0);
    let (send, receive) = std::sync::mpsc::channel();
    let started = std::thread::Builder::new()
        .name("guest".to_owned())
        .spawn(move || {
            let result = machine::run(&kvm, |stage| REACHED.store(stage, Ordering::Relaxed));
            // Nobody listens any more if it took too long.
            let _ = send.send(result);
        });
    if let Err(error) = started {
        return cannot(format!("no thread for the guest: {error}"));
    }
    match receive.recv_timeout(GUEST_TIMEOUT) {
        Ok(Ok(())) => Verdict::Works,
        Ok(Err(why)) => cannot(why),
        Err(_) => {
            let stage = REACHED.load(Ordering::Relaxed);
            let what = code::STAGES.get(stage).copied().unwrap_or("end");
            cannot(format!(
                "a guest hung for {} s where it was to {what}",
                GUEST_TIMEOUT.as_secs()
            ))
        }
    }
}

fn cannot_open(errno: Errno) -> Verdict {
    match errno {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => Verdict::NoDevice,
        Errno::ACCESS | Errno::PERM => {
            let (gid, mode) = std::fs::metadata(DEVICE)
                .map_or((0, 0), |facts| (facts.gid(), facts.mode() & 0o7777));
            let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
            Verdict::NoPermission {
                group: group_name(&groups, gid).unwrap_or_else(|| gid.to_string()),
                mode,
            }
        }
        errno => cannot(format!("it does not open: {errno}")),
    }
}

fn group_name(groups: &str, gid: u32) -> Option<String> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
    })
}

/// What a verdict was found for: another boot, device or program, another verdict.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Circumstances {
    boot_id: String,
    device: Option<DeviceFacts>,
    program: Option<(u64, i64, i64)>,
    uid: u32,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct DeviceFacts {
    mode: u32,
    uid: u32,
    gid: u32,
    device: u64,
}

impl Circumstances {
    fn now(boot_id: &str, program: &Path) -> Self {
        Self {
            boot_id: boot_id.to_owned(),
            device: std::fs::metadata(DEVICE).ok().map(|facts| DeviceFacts {
                mode: facts.mode(),
                uid: facts.uid(),
                gid: facts.gid(),
                device: facts.rdev(),
            }),
            program: std::fs::metadata(program)
                .ok()
                .map(|facts| (facts.size(), facts.mtime(), facts.mtime_nsec())),
            uid: rustix::process::geteuid().as_raw(),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Cached {
    circumstances: Circumstances,
    verdict: Verdict,
}

/// What `probe` said earlier in this boot of the machine, if device, `program` (the one that probes) and user are still
/// the same; else what it says now, kept at `path`. Missing rights are not kept: a new group membership changes
/// nothing that could be seen here. A file that cannot be written is no error.
pub fn cached(
    path: &Path,
    boot_id: &str,
    program: &Path,
    probe: impl FnOnce() -> Verdict,
) -> Verdict {
    let circumstances = Circumstances::now(boot_id, program);
    let known = std::fs::read(path)
        .ok()
        .and_then(|bytes| serde_json::from_slice::<Cached>(&bytes).ok());
    if let Some(known) = known
        && known.circumstances == circumstances
    {
        return known.verdict;
    }
    let verdict = probe();
    if !matches!(verdict, Verdict::NoPermission { .. }) {
        let cached = Cached {
            circumstances,
            verdict: verdict.clone(),
        };
        let kept = serde_json::to_vec(&cached)
            .map_err(|error| error.to_string())
            .and_then(|bytes| {
                storage::replace_file(path, &bytes, 0o600)
                    .map_err(|error| crate::error_chain(&error))
            });
        if let Err(error) = kept {
            tracing::warn!(error, "the verdict on KVM is not kept");
        }
    }
    verdict
}

/// How long a kernel may take to its first word on a machine where [`run`] took `instructions`: one that is itself
/// emulated, or busy, must not be mistaken for one whose KVM hangs.
pub fn kernel_timeout(instructions: Duration) -> Duration {
    (instructions * 200).clamp(KERNEL_TIMEOUT, KERNEL_TIMEOUT * 8)
}

/// Boots `vmlinux` under `qemu` with KVM until it writes its first byte to the console. The second stage, where
/// [`run`] said [`Verdict::Works`]. `firmware` is a small one that itself writes nothing, such as `qboot.rom`.
pub fn kernel_boots(qemu: &Path, firmware: &Path, vmlinux: &Path, timeout: Duration) -> Verdict {
    #[expect(
        clippy::disallowed_methods,
        reason = "the probe's guest is killed at its first word, which a short command cannot be"
    )]
    let mut command = Command::new(qemu);
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-no-reboot", "-machine", "q35", "-accel", "kvm"])
        .args(["-cpu", "host", "-smp", "1", "-m", "256"])
        .args(["-monitor", "none", "-serial", "stdio", "-bios"])
        .arg(firmware)
        .arg("-kernel")
        .arg(vmlinux)
        .args(["-append", "console=ttyS0 earlyprintk=ttyS0 panic=-1"])
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return cannot(format!("cannot start `{}`: {error}", qemu.display())),
    };
    let verdict = match child.stdout.as_mut() {
        Some(console) => first_byte(console, Instant::now() + timeout, timeout),
        None => cannot("the guest has no console"),
    };
    let _ = child.kill();
    let _ = child.wait();
    verdict
}

fn first_byte(
    console: &mut std::process::ChildStdout,
    deadline: Instant,
    timeout: Duration,
) -> Verdict {
    loop {
        let left = timespec(deadline.saturating_duration_since(Instant::now()));
        match poll(&mut [PollFd::new(&*console, PollFlags::IN)], Some(&left)) {
            Ok(0) => {
                return cannot(format!(
                    "a kernel wrote nothing to its console within {} s",
                    timeout.as_secs()
                ));
            }
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(errno) => return cannot(format!("the guest's console cannot be read: {errno}")),
        }
    }
    match console.read(&mut [0]) {
        Ok(0) => cannot("the virtual machine ended before its kernel wrote a word"),
        Ok(_) => Verdict::Works,
        Err(error) => cannot(format!("the guest's console cannot be read: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_kept_for_one_boot_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kvm.json");
        let program = std::env::current_exe().unwrap();
        let never = || panic!("probed again");
        assert_eq!(
            cached(&path, "one", &program, || Verdict::Works),
            Verdict::Works
        );
        assert_eq!(cached(&path, "one", &program, never), Verdict::Works);
        assert_eq!(cached(&path, "two", &program, || cannot("x")), cannot("x"));
        assert_eq!(cached(&path, "two", &program, never), cannot("x"));
        assert_eq!(
            cached(&path, "two", &directory.path().join("other"), || {
                Verdict::NoDevice
            }),
            Verdict::NoDevice
        );
    }

    #[test]
    fn a_slow_machine_has_longer_for_its_kernel_but_not_for_ever() {
        let timeout = |ms| kernel_timeout(Duration::from_millis(ms)).as_secs();
        assert_eq!([timeout(10), timeout(100), timeout(4000)], [5, 20, 40]);
    }

    #[test]
    fn a_missing_right_is_asked_for_anew_each_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kvm.json");
        let program = std::env::current_exe().unwrap();
        let denied = Verdict::NoPermission {
            group: "kvm".to_owned(),
            mode: 0o660,
        };
        assert_eq!(cached(&path, "one", &program, || denied.clone()), denied);
        assert_eq!(
            cached(&path, "one", &program, || Verdict::Works),
            Verdict::Works
        );
    }

    #[test]
    fn every_verdict_says_what_to_do() {
        let denied = |group: &str, mode| Verdict::NoPermission {
            group: group.to_owned(),
            mode,
        };
        assert!(denied("kvm", 0o660).to_string().contains("usermod -aG kvm"));
        assert!(
            denied("root", 0o600)
                .to_string()
                .contains("chmod 0666 /dev/kvm")
        );
        assert_eq!(
            group_name("root:x:0:\nkvm:x:106:calm\n", 106).as_deref(),
            Some("kvm")
        );
        assert_eq!(group_name("root:x:0:\n", 7), None);
    }
}
