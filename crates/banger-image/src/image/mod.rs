//! Images: read-only root filesystems.

use crate::context::Context;
use crate::error::BuildError;
use crate::kernel::PackageVersion;
use banger_core::id::ImageId;
use banger_core::name::ImageName;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The root filesystem, raw ext4 with mode 0444, in an image's folder.
pub const ROOT_IMAGE: &str = "root.img";
/// The [`ImageManifest`] as JSON, in an image's folder.
pub const MANIFEST: &str = "image.json";

/// Why an image could not be made.
pub type ImageError = BuildError;

/// How to make an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecipeKind {
    /// A small server of the host's own distribution and suite, by mmdebstrap.
    Default {
        /// A list of packages, one a line, in place of banger's own.
        packages: Option<PathBuf>,
    },
    /// busybox and dropbear, a few MiB.
    Tiny,
}

/// Which image to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// Its id.
    pub id: ImageId,
    /// Its name at import.
    pub name: Option<ImageName>,
    /// How to make it.
    pub kind: RecipeKind,
}

/// What is known of an image: the content of its `image.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageManifest {
    /// Its id.
    pub id: ImageId,
    /// Its name at import; names move, so this is only a record.
    pub name: Option<ImageName>,
    /// SHA-256 of `root.img`, in hexadecimal.
    pub sha256: String,
    /// UUID of the filesystem in `root.img`, lower case with hyphens.
    pub uuid: String,
    /// The size of `root.img` in bytes.
    pub bytes: u64,
    /// What is installed in it, in order of name.
    pub packages: Vec<PackageVersion>,
    /// SHA-256 of the list of packages that it was made from, in hexadecimal.
    pub packages_sha256: String,
    /// Its own first process.
    pub init: String,
    /// The suite it was made from, such as `bookworm`.
    pub suite: String,
    /// Where it came from, for people.
    pub source: String,
    /// When it was made, in seconds since 1970.
    pub created: i64,
}

/// Makes an image in the folder `staging`.
pub fn build_image(
    recipe: &Recipe,
    staging: &Path,
    context: &Context,
) -> Result<ImageManifest, ImageError> {
    let _ = (recipe, staging, context);
    unimplemented!()
}

/// The SHA-256 of the list of packages that the recipe would be built from now, in hexadecimal; differs from
/// [`ImageManifest::packages_sha256`] when the list has changed since.
pub fn packages_sha256(kind: &RecipeKind) -> Result<String, ImageError> {
    let _ = kind;
    unimplemented!()
}

/// Reads the manifest of the image in `image_dir`.
pub fn read_manifest(image_dir: &Path) -> Result<ImageManifest, ImageError> {
    crate::store::read_json(&image_dir.join(MANIFEST))
}
