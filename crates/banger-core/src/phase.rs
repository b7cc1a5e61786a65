//! Phases: what a VM is seen to be doing.
//!
//! ```text
//!             start              proof of life
//!   stopped ---------> starting ---------------> running <------> paused
//!      ^                  |                         |  pause/resume  |
//!      |   failed, cancel |                    stop |                | stop, kill
//!      +------------------+                         v                |
//!      +----------------------------------------- stopping <---------+
//! ```
//!
//! There is no `failed`: a VM that failed is stopped, with the reason. Ready is a fact of `running`, not a phase.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a person wants of a VM; durable, set by the verbs and by the guest's own poweroff.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Desired {
    /// It shall run.
    On,
    /// It shall not run.
    Off,
}

/// The steps of a start, in order, but that `store-desired`, `lease-port`, `make-scope`, and `open-files` with
/// `write-boot` after it are done side by side. Each is one reversible host effect.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum StartStep {
    /// Take `vm.lock`.
    TakeLock,
    /// Store that the VM is to run.
    StoreDesired,
    /// Open image, kernel, overlay and disk; make what is missing; check sizes and room.
    OpenFiles,
    /// Lease a port of the bridge from the network.
    LeasePort,
    /// Have systemd make a scope for the shim, where there is a systemd.
    MakeScope,
    /// Write config drive, VMM configuration and attempt file.
    WriteBoot,
    /// Spawn the shim, which starts the VMM.
    LaunchShim,
    /// Wait for the VMM's first proof of life.
    ProveLife,
}

impl StartStep {
    /// All steps, in order.
    pub const ALL: [Self; 8] = [
        Self::TakeLock,
        Self::StoreDesired,
        Self::OpenFiles,
        Self::LeasePort,
        Self::MakeScope,
        Self::WriteBoot,
        Self::LaunchShim,
        Self::ProveLife,
    ];

    /// The step's name as it stands in the API and the journal.
    pub const fn name(self) -> &'static str {
        match self {
            Self::TakeLock => "take-lock",
            Self::StoreDesired => "store-desired",
            Self::OpenFiles => "open-files",
            Self::LeasePort => "lease-port",
            Self::MakeScope => "make-scope",
            Self::WriteBoot => "write-boot",
            Self::LaunchShim => "launch-shim",
            Self::ProveLife => "prove-life",
        }
    }
}

/// Why a VM is stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum StopReason {
    /// It was created and never started.
    NeverStarted,
    /// It was asked to stop, and the guest shut down in time.
    Asked,
    /// It was asked to stop, the guest did not shut down in time, and the VMM was ended.
    AskedThenForced,
    /// It was killed on request.
    Killed,
    /// The guest powered itself off.
    GuestPoweroff,
    /// The guest rebooted itself, which ends a microVM.
    GuestReboot,
    /// The guest's kernel panicked.
    GuestPanic,
    /// A start did not succeed.
    StartFailed {
        /// The step that failed.
        step: StartStep,
        /// What went wrong, as text.
        error: String,
    },
    /// A start was cancelled.
    StartCancelled,
    /// The VMM ended without the guest having shut down.
    VmmDied {
        /// How the VMM ended, as text (`exit status 1`, `signal 11`).
        status: String,
    },
    /// The host was rebooted or lost power while the VM ran.
    HostRebooted,
    /// It was stopped because its user had logged out, which ends what the user left running.
    UserLoggedOut,
    /// It was stopped because the host was shutting down or rebooting.
    HostShutDown,
    /// The VM ended while nobody watched, and left no word why.
    Unknown,
}

impl StopReason {
    /// Whether it stopped only because what it ran on went, in order or not; it is still to run, and has not been
    /// tried since.
    pub const fn is_of_the_host(&self) -> bool {
        matches!(
            self,
            Self::UserLoggedOut | Self::HostShutDown | Self::HostRebooted
        )
    }
}

/// What goes, and takes every VM with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum GoingDown {
    /// The user has logged out, and nothing of theirs may stay.
    User,
    /// The host shuts down or reboots.
    Host,
}

impl GoingDown {
    /// Why a VM is stopped that was stopped for this.
    pub const fn stop_reason(self) -> StopReason {
        match self {
            Self::User => StopReason::UserLoggedOut,
            Self::Host => StopReason::HostShutDown,
        }
    }
}

impl std::fmt::Display for StopReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NeverStarted => f.write_str("never started"),
            Self::Asked => f.write_str("on request"),
            Self::AskedThenForced => f.write_str("on request; the guest did not shut down in time"),
            Self::Killed => f.write_str("killed on request"),
            Self::GuestPoweroff => f.write_str("guest powered off"),
            Self::GuestReboot => f.write_str("guest rebooted"),
            Self::GuestPanic => f.write_str("guest kernel panicked"),
            Self::StartFailed { step, error } => {
                write!(f, "start failed at {}: {error}", step.name())
            }
            Self::StartCancelled => f.write_str("start cancelled"),
            Self::VmmDied { status } => write!(f, "the VMM died ({status})"),
            Self::HostRebooted => f.write_str("host rebooted"),
            Self::UserLoggedOut => f.write_str("user logged out"),
            Self::HostShutDown => f.write_str("host shut down"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}

/// Who paused a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PausedBy {
    /// A person asked for it.
    Person,
    /// The host's filesystem is full.
    FullDisk,
}

/// What a VM is seen to be doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Phase {
    /// No process of it is alive: its lock is free.
    Stopped {
        /// Why it is stopped.
        why: StopReason,
    },
    /// A start is under way.
    Starting {
        /// The step that is under way.
        step: StartStep,
    },
    /// Its VMM runs.
    Running {
        /// The guest has said that it can be used.
        ready: bool,
        /// Its shim answers. If not, it may only be killed, be deleted with `--force`, and be changed in what holds at
        /// once.
        reachable: bool,
    },
    /// Its vCPUs are paused.
    Paused {
        /// Who paused it.
        by: PausedBy,
    },
    /// It was asked to stop.
    Stopping {
        /// When the VMM will be ended if the guest has not shut down.
        #[schemars(with = "String")]
        deadline: Timestamp,
    },
}

impl Phase {
    /// The phase's name, as printed in lists.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Stopped { .. } => "stopped",
            Self::Starting { .. } => "starting",
            Self::Running { .. } => "running",
            Self::Paused { .. } => "paused",
            Self::Stopping { .. } => "stopping",
        }
    }

    /// Whether a VMM may be alive in this phase.
    pub const fn is_live(&self) -> bool {
        match self {
            Self::Stopped { .. } => false,
            Self::Starting { .. }
            | Self::Running { .. }
            | Self::Paused { .. }
            | Self::Stopping { .. } => true,
        }
    }
}
