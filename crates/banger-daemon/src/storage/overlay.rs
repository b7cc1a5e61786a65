//! The image read-only and shared by all its VMs, an ext4 per VM, joined by overlayfs in the guest.

use super::{
    Layer, RootDrive, StorageDriver, StorageFacts, ensure_disk, extend, made_over_another,
    make_durable, make_empty,
};
use banger_api::error::ErrorBody;

#[derive(Debug)]
pub(super) struct Overlay;

impl StorageDriver for Overlay {
    fn judge(&self, _: &StorageFacts) -> Result<String, String> {
        Ok("overlay shares the image and needs nothing of the host".to_owned())
    }

    fn create(&self, layer: &Layer) -> Result<(), ErrorBody> {
        make_empty(
            &layer.cache,
            layer.overlay_bytes,
            &layer.file,
            layer.overlay_uuid,
        )
    }

    fn open(&self, layer: &Layer) -> Result<RootDrive, ErrorBody> {
        made_over_another(layer)?;
        let uuid = layer.overlay_uuid.to_string();
        ensure_disk(&layer.name, layer.precious, &layer.file, &uuid, || {
            self.create(layer)
        })?;
        Ok(RootDrive {
            path: layer.image.clone(),
            uuid: layer.image_uuid.clone(),
            own: false,
            overlay: Some((layer.file.clone(), layer.overlay_uuid)),
        })
    }

    fn grow(&self, layer: &Layer) -> Result<(), ErrorBody> {
        extend(&layer.file, layer.overlay_bytes)?;
        make_durable(&layer.file)
    }
}
