//! Images: read-only root filesystems.

mod debian;
mod tiny;
mod work_folder;

use crate::apt::is_package_name;
use crate::context::Context;
use crate::error::BuildError;
use crate::ext4;
use crate::kernel::PackageVersion;
use crate::store::{now, write_json};
use crate::tree::Tree;
use banger_core::id::ImageId;
use banger_core::name::ImageName;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
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
    /// SHA-256 of the list of packages and of the recipe that it was made from, in hexadecimal.
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

/// The list of packages of the default image.
const DEFAULT_PACKAGES: &str = include_str!("../../recipes/debian/packages.apt");
/// The packages of the tiny image; what they depend on comes along.
const TINY_PACKAGES: &str = include_str!("../../recipes/tiny/packages.apt");
/// The newest time in an image, in seconds since 1970: what is built twice is the same twice.
const EPOCH: i64 = 1_704_067_200;

/// What a recipe turns into before it is written.
struct Material {
    tree: Tree,
    /// A digest of all content, which the filesystem's UUID follows from.
    digest: Vec<u8>,
    packages: Vec<PackageVersion>,
    suite: String,
    source: String,
    journal_blocks: u32,
}

/// Makes an image in the folder `staging`. Takes about half a minute for the default image, and needs the network.
pub fn build_image(
    recipe: &Recipe,
    staging: &Path,
    context: &Context,
) -> Result<ImageManifest, ImageError> {
    std::fs::create_dir_all(staging).map_err(BuildError::io("create", staging))?;
    let list = PackageList::of(&recipe.kind)?;
    let material = match &recipe.kind {
        RecipeKind::Default { .. } => debian::gather(&list.packages, context)?,
        RecipeKind::Tiny => tiny::gather(&list.packages, context)?,
    };
    let path = staging.join(ROOT_IMAGE);
    let uuid = ext4::uuid_of(&material.digest);
    let layout = ext4::Layout {
        uuid,
        epoch: EPOCH,
        label: "banger-root",
        journal_blocks: material.journal_blocks,
    };
    ext4::write(&material.tree, &path, &layout, context)?;
    let bytes = std::fs::metadata(&path)
        .map_err(BuildError::io("look at", &path))?
        .len();
    let manifest = ImageManifest {
        id: recipe.id,
        name: recipe.name.clone(),
        sha256: ext4::sha256_file(&path, context)?,
        uuid: uuid.to_string(),
        bytes,
        packages: material.packages,
        packages_sha256: list.sha256,
        init: "/sbin/init".to_owned(),
        suite: material.suite,
        source: material.source,
        created: now(),
    };
    write_json(&staging.join(MANIFEST), &manifest)?;
    Ok(manifest)
}

/// The SHA-256 of the list of packages and of the recipe that an image would be built from now, in hexadecimal;
/// differs from [`ImageManifest::packages_sha256`] when one of them has changed since.
pub fn packages_sha256(kind: &RecipeKind) -> Result<String, ImageError> {
    PackageList::of(kind).map(|list| list.sha256)
}

/// A list of packages and its digest.
struct PackageList {
    packages: Vec<String>,
    sha256: String,
}

impl PackageList {
    fn of(kind: &RecipeKind) -> Result<Self, BuildError> {
        let own = Path::new("packages.apt");
        match kind {
            RecipeKind::Default { packages: None } => {
                Self::parse(DEFAULT_PACKAGES, own, &debian::RECIPE)
            }
            RecipeKind::Tiny => Self::parse(TINY_PACKAGES, own, &tiny::RECIPE),
            RecipeKind::Default {
                packages: Some(path),
            } => {
                let text = std::fs::read_to_string(path).map_err(BuildError::io("read", path))?;
                Self::parse(&text, path, &debian::RECIPE)
            }
        }
    }

    /// Reads a list; its digest covers the rest of the recipe as well.
    fn parse(text: &str, path: &Path, recipe: &[&str]) -> Result<Self, BuildError> {
        let mut packages = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let name = line.split('#').next().unwrap_or_default().trim();
            if name.is_empty() {
                continue;
            }
            if !is_package_name(name) {
                return Err(BuildError::PackageList {
                    path: path.to_owned(),
                    line: index + 1,
                });
            }
            packages.push(name.to_owned());
        }
        let mut hash = Sha256::new_with_prefix(text);
        for part in recipe {
            hash.update(part);
        }
        Ok(Self {
            packages,
            sha256: ext4::hex(&hash.finalize()),
        })
    }
}

/// Removes what builds of this user left among temporary files when they were killed; does nothing to those that live.
pub fn sweep_killed_builds() {
    work_folder::sweep(&std::env::temp_dir());
}

/// Reads the manifest of the image in `image_dir`.
pub fn read_manifest(image_dir: &Path) -> Result<ImageManifest, ImageError> {
    crate::store::read_json(&image_dir.join(MANIFEST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_list_has_one_name_a_line_and_comments() {
        let list = PackageList::parse("# all\n\ncurl # why\n  g++\n", Path::new("x"), &[]).unwrap();
        assert_eq!(list.packages, ["curl", "g++"]);
        for (text, line) in [("curl wget\n", 1), ("curl\n--option\n", 2), ("a,b", 1)] {
            match PackageList::parse(text, Path::new("x"), &[]) {
                Err(BuildError::PackageList { line: found, .. }) => assert_eq!(found, line),
                other => panic!("{text}: {:?}", other.map(|list| list.packages)),
            }
        }
    }

    #[test]
    fn a_changed_recipe_changes_the_digest_of_a_list() {
        let digest = |recipe| PackageList::parse("curl\n", Path::new("x"), recipe).unwrap();
        assert_ne!(digest(&["mask a"]).sha256, digest(&["mask b"]).sha256);
        assert_eq!(digest(&["mask a"]).sha256, digest(&["mask a"]).sha256);
    }

    #[test]
    fn bangers_own_lists_are_valid_and_have_digests() {
        for kind in [RecipeKind::Default { packages: None }, RecipeKind::Tiny] {
            assert!(!PackageList::of(&kind).unwrap().packages.is_empty());
            assert_eq!(packages_sha256(&kind).unwrap().len(), 64);
        }
    }
}
