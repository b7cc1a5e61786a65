//! Kernel bundles: `vmlinux`, banger's initrd for it, and `modules.img`.

use crate::context::Context;
use crate::error::BuildError;
use banger_core::id::KernelId;
use banger_core::name::KernelName;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The kernel's ELF, in a bundle's folder.
pub const VMLINUX: &str = "vmlinux";
/// Banger's initrd, in a bundle's folder.
pub const INITRD: &str = "initrd.img";
/// The read-only ext4 whose root is the content of `/lib/modules/<release>`, in a bundle's folder.
pub const MODULES_IMAGE: &str = "modules.img";
/// The [`KernelManifest`] as JSON, in a bundle's folder.
pub const MANIFEST: &str = "kernel.json";
/// The part of the initrd that does not depend on `banger-init`.
const INITRD_BASE: &str = "initrd.base";

/// Why a kernel bundle could not be made.
pub type KernelError = BuildError;

/// Where a kernel comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KernelSource {
    /// The cloud kernel of the host's own distribution, downloaded by apt: `linux-image-cloud-amd64` on Debian,
    /// `linux-image-virtual` with its modules package on Ubuntu (the latter was never tried).
    Distribution,
    /// A package by name, downloaded by apt; a package that only depends on the kernel is followed.
    AptPackage(String),
    /// A `linux-image` package in a file.
    PackageFile(PathBuf),
    /// A `vmlinux` or `bzImage`, with its `/lib/modules/<release>` where it has modules.
    Files {
        /// The kernel.
        kernel: PathBuf,
        /// The modules' folder, whose name is the release.
        modules: Option<PathBuf>,
    },
}

/// Which kernel bundle to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelRequest {
    /// Its id.
    pub id: KernelId,
    /// Its name at import.
    pub name: Option<KernelName>,
    /// Where it comes from.
    pub source: KernelSource,
}

/// A package and its version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PackageVersion {
    /// The package's name.
    pub name: String,
    /// Its version, as dpkg writes it.
    pub version: String,
}

/// What is known of a kernel bundle: the content of its `kernel.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelManifest {
    /// Its id.
    pub id: KernelId,
    /// Its name at import; names move, so this is only a record.
    pub name: Option<KernelName>,
    /// The release, as `uname -r` prints it.
    pub release: String,
    /// Where it came from, for people.
    pub source: String,
    /// The package it was taken from.
    pub package: Option<PackageVersion>,
    /// SHA-256 of `vmlinux`, in hexadecimal.
    pub vmlinux_sha256: String,
    /// Whether `vmlinux` has a PVH entry, without which QEMU cannot start it.
    pub pvh: bool,
    /// UUID of the filesystem in `modules.img`, lower case with hyphens.
    pub modules_uuid: String,
    /// The modules in the initrd, in load order.
    pub modules: Vec<String>,
    /// Wanted modules that the kernel has neither built in nor as a file.
    pub missing_modules: Vec<String>,
    /// SHA-256 of the `banger-init` in the initrd, in hexadecimal.
    pub init_sha256: String,
    /// The bundle's size in bytes.
    pub bytes: u64,
    /// When it was made, in seconds since 1970.
    pub created: i64,
}

/// Makes a kernel bundle in the folder `staging`, with the static `banger-init` from `init` in its initrd.
pub fn build_kernel(
    request: &KernelRequest,
    init: &Path,
    staging: &Path,
    context: &Context,
) -> Result<KernelManifest, KernelError> {
    let _ = (request, init, staging, context, INITRD_BASE);
    unimplemented!()
}

/// Makes the initrd of the bundle in `kernel_dir` again if its `banger-init` is not the one in `init`. Says whether
/// it did.
pub fn refresh_initrd(kernel_dir: &Path, init: &Path) -> Result<bool, KernelError> {
    let _ = (kernel_dir, init);
    unimplemented!()
}

/// Reads the manifest of the bundle in `kernel_dir`.
pub fn read_manifest(kernel_dir: &Path) -> Result<KernelManifest, KernelError> {
    crate::store::read_json(&kernel_dir.join(MANIFEST))
}
