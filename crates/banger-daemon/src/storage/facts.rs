//! What this host allows, found by trying.

use banger_core::id::{InstanceId, VmId};
use banger_host::host_side::HostSide;
use banger_host::op::HostOp;
use banger_host::storage::{filesystem_name, mount_point, try_reflink};
use std::path::Path;
use std::sync::OnceLock;
use uuid::Uuid;

/// Where udev is told what to leave alone.
const RULES: [&str; 5] = [
    "/etc/udev/rules.d",
    "/run/udev/rules.d",
    "/usr/local/lib/udev/rules.d",
    "/usr/lib/udev/rules.d",
    "/lib/udev/rules.d",
];
/// The file that tells it.
const RULES_FILE: &str = "60-banger.rules";
/// There while udev runs.
const UDEV: &str = "/run/udev/control";

/// What this host allows.
#[derive(Debug)]
pub(crate) struct StorageFacts {
    /// Blocks of an image can be shared with a VM's file: where that is, or why not.
    pub(crate) reflink: Result<String, String>,
    /// Looked at only when it is asked for: it may load a module.
    snapshot: OnceLock<Result<(), String>>,
}

impl StorageFacts {
    /// Tries to share a block between the folder of the images and the folder of the VMs.
    pub(crate) fn measure(images: &Path, vms: &Path) -> Self {
        Self {
            reflink: reflink(images, vms),
            snapshot: OnceLock::new(),
        }
    }

    /// Whether device-mapper makes snapshots for us, or why not.
    pub(crate) fn snapshot(&self) -> &Result<(), String> {
        self.snapshot.get_or_init(snapshot)
    }
}

fn reflink(images: &Path, vms: &Path) -> Result<String, String> {
    let tried = try_reflink(images, vms);
    tried.map_err(|error| banger_host::error_chain(&error))?;
    Ok(format!(
        "{} is {}",
        mount_point(vms).display(),
        filesystem_name(vms).unwrap_or("a filesystem that shares blocks")
    ))
}

fn snapshot() -> Result<(), String> {
    let side = HostSide::find().ok_or("it needs root, or `banger-helper`")?;
    let nobody = Uuid::nil();
    let status = HostOp::SnapshotStatus {
        instance: InstanceId::from_uuid(nobody),
        vm: VmId::from_uuid(nobody),
    };
    side.perform(&status, &[])
        .map_err(|error| banger_host::error_chain(&error))?;
    let told = RULES
        .iter()
        .any(|folder| Path::new(folder).join(RULES_FILE).exists());
    if Path::new(UDEV).exists() && !told {
        return Err(format!(
            "udev would name disks of the host by what images say: `{}/{RULES_FILE}` is missing, which \
             `sudo make install` puts there",
            RULES[2]
        ));
    }
    Ok(())
}
