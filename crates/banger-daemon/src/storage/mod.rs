//! How a VM gets its own `/`: one trait, one file a driver. All of it blocks and belongs on a thread that may.
//!
//! ```text
//!   create   the VM's folder is staged        reset    the layer is thrown away and made anew
//!   open     a start: checks, attaches        close    a dead VM: detaches; nothing of the layer is lost
//! ```

mod copy;
mod facts;
mod overlay;
mod reflink;
mod snapshot;
mod tending;
pub(crate) mod watermark;

#[cfg(test)]
mod tests;

pub(crate) use facts::StorageFacts;
pub(crate) use snapshot::{Snapshot, Tended, Untended};

use crate::images::build_error;
use crate::record::VmRecord;
use crate::vm::files::{VmFiles, io_error};
use crate::world::World;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_core::id::{InstanceId, VmId};
use banger_core::name::VmName;
use banger_core::spec::{Storage, StorageChoice, StorageImpossible, resolve_storage};
use banger_host::host_side::HostSide;
use banger_image::context::Context;
use banger_image::error::BuildError;
use banger_image::image::ImageManifest;
use banger_image::image::ROOT_IMAGE;
use banger_image::template;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use uuid::Uuid;

/// Whose an attached layer is: all host objects of it carry this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) instance: InstanceId,
    pub(crate) vm: VmId,
}

/// One VM's own layer over its image: what a storage driver works on.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) owner: Owner,
    pub(crate) name: VmName,
    /// The image's filesystem, which is never written to.
    pub(crate) image: PathBuf,
    pub(crate) image_uuid: String,
    /// SHA-256 of the image now, and when the layer was made.
    pub(crate) image_digest: String,
    pub(crate) made_over: String,
    /// The VM's own file.
    pub(crate) file: PathBuf,
    /// The UUID of a filesystem of its own.
    pub(crate) overlay_uuid: Uuid,
    /// New data that the VM may write.
    pub(crate) overlay_bytes: u64,
    /// It may hold data: it is never made again.
    pub(crate) precious: bool,
    /// Where templates are kept.
    pub(crate) cache: PathBuf,
}

impl Layer {
    /// The layer of `record` in the folder of `files`.
    ///
    /// # Errors
    /// Its image is gone.
    pub(crate) fn of(world: &World, record: &VmRecord, files: &VmFiles) -> Result<Self, ErrorBody> {
        let image = world
            .images
            .by_id::<ImageManifest>(record.spec.image)
            .ok_or_else(|| {
                ErrorBody::new(
                    ErrorCode::NotFound,
                    format!(
                        "the image {} of VM `{}` is gone",
                        record.spec.image, record.name
                    ),
                )
                .hint("`banger image list` shows those that are there")
            })?
            .manifest;
        Ok(Self {
            owner: Owner {
                instance: world.instance.id,
                vm: record.id,
            },
            name: record.name.clone(),
            image: world
                .images
                .folder::<ImageManifest>(image.id)
                .join(ROOT_IMAGE),
            image_uuid: image.uuid,
            image_digest: image.sha256,
            made_over: record.image_digest.clone(),
            file: files.overlay(),
            overlay_uuid: record.overlay_uuid,
            overlay_bytes: record.spec.overlay_bytes.get(),
            precious: record.started_once,
            cache: world.paths.cache.clone(),
        })
    }

    /// The room that the layer takes when it is made, in bytes.
    pub(crate) fn room(&self, storage: Storage) -> u64 {
        match storage {
            Storage::Reflink | Storage::Overlay => 0,
            Storage::Copy => banger_host::storage::allocated(&self.image).unwrap_or_default(),
            Storage::Snapshot => {
                let image = self.image_bytes().unwrap_or_default();
                banger_core::watermark::cow_first(image + self.overlay_bytes)
            }
        }
    }

    fn image_bytes(&self) -> Result<u64, ErrorBody> {
        let facts = std::fs::metadata(&self.image);
        facts
            .map(|facts| facts.len())
            .map_err(|error| io_error("read", &self.image, &error))
    }
}

/// What a VM boots from, in the order of drives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RootDrive {
    /// The root drive's file or block device.
    pub(crate) path: PathBuf,
    /// The UUID of its filesystem.
    pub(crate) uuid: String,
    /// It is the VM's own: written to, and grown in the guest.
    pub(crate) own: bool,
    /// The overlay drive's file and UUID, where the guest joins the two.
    pub(crate) overlay: Option<(PathBuf, Uuid)>,
}

impl RootDrive {
    /// A root that is the VM's own, with the image's UUID.
    fn own(path: PathBuf, layer: &Layer) -> Self {
        Self {
            path,
            uuid: layer.image_uuid.clone(),
            own: true,
            overlay: None,
        }
    }
}

