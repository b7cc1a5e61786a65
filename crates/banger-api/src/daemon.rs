//! The daemon, its drivers and the host's fitness on the wire.

use banger_core::addr::Pool;
use banger_core::id::InstanceId;
use banger_core::phase::GoingDown;
use banger_core::spec::Driver;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the daemon gets what only root may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The daemon is root: the host reaches guests by address.
    Root,
    /// An ordinary user's daemon; `banger-helper` does what only root may: the host reaches guests by address.
    Helper,
    /// No root anywhere: guests are reached through the daemon.
    Rootless,
}

impl Mode {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Helper => "helper",
            Self::Rootless => "rootless",
        }
    }
}

/// The daemon as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DaemonStatus {
    /// Its version.
    pub version: String,
    /// Its build.
    pub build: String,
    /// The version of its database's schema.
    pub schema: u64,
    /// Its process id.
    pub pid: u32,
    /// The instance.
    pub instance: InstanceId,
    /// How it gets what only root may do.
    pub mode: Mode,
    /// Why it is this mode, and what would give another.
    #[serde(default)]
    pub mode_why: String,
    /// The instance's addresses.
    pub pool: Pool,
    /// When it started.
    #[schemars(with = "String")]
    pub started_at: Timestamp,
    /// VMs, without those in the trash.
    pub vms: usize,
    /// VMs that are live.
    pub live: usize,
    /// Where its state is.
    pub state_dir: String,
    /// What it found and repaired when it started.
    pub notices: Vec<String>,
}

/// How to stop the daemon.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StopDaemon {
    /// Stop all VMs first; without it they run on.
    pub vms: bool,
    /// Why `vms` are stopped, if it is not that a person wants them off: they are still to run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub going_down: Option<GoingDown>,
}

/// Where the value of a setting comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SettingSource {
    /// Nothing else was said.
    Default,
    /// `config.toml`.
    File,
    /// The daemon found it out, or the instance has it since it was made.
    Daemon,
}

/// One of the settings in `config.toml`, as the daemon has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Setting {
    /// Its section and key, as in `network.pool`.
    pub key: String,
    /// Its value; `None` if there is none.
    pub value: Option<serde_json::Value>,
    /// Where that comes from.
    pub source: SettingSource,
    /// What it is about.
    pub about: String,
}

/// All settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Settings {
    /// The file, whether it is there or not.
    pub file: String,
    /// All of them, in order, those of a section together.
    pub settings: Vec<Setting>,
}

/// A VMM that was looked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DriverInfo {
    /// The driver.
    pub driver: Driver,
    /// Where its program is, if it was found.
    pub path: Option<String>,
    /// The program's version.
    pub version: Option<String>,
    /// Whether it can run guests here.
    pub usable: bool,
    /// Whether `auto` picks it.
    pub default: bool,
    /// Why it is usable, is not, or is picked.
    pub reason: String,
}

/// A request to install Firecracker. The reply is an operation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct InstallDriver {
    /// The version; without it the newest that this banger knows.
    pub version: Option<String>,
    /// A URL of a release archive instead of the known one.
    pub url: Option<String>,
    /// The archive's SHA-256; without it, that of the release's own checksum file.
    pub sha256: Option<String>,
    /// An absolute path to an archive or a `firecracker` program, instead of a download.
    pub from: Option<String>,
}

/// One line of `banger doctor`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Check {
    /// What was looked at.
    pub subject: String,
    /// How it is.
    pub verdict: Verdict,
    /// What was found.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// How a checked thing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it should be.
    Good,
    /// Works, but could be better.
    Note,
    /// Something does not work because of it.
    Bad,
}
