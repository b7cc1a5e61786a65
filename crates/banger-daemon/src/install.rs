//! Installs Firecracker from a release archive.

use crate::world::World;
use banger_api::daemon::InstallDriver;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::operation::Operation;
use std::sync::Arc;

/// Starts the installation.
pub(crate) fn start(_world: &Arc<World>, _request: InstallDriver) -> Result<Operation, ErrorBody> {
    Err(ErrorBody::new(ErrorCode::Internal, "not there yet"))
}
