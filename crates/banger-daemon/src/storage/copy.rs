//! A sparse copy of the image, larger by the new data that the VM may write; the guest grows the filesystem.

use super::{Layer, RootDrive, StorageDriver, StorageFacts, copy_larger, grow_larger, open_own};
use banger_api::error::ErrorBody;
use banger_image::template;

#[derive(Debug)]
pub(super) struct Copy;

impl StorageDriver for Copy {
    fn judge(&self, _: &StorageFacts) -> Result<String, String> {
        Ok("copy works everywhere".to_owned())
    }

    fn create(&self, layer: &Layer) -> Result<(), ErrorBody> {
        copy_larger(layer, template::sparse_copy)
    }

    fn open(&self, layer: &Layer) -> Result<RootDrive, ErrorBody> {
        open_own(layer, || self.create(layer))
    }

    fn grow(&self, layer: &Layer) -> Result<(), ErrorBody> {
        grow_larger(layer)
    }
}
