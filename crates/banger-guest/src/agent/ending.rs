//! How a guest ends: asking its init to power off, and noticing that it goes down.

use crate::init::OVERLAY;
use crate::sys;
use banger_guest::agent_protocol::GuestEnd;
use rustix::fd::OwnedFd;
use rustix::fs::inotify;
use rustix::mount::MountFlags;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use rustix::time::{ClockId, Timespec, clock_settime};
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::num::NonZeroI32;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

/// The program that systemd's PID 1 becomes in the end.
const SYSTEMD_SHUTDOWN: &str = "systemd-shutdown";
/// How long that takes after the program's file was opened.
const EXEC_LIMIT: Duration = Duration::from_secs(2);
/// How long processes may take to end when there is no init to end them.
const TERM_LIMIT: Duration = Duration::from_secs(3);
/// `SIGRTMIN+4`, which starts systemd's `poweroff.target`.
const SYSTEMD_POWEROFF: NonZeroI32 = NonZeroI32::new(34 + 4).expect("it is not zero");

/// What PID 1 is, as far as it matters for ending it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Init {
    Systemd,
    /// Takes SIGUSR2 for a poweroff.
    Busybox,
    /// Takes `0` on `/run/openrc/init.ctl`.
    OpenRc,
    /// Takes a run level on `/run/initctl`.
    SysV,
    /// Is called `init` and has not yet shown which it is.
    Unknown,
    /// Knows no request: a shell, an application.
    Other,
}

impl Init {
    fn of(comm: &str, program: &str, has_openrc_pipe: bool, has_sysv_pipe: bool) -> Self {
        match (comm.trim_end(), program) {
            ("systemd", _) | (_, "systemd") => Self::Systemd,
            ("init" | "linuxrc", "busybox") => Self::Busybox,
            _ if has_openrc_pipe => Self::OpenRc,
            _ if has_sysv_pipe => Self::SysV,
            ("init", "init") => Self::Unknown,
            _ => Self::Other,
        }
    }

    fn running() -> Self {
        let comm = std::fs::read_to_string("/proc/1/comm").unwrap_or_default();
        let program = std::fs::read_link("/proc/1/exe").unwrap_or_default();
        let program = program
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Self::of(&comm, &program, is_pipe(OPENRC_PIPE), is_pipe(SYSV_PIPE))
    }
}

// By way of PID 1's root: the agent's own is the initrd.
const OPENRC_PIPE: &str = "/proc/1/root/run/openrc/init.ctl";
const SYSV_PIPE: &str = "/proc/1/root/run/initctl";

fn is_pipe(path: &str) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo())
}

/// What became of a request to power off.
#[derive(Debug)]
pub(crate) enum Asked {
    /// Init was asked.
    Init,
    /// Init is starting and would not hear it: to be asked again.
    NotYet,
    /// This init knows no such request.
    Nobody,
    /// It could not be asked.
    Failed(io::Error),
}

/// Asks PID 1 to power off, in the way that it understands.
pub(crate) fn ask_init_to_power_off() -> Asked {
    let asked = match Init::running() {
        Init::Systemd => return ask_by_signal(sys::signal(SYSTEMD_POWEROFF)),
        Init::Busybox => return ask_by_signal(Signal::USR2),
        Init::OpenRc => write_pipe(OPENRC_PIPE, b"0"),
        Init::SysV => write_pipe(SYSV_PIPE, &sysv_request(b'0')),
        Init::Unknown => return Asked::NotYet,
        Init::Other => return Asked::Nobody,
    };
    match asked {
        Ok(()) => Asked::Init,
        Err(error) => Asked::Failed(error),
    }
}

/// The kernel drops a signal for PID 1 that it neither catches nor blocks, as at its start.
fn ask_by_signal(signal: Signal) -> Asked {
    let of_init = |file| std::fs::read_to_string(format!("/proc/1/{file}")).unwrap_or_default();
    if !hears(&of_init("status"), signal) && !waits_for_signals(&of_init("syscall")) {
        return Asked::NotYet;
    }
    match kill_process(Pid::INIT, signal) {
        Ok(()) => Asked::Init,
        Err(error) => Asked::Failed(error.into()),
    }
}

