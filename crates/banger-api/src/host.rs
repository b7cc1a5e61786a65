//! What banger has on the host, on the wire.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One object on the host that belongs to banger.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub struct HostObject {
    /// What it is: `process`, `namespace`, `tap`, `rule`, `veth`, `nft-table`, `loop`, `dm` …
    pub kind: String,
    /// Its name or number on the host.
    pub name: String,
    /// Whose it is: a VM's name, or `(instance)`.
    pub owner: String,
    /// The owner is known and explains it; else it is left over, and `host clean` removes it.
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
    /// What could not be, and why.
    pub left: Vec<String>,
}
