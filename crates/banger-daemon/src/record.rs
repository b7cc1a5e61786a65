//! A VM's durable facts: the row, and its mirror in `vm.json`.

use crate::network::PortPlan;
use banger_api::vm::BootTimes;
use banger_core::id::VmId;
use banger_core::name::VmName;
use banger_core::phase::{Desired, StopReason};
use banger_core::spec::VmSpec;
use banger_host::storage::replace_unsynced;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;
use std::path::Path;
use uuid::Uuid;

/// Everything about a VM that must survive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VmRecord {
    pub(crate) id: VmId,
    pub(crate) name: VmName,
    pub(crate) spec: VmSpec,
    /// Counts changes of the spec.
    pub(crate) generation: u64,
    pub(crate) desired: Desired,
    /// Raised by every durable change; the higher one of row and `vm.json` wins.
    pub(crate) record_version: u64,
    pub(crate) address: Ipv4Addr,
    pub(crate) host_key: String,
    pub(crate) host_key_public: String,
    pub(crate) overlay_uuid: Uuid,
    pub(crate) disk_uuid: Option<Uuid>,
    /// SHA-256 of the image's bytes when the VM was created.
    pub(crate) image_digest: String,
    pub(crate) storage_reason: String,
    pub(crate) last_stop: StopReason,
    /// The run whose end `last_stop` tells.
    #[serde(default)]
    pub(crate) last_attempt: Option<String>,
    /// It has been started at least once: its files hold data, and a missing one is an error.
    pub(crate) started_once: bool,
    /// Its overlay was thrown away and is not yet made anew: that comes before its next start.
    #[serde(default)]
    pub(crate) reset_pending: bool,
    pub(crate) boot: Option<BootTimes>,
    pub(crate) created_at: Timestamp,
    pub(crate) trashed_at: Option<Timestamp>,
    /// Its files are being removed permanently.
    pub(crate) purging: bool,
    /// The key under which it was created, so that a repeated request finds it.
    pub(crate) idempotency_key: Option<String>,
}

/// `vm.json`.
#[derive(Debug, Serialize, Deserialize)]
struct VmFile {
    meta: VmRecord,
    config: serde_json::Value,
}

/// The name of the mirror in a VM's folder.
pub(crate) const VM_FILE: &str = "vm.json";

/// Why a mirror cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MirrorError {
    #[error("cannot read `{}`", path.display())]
    Read {
        path: std::path::PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("`{}` is no record of a VM", path.display())]
    Parse {
        path: std::path::PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

impl VmRecord {
    /// Writes the mirror. It is not synced: the row is what was promised.
    pub(crate) fn mirror(
        &self,
        folder: &Path,
        config: Option<serde_json::Value>,
    ) -> std::io::Result<()> {
        let path = folder.join(VM_FILE);
        let config = config
            .or_else(|| read(&path).ok().map(|file| file.config))
            .unwrap_or_default();
        let file = VmFile {
            meta: self.clone(),
            config,
        };
        let bytes = serde_json::to_vec_pretty(&file)?;
        replace_unsynced(&path, &bytes, 0o600)
    }

    /// What it has of the network while it lives.
    pub(crate) fn port_plan(&self) -> PortPlan {
        PortPlan {
            vm: self.id,
            address: self.address,
            nat: self.spec.nat,
            nat_private: self.spec.nat_private,
            ports: self.spec.ports.clone(),
            joins: self.spec.joins.clone(),
        }
    }

    /// Reads the mirror in `folder`.
    pub(crate) fn from_mirror(folder: &Path) -> Result<Self, MirrorError> {
        read(&folder.join(VM_FILE)).map(|file| file.meta)
    }
}

fn read(path: &Path) -> Result<VmFile, MirrorError> {
    let bytes = std::fs::read(path).map_err(|source| MirrorError::Read {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_slice(&bytes).map_err(|source| MirrorError::Parse {
        path: path.to_owned(),
        source,
    })
}
