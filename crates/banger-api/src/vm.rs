//! VMs on the wire.

use crate::error::ErrorBody;
use banger_core::id::{MacAddress, VmId};
use banger_core::name::VmName;
use banger_core::phase::{Desired, Phase};
use banger_core::publish::PublishedPort;
use banger_core::spec::{Driver, DriverChoice, StorageChoice, VmSpec};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

/// A VM as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Vm {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: VmName,
    /// What it is seen to be doing.
    pub phase: Phase,
    /// Its address, for life.
    pub address: Ipv4Addr,
    /// Its NIC's MAC.
    pub mac: MacAddress,
    /// What was asked for.
    pub spec: VmSpec,
    /// How often the spec has been changed.
    pub generation: u64,
    /// Whether it shall run.
    pub desired: Desired,
    /// Grows with every change of anything here; waiting compares it.
    pub revision: u64,
    /// The image's name, if it still has one.
    pub image_name: Option<String>,
    /// The kernel's name, if it still has one.
    pub kernel_name: Option<String>,
    /// Why this storage driver.
    pub storage_reason: String,
    /// What runs it now; `None` unless it is live.
    pub attempt: Option<Attempt>,
    /// The times of the latest boot.
    pub boot: Option<BootTimes>,
    /// The public half of its ssh host key.
    pub host_key: String,
    /// When it was created.
    #[schemars(with = "String")]
    pub created_at: Timestamp,
    /// When it was put into the trash, if it is there.
    #[schemars(with = "Option<String>")]
    pub trashed_at: Option<Timestamp>,
    /// Where its files are.
    pub directory: String,
}

/// One run of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Attempt {
    /// The driver that runs it.
    pub driver: Driver,
    /// How: `kvm` or `tcg`.
    pub accelerator: String,
    /// Why this driver.
    pub reason: String,
    /// The VMM's process id.
    pub vmm_pid: Option<i32>,
    /// The shim's process id.
    pub shim_pid: Option<i32>,
    /// The layers of the VMM's sandbox that hold.
    #[serde(default)]
    pub sandbox: Vec<String>,
    /// The layers that this host refused, each with the reason.
    #[serde(default)]
    pub sandbox_missing: Vec<String>,
    /// The generation of the spec that it booted with.
    pub generation: u64,
}

/// Times of a boot, in milliseconds since the start was asked for; `None` where a stage was not reached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BootTimes {
    /// The VMM runs.
    pub vmm_up: Option<u64>,
    /// The kernel is up: `banger-init` runs.
    pub kernel: Option<u64>,
    /// `banger-init` has handed over to the image's init.
    pub banger_init: Option<u64>,
    /// The agent runs.
    pub agent: Option<u64>,
    /// sshd listens.
    pub ssh: Option<u64>,
    /// The guest said ready.
    pub ready: Option<u64>,
}

/// A request to create a VM. Everything has a default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CreateVm {
    /// Its name; without one, a free adjective and animal.
    pub name: Option<String>,
    /// Its image, by name, id or prefix; without one, the default image.
    pub image: Option<String>,
    /// Its kernel; without one, the image's or the default kernel.
    pub kernel: Option<String>,
    /// vCPUs, 1 to 16.
    pub vcpus: Option<u64>,
    /// Memory in MiB, 128 to 32768.
    pub memory_mib: Option<u64>,
    /// New data it may write to `/`, in bytes.
    pub overlay_bytes: Option<u64>,
    /// Size of a work disk in bytes; without it there is none.
    pub disk_bytes: Option<u64>,
    /// The driver.
    pub driver: DriverChoice,
    /// The storage driver.
    pub storage: StorageChoice,
    /// Whether its guest may reach the public internet.
    pub nat: bool,
    /// Whether NAT leads to private networks as well, though never to the host itself.
    pub nat_private: bool,
    /// Ports of the host that lead into it.
    pub ports: Vec<PublishedPort>,
    /// Start it when the host boots, if it was to run.
    pub autostart: bool,
    /// How much CPU time it may take, in per cent of one CPU, 10 to 10000; without it there is no limit.
    pub cpu_limit: Option<u64>,
    /// Start it at once.
    pub start: bool,
}

