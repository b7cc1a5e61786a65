//! What this host allows, found by trying.

use banger_host::storage::snapshot_files::STACKED;
use banger_host::storage::{filesystem_name, mount_point, try_reflink};
use std::path::Path;

/// What this host allows.
#[derive(Debug)]
pub(crate) struct StorageFacts {
    /// Blocks of an image can be shared with a VM's file: where that is, or why not.
    pub(crate) reflink: Result<String, String>,
    /// Images and VMs are on filesystems that keep their files' blocks themselves, or which one is not.
    pub(crate) own_blocks: Result<(), String>,
}

impl StorageFacts {
    /// Tries to share a block between the folder of the images and the folder of the VMs.
    pub(crate) fn measure(images: &Path, vms: &Path) -> Self {
        Self {
            reflink: reflink(images, vms),
            own_blocks: [images, vms].into_iter().try_for_each(own_blocks),
        }
    }
}

fn own_blocks(folder: &Path) -> Result<(), String> {
    match filesystem_name(folder) {
        Some(name) if STACKED.contains(&name) => Err(format!(
            "`{}` is on {name}, which does not keep a file's blocks itself",
            folder.display()
        )),
        _ => Ok(()),
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