/// A storage driver.
pub(crate) trait StorageDriver: std::fmt::Debug + Send + Sync {
    /// What speaks for it on this host, or why it is not possible.
    fn judge(&self, facts: &StorageFacts) -> Result<String, String>;

    /// Makes the layer's file, which must not exist. After an error nothing is left of it.
    fn create(&self, layer: &Layer) -> Result<(), ErrorBody>;

    /// Checks the layer and attaches what the host must attach. One that is missing is made if it holds no data yet.
    /// Opening what is open already is a success: only one start holds the VM's lock.
    fn open(&self, layer: &Layer) -> Result<RootDrive, ErrorBody>;

    /// Detaches what [`StorageDriver::open`] attached. No error if nothing is. It needs no write to succeed.
    fn close(&self, owner: &Owner) -> Result<(), ErrorBody> {
        let _ = owner;
        Ok(())
    }

    /// Makes room in the layer for as much new data as it says now, which is more than before; what it holds stays, and
    /// the guest grows the filesystem. Nothing may be attached, and the VM's lock must be held.
    fn grow(&self, layer: &Layer) -> Result<(), ErrorBody>;

    /// Throws the layer away and makes a fresh one over the layer's image. The VM's lock must be held. After an
    /// error, or a crash, the old layer is there, whole, or the new one.
    fn reset(&self, layer: &Layer) -> Result<(), ErrorBody> {
        let fresh = fresh_beside(&layer.file);
        remove_if_there(&fresh)?;
        self.create(&Layer {
            file: fresh.clone(),
            ..layer.clone()
        })?;
        self.close(&layer.owner)?;
        let renamed = banger_host::storage::sync_file(&fresh)
            .map_err(|error| ErrorBody::from_error(ErrorCode::Internal, &error))
            .and_then(|()| {
                std::fs::rename(&fresh, &layer.file)
                    .map_err(|error| io_error("replace", &layer.file, &error))
            })
            // Else the old layer could be back after a power cut, when the reset is long forgotten.
            .and_then(|()| make_durable(&layer.file));
        if renamed.is_err() {
            // The first failure is what counts; the next reset removes what is left.
            let _ = std::fs::remove_file(&fresh);
        }
        renamed
    }
}

/// The storage drivers, and what this host can do for them, measured once for each run of the daemon.
#[derive(Debug)]
pub(crate) struct StorageHost {
    facts: OnceLock<StorageFacts>,
    snapshot: Snapshot,
}

impl StorageHost {
    /// With `side`, if there is one, for what needs root.
    pub(crate) fn new(side: Option<Arc<HostSide>>) -> Self {
        Self {
            facts: OnceLock::new(),
            snapshot: Snapshot::new(side),
        }
    }

    /// The driver of that name.
    pub(crate) fn driver(&self, storage: Storage) -> &dyn StorageDriver {
        match storage {
            Storage::Reflink => &reflink::Reflink,
            Storage::Overlay => &overlay::Overlay,
            Storage::Copy => &copy::Copy,
            Storage::Snapshot => &self.snapshot,
        }
    }

    /// The driver that can do more than the others have to.
    pub(crate) fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The facts. The first call tries things out on the two filesystems.
    pub(crate) fn facts(&self, images: &Path, vms: &Path) -> &StorageFacts {
        self.facts
            .get_or_init(|| StorageFacts::measure(images, vms))
    }
}

/// The storage for `choice` on this host, and why.
pub(crate) fn choose(
    world: &World,
    choice: StorageChoice,
) -> Result<(Storage, String), StorageImpossible> {
    let facts = world
        .storage
        .facts(&world.paths.images(), &world.paths.vms());
    resolve_storage(choice, |storage| world.storage.driver(storage).judge(facts))
}

/// Why a storage cannot be had, on the wire.
pub(crate) fn impossible(error: &StorageImpossible) -> ErrorBody {
    ErrorBody::new(ErrorCode::HostUnfit, error.to_string())
        .hint("`--storage auto` takes the best one that this host allows")
}

/// Makes an empty ext4 of `bytes`, which must not exist.
pub(crate) fn make_empty(
    cache: &Path,
    bytes: u64,
    target: &Path,
    uuid: Uuid,
) -> Result<(), ErrorBody> {
    let context = Context::quiet(cache.to_owned());
    let template =
        template::ensure_empty_ext4(bytes, &context).map_err(|error| build_error(&error))?;
    template::clone_empty_ext4(&template, target, uuid).map_err(|error| build_error(&error))
}

/// A layer whose content lies between the image's blocks fits no other image.
fn made_over_another(layer: &Layer) -> Result<(), ErrorBody> {
    if layer.image_digest == layer.made_over {
        return Ok(());
    }
    Err(ErrorBody::new(
        ErrorCode::BadFile,
        format!(
            "the image of VM `{}` is not the one its overlay was made over",
            layer.name
        ),
    ))
}