/// A change of a VM; what is missing stays. Name, NAT, autostart and the limit of CPU time can be changed whatever it
/// does, the rest only while it is stopped.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SetVm {
    /// vCPUs, 1 to 16.
    pub vcpus: Option<u64>,
    /// Memory in MiB, 128 to 32768.
    pub memory_mib: Option<u64>,
    /// Another name.
    pub name: Option<String>,
    /// Another image, by name, id or prefix: its overlay is thrown away, its work disk stays.
    pub image: Option<String>,
    /// Another kernel, by name, id or prefix.
    pub kernel: Option<String>,
    /// Another driver; `auto` lets each start decide.
    pub driver: Option<DriverChoice>,
    /// More new data that it may write to `/`, in bytes; with it the filesystem grows.
    pub overlay_bytes: Option<u64>,
    /// A larger work disk, in bytes; with it the filesystem grows. Without one before, it gets one.
    pub disk_bytes: Option<u64>,
    /// Whether its guest may reach the public internet.
    pub nat: Option<bool>,
    /// Whether NAT leads to private networks as well, though never to the host itself.
    pub nat_private: Option<bool>,
    /// Whether it starts when the host boots.
    pub autostart: Option<bool>,
    /// How much CPU time it may take, in per cent of one CPU, 10 to 10000; 0 is no limit.
    pub cpu_limit: Option<u64>,
    /// The generation that the change is based on; another one now is a conflict.
    pub generation: Option<u64>,
}

/// Which VMs to list.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ListVms {
    /// Those in the trash instead.
    pub trash: bool,
}

/// How to stop a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StopVm {
    /// How long the guest may take, in milliseconds; 30 s without it.
    pub timeout_ms: Option<u64>,
}

/// How to delete a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DeleteVm {
    /// Kill it first if it is live.
    pub force: bool,
    /// Remove record and files permanently instead of keeping them as trash.
    pub purge: bool,
}

/// How to bring a VM back from the trash.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct UndeleteVm {
    /// Its name from now on; without it the one it had.
    pub name: Option<String>,
}

/// How to reset a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ResetVm {
    /// Another storage driver for its fresh overlay.
    pub storage: Option<StorageChoice>,
}

/// Which VMs to bring back to what is desired.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RestoreVms {
    /// Those with autostart alone, and only once per boot of the host.
    pub autostart: bool,
}

/// What became of one of several VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Outcome {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: VmName,
    /// What went wrong, if anything did.
    pub error: Option<ErrorBody>,
}

/// What to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum WaitFor {
    /// The guest can be used.
    #[default]
    Ready,
    /// The VMM runs.
    Running,
    /// The VM is stopped.
    Stopped,
    /// Anything newer than `after`.
    Change,
}

/// A wait.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct WaitVm {
    /// What to wait for.
    #[serde(rename = "for")]
    pub condition: WaitFor,
    /// How long, in milliseconds; 60 s without it.
    pub timeout_ms: Option<u64>,
    /// For [`WaitFor::Change`]: the revision already known.
    pub after: Option<u64>,
}

/// Which log to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LogSource {
    /// The guest's console.
    #[default]
    Console,
    /// What the VMM and its shim said.
    Vmm,
}

/// How to read a log. The reply is a stream of raw bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReadLog {
    /// Which.
    pub source: LogSource,
    /// Go on with what comes.
    pub follow: bool,
}

/// Where to connect to. The reply is an upgrade to a two-way stream of bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConnectVm {
    /// The guest's TCP port.
    pub port: u16,
}

/// One line of a VM's story.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct JournalEntry {
    /// When.
    #[schemars(with = "String")]
    pub at: Timestamp,
    /// What was being done: `create`, `start`, `stop`, `guest`, `recover` …
    pub subject: String,
    /// What happened.
    pub message: String,
    /// How long it took, in microseconds, for a step.
    pub took_us: Option<u64>,
}
