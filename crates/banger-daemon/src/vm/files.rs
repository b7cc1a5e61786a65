//! A VM's folder: where its files are, and how they are staged and made.

use crate::images::{STAGING, build_error};
use crate::record::VmRecord;
use crate::world::World;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::paths::Paths;
use banger_core::id::VmId;
use banger_core::spec::Storage;
use banger_image::context::Context;
use banger_image::template;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// The paths inside a VM's folder.
#[derive(Debug, Clone)]
pub(crate) struct VmFiles {
    pub(crate) folder: PathBuf,
}

impl VmFiles {
    pub(crate) fn of(paths: &Paths, id: VmId) -> Self {
        Self {
            folder: paths.vm(id),
        }
    }

    /// Where a VM that is being created is put together.
    pub(crate) fn staging(paths: &Paths, id: VmId) -> Self {
        Self {
            folder: paths.vms().join(format!("{STAGING}{id}")),
        }
    }

    /// The VM's own layer, or its own copy of the image.
    pub(crate) fn overlay(&self) -> PathBuf {
        self.folder.join("overlay.img")
    }

    pub(crate) fn disk(&self) -> PathBuf {
        self.folder.join("disk.img")
    }

    pub(crate) fn console(&self) -> PathBuf {
        self.folder.join("console.log")
    }

    pub(crate) fn vmm_log(&self) -> PathBuf {
        self.folder.join("vmm.log")
    }

    pub(crate) fn metrics(&self) -> PathBuf {
        self.folder.join("metrics.log")
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.folder.join("vm.lock")
    }

    pub(crate) fn run(&self) -> PathBuf {
        self.folder.join("run")
    }

    pub(crate) fn shim_socket(&self) -> PathBuf {
        self.run().join("shim.sock")
    }

    pub(crate) fn attempt(&self) -> PathBuf {
        self.run().join("attempt.json")
    }

    pub(crate) fn exit(&self) -> PathBuf {
        self.run().join("exit.json")
    }

    pub(crate) fn config_drive(&self) -> PathBuf {
        self.run().join("config.img")
    }
}

/// Makes a folder that only its owner may enter.
pub(crate) fn make_folder(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

/// Makes the writable layer of a VM, which must not exist.
pub(crate) fn make_overlay(
    world: &World,
    record: &VmRecord,
    target: &Path,
) -> Result<(), ErrorBody> {
    match record.spec.storage {
        Storage::Overlay => make_empty(
            world,
            record.spec.overlay_bytes.get(),
            target,
            record.overlay_uuid,
        ),
        Storage::Copy => {
            let image = world
                .images
                .image_folder(record.spec.image)
                .join(banger_image::image::ROOT_IMAGE);
            let size = std::fs::metadata(&image).map(|metadata| metadata.len());
            let size = size.map_err(|error| io_error("read", &image, &error))?;
            template::sparse_copy(&image, target).map_err(|error| build_error(&error))?;
            let grown = size + record.spec.overlay_bytes.get();
            let file = std::fs::OpenOptions::new().write(true).open(target);
            file.and_then(|file| file.set_len(grown))
                .map_err(|error| io_error("grow", target, &error))
        }
    }
}

/// Makes the work disk of a VM, which must not exist.
pub(crate) fn make_disk(
    world: &World,
    bytes: u64,
    uuid: Uuid,
    target: &Path,
) -> Result<(), ErrorBody> {
    make_empty(world, bytes, target, uuid)
}

fn make_empty(world: &World, bytes: u64, target: &Path, uuid: Uuid) -> Result<(), ErrorBody> {
    let context = Context::quiet(world.paths.cache.clone());
    let template =
        template::ensure_empty_ext4(bytes, &context).map_err(|error| build_error(&error))?;
    template::clone_empty_ext4(&template, target, uuid).map_err(|error| build_error(&error))
}

/// A file operation's error on the wire.
pub(crate) fn io_error(action: &str, path: &Path, error: &std::io::Error) -> ErrorBody {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    let message = format!("cannot {action} `{}`", path.display());
    if matches!(error.kind(), StorageFull | QuotaExceeded) {
        return ErrorBody::new(ErrorCode::NoSpace, message)
            .caused_by(error)
            .hint("free some space and repeat the command");
    }
    ErrorBody::new(ErrorCode::Internal, message).caused_by(error)
}