/// Whether a process with this `/proc/PID/status` catches or blocks the signal.
///
/// busybox's init waits in `sigtimedwait`, during which the kernel does not show what it blocks; that it catches
/// SIGTSTP, which it does next, shows that it is that far.
fn hears(status: &str, signal: Signal) -> bool {
    let bit = |signal: Signal| 1_u64 << (signal.as_raw() - 1);
    let bit = if signal == Signal::USR2 {
        bit(signal) | bit(Signal::TSTP)
    } else {
        bit(signal)
    };
    status
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| matches!(*name, "SigBlk" | "SigCgt"))
        .filter_map(|(_, mask)| u64::from_str_radix(mask.trim(), 16).ok())
        .any(|mask| mask & bit != 0)
}

/// Whether a process with this `/proc/PID/syscall` is in `rt_sigtimedwait`, as busybox's init is between its tasks: the
/// signals that it waits for then count as neither caught nor blocked, though they reach it.
fn waits_for_signals(syscall: &str) -> bool {
    const RT_SIGTIMEDWAIT: &str = "128";
    syscall.split_whitespace().next() == Some(RT_SIGTIMEDWAIT)
}

fn write_pipe(path: &str, bytes: &[u8]) -> io::Result<()> {
    const O_NONBLOCK: i32 = 0o4_000;
    const O_NOFOLLOW: i32 = 0o400_000;
    let flags = O_NONBLOCK | O_NOFOLLOW;
    let mut pipe = OpenOptions::new()
        .write(true)
        .custom_flags(flags)
        .open(path)?;
    pipe.write_all(bytes)
}

/// sysvinit's `struct init_request` for a change of run level.
fn sysv_request(level: u8) -> [u8; 384] {
    const MAGIC: i32 = 0x0309_1969;
    const CHANGE_LEVEL: i32 = 1;
    let mut request = [0; 384];
    request[0..4].copy_from_slice(&MAGIC.to_ne_bytes());
    request[4..8].copy_from_slice(&CHANGE_LEVEL.to_ne_bytes());
    request[8..12].copy_from_slice(&i32::from(level).to_ne_bytes());
    request
}

