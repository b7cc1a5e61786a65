//! A device-mapper snapshot of the image.

use super::{Layer, RootDrive, StorageDriver, StorageFacts};
use banger_api::error::{ErrorBody, ErrorCode};
use banger_core::spec::Storage;

#[derive(Debug)]
pub(super) struct Snapshot;

const MISSING: &str = "this daemon cannot make device-mapper snapshots";

impl StorageDriver for Snapshot {
    fn storage(&self) -> Storage {
        Storage::Snapshot
    }

    fn judge(&self, _: &StorageFacts) -> Result<String, String> {
        Err(MISSING.to_owned())
    }

    fn create(&self, _: &Layer) -> Result<(), ErrorBody> {
        Err(ErrorBody::new(ErrorCode::HostUnfit, MISSING))
    }

    fn open(&self, _: &Layer) -> Result<RootDrive, ErrorBody> {
        Err(ErrorBody::new(ErrorCode::HostUnfit, MISSING))
    }
}
