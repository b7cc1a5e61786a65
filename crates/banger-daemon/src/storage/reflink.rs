//! The image's blocks, shared by the host's filesystem; larger by the new data that the VM may write, and the guest
//! grows the filesystem.

use super::{Layer, RootDrive, StorageDriver, StorageFacts, copy_larger, grow_larger, open_own};
use banger_api::error::ErrorBody;
use banger_image::template;

#[derive(Debug)]
pub(super) struct Reflink;

impl StorageDriver for Reflink {
    fn judge(&self, facts: &StorageFacts) -> Result<String, String> {
        let home = facts.reflink.as_ref().map_err(Clone::clone)?;
        Ok(format!("reflink, {home}"))
    }

    fn create(&self, layer: &Layer) -> Result<(), ErrorBody> {
        copy_larger(layer, template::reflink)
    }

    fn open(&self, layer: &Layer) -> Result<RootDrive, ErrorBody> {
        open_own(layer, || self.create(layer))
    }

    fn grow(&self, layer: &Layer) -> Result<(), ErrorBody> {
        grow_larger(layer)
    }
}
