//! What banger has on the host, on the wire.

use crate::error::ErrorBody;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What an object on the host is.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum HostKind {
    /// A process: the daemon, the keeper of the namespace, `pasta` and who holds it, shims and VMMs.
    Process,
    /// The cgroup of a VM, by a scope of systemd's.
    Cgroup,
    /// A network namespace.
    Namespace,
    /// A VM's port of the bridge in the namespace.
    Tap,
    /// A port of the host that leads into a guest.
    PublishedPort,
    /// The host's end of the link to the namespace.
    Veth,
    /// A table with the instance's rules in the host's packet filter.
    NftTable,
    /// A device of the host that forwards for the guests' sake.
    Forwarding,
    /// What systemd-resolved was told of a link: who knows names below `.vm`.
    Resolver,
    /// A device of device-mapper.
    Snapshot,
    /// A loop device below one of those.
    Loop,
}

impl HostKind {
    /// Every kind.
    pub const ALL: [Self; 11] = [
        Self::Process,
        Self::Cgroup,
        Self::Namespace,
        Self::Tap,
        Self::PublishedPort,
        Self::Veth,
        Self::NftTable,
        Self::Forwarding,
        Self::Resolver,
        Self::Snapshot,
        Self::Loop,
    ];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Cgroup => "cgroup",
            Self::Namespace => "namespace",
            Self::Tap => "tap",
            Self::PublishedPort => "published-port",
            Self::Veth => "veth",
            Self::NftTable => "nft-table",
            Self::Forwarding => "forwarding",
            Self::Resolver => "resolver",
            Self::Snapshot => "snapshot",
            Self::Loop => "loop",
        }
    }
}

/// One object on the host that belongs to banger.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub struct HostObject {
    /// What it is.
    pub kind: HostKind,
    /// Its name or number on the host.
    pub name: String,
    /// Whose it is: a VM's name, `(instance)`, or `(another instance)` and its id.
    pub owner: String,
    /// The owner is known and explains it; else it is left over, and `doctor --repair` or `host clean` removes it.
    pub expected: bool,
}

/// How to clean the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CleanHost {
    /// Stop all VMs first; without it a live VM is a reason to refuse.
    pub force: bool,
}

/// What a repair or a cleaning did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Mended {
    /// What was put right, one a line.
    pub done: Vec<String>,
    /// What could not be, why, and what helps.
    pub left: Vec<ErrorBody>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_on_the_wire_as_it_is_named() {
        for kind in HostKind::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        }
    }
}
