//! The operations that need root on the host.

use banger_core::addr::Pool;
use banger_core::id::{InstanceId, VmId};
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

/// An operation that needs root on the host: done in process where the daemon is root, else by `banger-helper`.
///
/// `Ensure…` and `Attach…` measure first and change only what differs; `Remove…` and `Detach…` of what is gone
/// already is a success. Every object carries the caller's user id and the instance; what has the same name without
/// that tag is never touched, and the operation refuses by naming it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum HostOp {
    /// Say who is there. Answers [`HostAnswer::Hello`].
    Hello {},
    /// Make the veth between host and namespace, give the host's end its address, route the guests' network through
    /// it, and load the instance's table into the host's packet filter: nothing passes but answers. Comes with one
    /// descriptor: the network namespace, which must be the caller's own.
    AttachVeth {
        /// Whose: names the host's end.
        instance: InstanceId,
        /// The addresses: a /20 of a private network that no route of the host overlaps.
        pool: Pool,
    },
    /// Remove the veth and all that stands on it: table, NAT, the link's names.
    DetachVeth {
        /// Whose.
        instance: InstanceId,
    },
    /// Let the guests out by the devices of the default routes, behind the host's address. The veth must be there.
    /// Kept right, until it is removed, when default routes change and when somebody flushes the packet filter.
    /// Answers [`HostAnswer::Nat`].
    EnsureNat {
        /// Whose.
        instance: InstanceId,
        /// The addresses.
        pool: Pool,
    },
    /// Close the way out again, and put the devices' forwarding back unless another instance needs it.
    RemoveNat {
        /// Whose.
        instance: InstanceId,
    },
    /// Tell systemd-resolved that names below `.vm`, and the guests' addresses, are asked of `dns`. The veth must be
    /// there. Answers [`HostAnswer::Resolved`].
    EnsureResolved {
        /// Whose.
        instance: InstanceId,
        /// The addresses.
        pool: Pool,
        /// The name server: an address of the pool.
        dns: Ipv4Addr,
    },
    /// Make a VM's snapshot of its image, anew if there is one, which nobody may use. Comes with two descriptors: the
    /// image, open for reading alone, and the copy-on-write file, open for reading and writing; its first bytes are
    /// zeros or what an earlier snapshot of the same image left. Answers [`HostAnswer::Device`].
    AttachSnapshot {
        /// Whose.
        instance: InstanceId,
        /// The VM.
        vm: VmId,
        /// Its size in sectors of 512 bytes, at least the image's; what is above the image reads as zeros.
        sectors: u64,
    },
    /// Take it apart; the copy-on-write file keeps what was written.
    DetachSnapshot {
        /// Whose.
        instance: InstanceId,
        /// The VM.
        vm: VmId,
    },
    /// Have the kernel see that the copy-on-write file has grown. Answers [`HostAnswer::Snapshot`].
    GrowSnapshot {
        /// Whose.
        instance: InstanceId,
        /// The VM.
        vm: VmId,
    },
    /// How full the copy-on-write file is. Answers [`HostAnswer::Snapshot`].
    SnapshotStatus {
        /// Whose.
        instance: InstanceId,
        /// The VM.
        vm: VmId,
    },
    /// List all objects of the caller on the host. Answers [`HostAnswer::Owned`].
    ListOwned {},
}

impl HostOp {
    /// Its name, as in messages.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Hello {} => "hello",
            Self::AttachVeth { .. } => "attach-veth",
            Self::DetachVeth { .. } => "detach-veth",
            Self::EnsureNat { .. } => "ensure-nat",
            Self::RemoveNat { .. } => "remove-nat",
            Self::EnsureResolved { .. } => "ensure-resolved",
            Self::AttachSnapshot { .. } => "attach-snapshot",
            Self::DetachSnapshot { .. } => "detach-snapshot",
            Self::GrowSnapshot { .. } => "grow-snapshot",
            Self::SnapshotStatus { .. } => "snapshot-status",
            Self::ListOwned {} => "list-owned",
        }
    }

    /// Whether it may leave anything other than it was.
    pub const fn changes_something(&self) -> bool {
        !matches!(
            self,
            Self::Hello {} | Self::SnapshotStatus { .. } | Self::ListOwned {}
        )
    }

    /// How many descriptors come with it.
    pub const fn descriptors(&self) -> usize {
        match self {
            Self::AttachVeth { .. } => 1,
            Self::AttachSnapshot { .. } => 2,
            Self::Hello {}
            | Self::DetachVeth { .. }
            | Self::EnsureNat { .. }
            | Self::RemoveNat { .. }
            | Self::EnsureResolved { .. }
            | Self::DetachSnapshot { .. }
            | Self::GrowSnapshot { .. }
            | Self::SnapshotStatus { .. }
            | Self::ListOwned {} => 0,
        }
    }
}

/// One message to `banger-helper`, with the operation's descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HostRequest {
    /// What to do.
    pub op: HostOp,
}

/// What an operation answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum HostAnswer {
    /// Done.
    Done,
    /// Who is there.
    Hello {
        /// The process that does the work.
        pid: i32,
        /// Its version.
        version: String,
    },
    /// NAT is up on our side.
    Nat(NatReport),
    /// What became of the names.
    Resolved(ResolvedReport),
    /// A block device that the caller may open.
    Device {
        /// Its node.
        path: String,
    },
    /// How a snapshot is.
    Snapshot(SnapshotState),
    /// The caller's objects.
    Owned {
        /// By kind, then name.
        objects: Vec<OwnedObject>,
    },
}

/// How a snapshot is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum SnapshotState {
    /// It works.
    Valid {
        /// What is taken of the copy-on-write file, in sectors of 512 bytes.
        used_sectors: u64,
        /// How large that file is for the kernel, in sectors.
        total_sectors: u64,
    },
    /// There is none.
    Absent,
    /// The kernel has dropped it, for ever: its copy-on-write file ran out of room, or could not be written.
    Lost {
        /// The kernel's word for it.
        why: String,
    },
}

/// How the guests get out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NatReport {
    /// The devices of the host's default routes; none while the host itself is offline.
    pub uplinks: Vec<String>,
    /// Rules of others that drop what the guests forward. Ours cannot overrule them and never change them.
    pub forward_closed_by: Vec<ClosedForward>,
}

/// A chain of somebody else's that drops what is forwarded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClosedForward {
    /// Which, and whose: `chain FORWARD of table ip filter (Docker)`.
    pub chain: String,
    /// The commands, run as root, that let our guests through.
    pub remedy: String,
}

/// What became of the names below `.vm` on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum ResolvedReport {
    /// systemd-resolved asks the instance's name server.
    Routed,
    /// systemd-resolved does not run here.
    NotRunning,
    /// It runs, but `busctl` is not installed.
    NoBusctl,
}

/// What an [`OwnedObject`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OwnedKind {
    /// The host's end of a veth.
    Veth,
    /// A table of the host's packet filter.
    NftTable,
    /// A device of device-mapper.
    Snapshot,
    /// A device whose forwarding is on for the instance's sake.
    Forwarding,
}

/// An object of the host with our tag.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct OwnedObject {
    /// What it is.
    pub kind: OwnedKind,
    /// Its name on the host.
    pub name: String,
    /// Whose.
    pub instance: InstanceId,
}

/// The one refusal of `banger-helper` that another try may overcome: the user, or all users together, has too many
/// requests under way.
pub const TOO_MANY_REQUESTS: &str = "too many requests at once";

/// One message from `banger-helper`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReply {
    /// The answer, or what went wrong (with its causes joined by `: `).
    pub result: Result<HostAnswer, String>,
}
