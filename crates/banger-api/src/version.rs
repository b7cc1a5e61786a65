//! Which banger this is.

/// The version of the package.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The version of the API; paths start with `/v1`.
pub const API_VERSION: u32 = 1;
/// The reply header that carries the daemon's version.
pub const VERSION_HEADER: &str = "banger-version";
/// The reply header that carries the daemon's build id.
pub const BUILD_HEADER: &str = "banger-build";
/// The request header by which a creating POST can be repeated safely.
pub const IDEMPOTENCY_HEADER: &str = "idempotency-key";

/// Identifies a build of a program file: its size and time of change. Two installs of the same version differ by it.
///
/// # Errors
/// The file's metadata cannot be read.
pub fn build_id(program: &std::path::Path) -> std::io::Result<String> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(program)?;
    Ok(format!(
        "{VERSION}-{:x}-{:x}.{:x}",
        metadata.size(),
        metadata.mtime(),
        metadata.mtime_nsec()
    ))
}