/// Opens the work disk of a VM that is starting: checks that it is the VM's own, as [`ensure_disk`].
pub(crate) fn open_disk(
    layer: &Layer,
    path: &Path,
    uuid: Uuid,
    bytes: u64,
) -> Result<(), ErrorBody> {
    let expected = uuid.to_string();
    ensure_disk(&layer.name, layer.precious, path, &expected, || {
        make_empty(&layer.cache, bytes, path, uuid)
    })
}

/// As [`make_empty`], in place of what is there: the remains of an earlier try.
pub(crate) fn replace_empty(
    cache: &Path,
    bytes: u64,
    target: &Path,
    uuid: Uuid,
) -> Result<(), ErrorBody> {
    remove_if_there(target)?;
    make_empty(cache, bytes, target, uuid)?;
    make_durable(target)
}

/// Makes a layer that is the image's content by `copy`, larger by what the VM may write: the guest grows the
/// filesystem in it. After an error nothing is left of it.
fn copy_larger(
    layer: &Layer,
    copy: fn(&Path, &Path) -> Result<(), BuildError>,
) -> Result<(), ErrorBody> {
    let grown = layer.image_bytes()? + layer.overlay_bytes;
    copy(&layer.image, &layer.file).map_err(|error| build_error(&error))?;
    let extended = extend(&layer.file, grown);
    if extended.is_err() {
        // One that is too small is of no use; the first failure is what counts.
        let _ = std::fs::remove_file(&layer.file);
    }
    extended
}

/// Grows a layer that is larger than the image by what the VM may write.
fn grow_larger(layer: &Layer) -> Result<(), ErrorBody> {
    extend(&layer.file, layer.image_bytes()? + layer.overlay_bytes)?;
    make_durable(&layer.file)
}

/// Checks a layer that carries the image's own UUID.
fn open_own(
    layer: &Layer,
    create: impl Fn() -> Result<(), ErrorBody>,
) -> Result<RootDrive, ErrorBody> {
    ensure_disk(
        &layer.name,
        layer.precious,
        &layer.file,
        &layer.image_uuid,
        create,
    )?;
    Ok(RootDrive::own(layer.file.clone(), layer))
}

/// Grows a file, which keeps its content, to `bytes`. It never shrinks: it may be larger than anybody remembers, and
/// hold data there.
pub(crate) fn extend(path: &Path, bytes: u64) -> Result<(), ErrorBody> {
    let failed = |error: std::io::Error| io_error("grow", path, &error);
    let file = std::fs::OpenOptions::new().write(true).open(path);
    let file = file.map_err(failed)?;
    let has = file.metadata().map_err(failed)?.len();
    if bytes < has {
        let message = format!(
            "`{}` has {has} bytes and cannot shrink to {bytes}",
            path.display()
        );
        return Err(ErrorBody::new(ErrorCode::InvalidRequest, message)
            .hint("a disk only grows; copy what you need to a new VM with a smaller one"));
    }
    file.set_len(bytes).map_err(failed)
}

/// Makes a file durable, and that it is there.
pub(crate) fn make_durable(path: &Path) -> Result<(), ErrorBody> {
    banger_host::storage::sync_file(path)
        .and_then(|()| match path.parent() {
            Some(folder) => banger_host::storage::sync_directory(folder),
            None => Ok(()),
        })
        .map_err(|error| ErrorBody::from_error(ErrorCode::Internal, &error))
}

/// Checks that a disk is the VM's own. One that never held data is made again if it is missing or torn; one that did,
/// and one that is somebody else's, is never touched.
fn ensure_disk(
    name: &VmName,
    precious: bool,
    path: &Path,
    uuid: &str,
    make: impl Fn() -> Result<(), ErrorBody>,
) -> Result<(), ErrorBody> {
    match template::read_ext4_uuid(path) {
        Ok(found) if found.to_string() == uuid => Ok(()),
        Ok(found) => Err(ErrorBody::new(
            ErrorCode::BadFile,
            format!(
                "`{}` is not the disk of VM `{name}`: it carries the UUID {found}, not {uuid}",
                path.display()
            ),
        )
        .hint("put the right file back; nothing was changed")),
        Err(error) if precious => {
            Err(build_error(&error).hint("put the file back from a backup; nothing was changed"))
        }
        Err(_) => {
            remove_if_there(path)?;
            make()
        }
    }
}

fn fresh_beside(file: &Path) -> PathBuf {
    file.with_extension("fresh")
}

fn remove_if_there(path: &Path) -> Result<(), ErrorBody> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(io_error("remove", path, &error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}
