//! The image's blocks, shared by the host's filesystem; larger by the new data that the VM may write, and the guest
//! grows the filesystem.

use super::{Layer, RootDrive, StorageDriver, StorageFacts, ensure_disk, extend};
use crate::images::build_error;
use banger_api::error::ErrorBody;
use banger_core::spec::Storage;
use banger_image::template;

#[derive(Debug)]
pub(super) struct Reflink;

impl StorageDriver for Reflink {
    fn storage(&self) -> Storage {
        Storage::Reflink
    }

    fn judge(&self, facts: &StorageFacts) -> Result<String, String> {
        let home = facts.reflink.as_ref().map_err(Clone::clone)?;
        Ok(format!("reflink, {home}"))
    }

    fn create(&self, layer: &Layer) -> Result<(), ErrorBody> {
        let grown = layer.image_bytes()? + layer.overlay_bytes;
        template::reflink(&layer.image, &layer.file).map_err(|error| build_error(&error))?;
        let extended = extend(&layer.file, grown);
        if extended.is_err() {
            // One that is too small is of no use; the first failure is what counts.
            let _ = std::fs::remove_file(&layer.file);
        }
        extended
    }

    fn open(&self, layer: &Layer) -> Result<RootDrive, ErrorBody> {
        let uuid = &layer.image_uuid;
        ensure_disk(&layer.name, layer.precious, &layer.file, uuid, || {
            self.create(layer)
        })?;
        Ok(RootDrive::own(layer.file.clone(), layer))
    }
}
