//! Work that waits for the kernel or the disk, off the threads that serve requests.

use banger_api::error::{ErrorBody, ErrorCode};

/// Does `work` on a thread that may wait.
///
/// # Errors
/// It panicked.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ErrorBody> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| ErrorBody::from_error(ErrorCode::Internal, &error))
}
