//! Whether `/dev/kvm` can run an ordinary guest.
#![allow(unused)]

use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::Duration;

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

/// Asks `program --probe-kvm` (a `banger-netns`) in a process of its own; at most 5 s.
pub fn run(program: &Path) -> Verdict {
    Verdict::NoDevice
}

/// What [`run`] found earlier in this boot of the machine, if device, program and boot are still the same; else runs
/// `probe` and stores what it says at `path`. A store that fails is not an error.
pub fn cached(
    path: &Path,
    boot_id: &str,
    program: &Path,
    probe: impl FnOnce() -> Verdict,
) -> Verdict {
    Verdict::NoDevice
}

/// Boots `vmlinux` under `qemu -accel kvm` until it writes its first byte to the console. The second stage, where
/// [`run`] said [`Verdict::Works`].
pub fn kernel_boots(qemu: &Path, vmlinux: &Path, timeout: Duration) -> Verdict {
    Verdict::NoDevice
}

/// What the child process of [`run`] does: probes, writes the verdict to standard output as JSON.
pub fn child_main() -> std::process::ExitCode {
    std::process::ExitCode::FAILURE
}
