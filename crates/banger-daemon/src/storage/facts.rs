//! What this host allows, found by trying.

use banger_host::storage::{filesystem_name, mount_point, try_reflink};
use std::path::Path;

/// What this host allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StorageFacts {
    /// Blocks of an image can be shared with a VM's file: where that is, or why not.
    pub(crate) reflink: Result<String, String>,
}

impl StorageFacts {
    /// Tries to share a block between the folder of the images and the folder of the VMs.
    pub(crate) fn measure(images: &Path, vms: &Path) -> Self {
        Self {
            reflink: reflink(images, vms),
        }
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