/// Ends every process but PID 1 and this one, makes the filesystems clean and powers off.
pub(crate) fn power_off_without_init() {
    // Group 1 means every process, as in kill(-1).
    let _ = kill_process_group(Pid::INIT, Signal::TERM);
    let deadline = Instant::now() + TERM_LIMIT;
    // They are nobody's children here, so their end is announced to nobody.
    while Instant::now() < deadline && has_other_processes() {
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = kill_process_group(Pid::INIT, Signal::KILL);
    rustix::fs::sync();
    // Remounts every filesystem read-only, whoever holds it.
    let _ = std::fs::write("/proc/sysrq-trigger", "u");
    rustix::fs::sync();
    let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
}

/// Whether a process of user space runs besides PID 1 and this one.
fn has_other_processes() -> bool {
    let own = std::process::id();
    std::fs::read_dir("/proc").is_ok_and(|entries| {
        entries
            .filter_map(Result::ok)
            .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
            .filter(|pid| *pid != 1 && *pid != own)
            // Kernel threads have no command line.
            .any(|pid| {
                std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
            })
    })
}

/// Watches the directory of systemd's programs; `None` if PID 1 is not systemd. The directory and not the file, which
/// an upgrade replaces.
pub(crate) fn watch_systemd_shutdown() -> Option<OwnedFd> {
    let directory = ["/proc/1/root/usr/lib/systemd", "/proc/1/root/lib/systemd"]
        .into_iter()
        .find(|directory| Path::new(directory).join(SYSTEMD_SHUTDOWN).exists())?;
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    let watch = inotify::init(flags).ok()?;
    inotify::add_watch(&watch, directory, inotify::WatchFlags::OPEN).ok()?;
    Some(watch)
}

/// Whether the shutdown program is among what has been opened; forgets all of it.
pub(crate) fn opened_systemd_shutdown(watch: &OwnedFd) -> bool {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(watch, &mut buffer);
    let mut opened = false;
    while let Ok(event) = reader.next() {
        opened |= event
            .file_name()
            .is_some_and(|name| name.to_bytes() == SYSTEMD_SHUTDOWN.as_bytes());
    }
    opened
}

/// What a command line of PID 1 says of the end: the verb of `systemd-shutdown`.
fn verb(cmdline: &[u8]) -> Option<GuestEnd> {
    let mut words = cmdline.split(|byte| *byte == 0);
    let program = words.next()?;
    if program.rsplit(|byte| *byte == b'/').next() != Some(SYSTEMD_SHUTDOWN.as_bytes()) {
        return None;
    }
    Some(match words.next() {
        Some(b"poweroff") => GuestEnd::Poweroff,
        Some(b"reboot" | b"kexec") => GuestEnd::Reboot,
        Some(b"halt") => GuestEnd::Halt,
        _ => GuestEnd::Unknown,
    })
}

/// The verb, waiting a moment for PID 1 to become that program. `None` if it does not: anybody may open the file.
pub(crate) fn verb_of_systemd_shutdown() -> Option<GuestEnd> {
    if Init::running() != Init::Systemd && !Path::new("/proc/1/root/run/systemd/system").exists() {
        return None;
    }
    let deadline = Instant::now() + EXEC_LIMIT;
    loop {
        let end = std::fs::read("/proc/1/cmdline")
            .ok()
            .and_then(|line| verb(&line));
        if end.is_some() || Instant::now() >= deadline {
            return end;
        }
        // An exec is announced by nothing that a process could wait for.
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Makes the overlay's filesystem clean, if nobody writes to it any more. It lies in the initrd's tree, where the
/// image's init neither sees nor unmounts it.
pub(crate) fn overlay_read_only() {
    let _ = rustix::mount::mount_remount(OVERLAY, MountFlags::RDONLY, c"");
}

/// Sets the clock to nanoseconds since 1970.
pub(crate) fn set_clock(unix_ns: i64) -> io::Result<()> {
    let time = Timespec {
        tv_sec: unix_ns.div_euclid(1_000_000_000),
        tv_nsec: unix_ns.rem_euclid(1_000_000_000) as _,
    };
    Ok(clock_settime(ClockId::Realtime, time)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inits_are_told_apart_by_name_program_and_pipe() {
        assert_eq!(Init::of("systemd\n", "systemd", false, true), Init::Systemd);
        assert_eq!(Init::of("init\n", "systemd", false, true), Init::Systemd);
        assert_eq!(Init::of("init\n", "busybox", true, false), Init::Busybox);
        assert_eq!(Init::of("init\n", "openrc-init", true, false), Init::OpenRc);
        assert_eq!(Init::of("init\n", "init", false, true), Init::SysV);
        assert_eq!(Init::of("init\n", "init", false, false), Init::Unknown);
        assert_eq!(Init::of("sh\n", "dash", false, false), Init::Other);
        // A script that busybox's shell runs.
        assert_eq!(Init::of("start.sh\n", "busybox", false, false), Init::Other);
    }

    #[test]
    fn a_signal_is_heard_when_it_is_caught_or_blocked() {
        let status =
            "SigPnd:\t0\nSigBlk:\t0000002000000000\nSigIgn:\t800\nSigCgt:\t0000000000000400\n";
        assert!(hears(status, sys::signal(SYSTEMD_POWEROFF)));
        assert!(!hears(status, Signal::USR2));
        assert!(hears(status, Signal::from_named_raw(11).unwrap()));
        assert!(!hears("", Signal::USR2));
        assert!(hears(
            "SigBlk:\t0000000000000000\nSigCgt:\t0000000000080000\n",
            Signal::USR2
        ));
    }

    #[test]
    fn an_init_that_waits_for_signals_is_told_by_its_system_call() {
        assert!(waits_for_signals(
            "128 0x7ffd 0x0 0x0 0x8 0x0 0x0 0x7f 0x7f\n"
        ));
        assert!(!waits_for_signals("1280 0x0\n"));
        assert!(!waits_for_signals("running\n"));
        assert!(!waits_for_signals(""));
    }

    #[test]
    fn the_end_is_the_verb_of_systemd_shutdown() {
        let line =
            |verb: &str| format!("/usr/lib/systemd/systemd-shutdown\0{verb}\0--log-level\x006\0");
        assert_eq!(verb(line("poweroff").as_bytes()), Some(GuestEnd::Poweroff));
        assert_eq!(verb(line("reboot").as_bytes()), Some(GuestEnd::Reboot));
        assert_eq!(verb(line("kexec").as_bytes()), Some(GuestEnd::Reboot));
        assert_eq!(verb(line("halt").as_bytes()), Some(GuestEnd::Halt));
        assert_eq!(verb(line("exit").as_bytes()), Some(GuestEnd::Unknown));
        assert_eq!(verb(b"/sbin/init\0poweroff\0"), None);
        assert_eq!(verb(b""), None);
    }

    #[test]
    fn a_sysv_request_changes_the_run_level() {
        let request = sysv_request(b'0');
        assert_eq!(request[..4], 0x0309_1969_i32.to_ne_bytes());
        assert_eq!(request[4..8], 1_i32.to_ne_bytes());
        assert_eq!(request[8..12], i32::from(b'0').to_ne_bytes());
    }
}
