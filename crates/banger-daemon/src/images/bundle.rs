//! What images and kernels have in common: a folder with a manifest, a row, and a name that moves.

use super::Catalog;
use banger_api::paths::Paths;
use banger_core::id::{ImageId, KernelId};
use banger_core::name::{ImageName, KernelName};
use banger_image::error::BuildError;
use banger_image::image::ImageManifest;
use banger_image::kernel::KernelManifest;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt::{Debug, Display};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use uuid::Uuid;

/// A row: a manifest, and the name that points to it now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(bound = "")]
pub(crate) struct Bundle<M: Manifest> {
    pub(crate) name: Option<M::Name>,
    pub(crate) manifest: M,
}

pub(crate) type ImageRecord = Bundle<ImageManifest>;
pub(crate) type KernelRecord = Bundle<KernelManifest>;

impl<M: Manifest> Bundle<M> {
    /// A row for what was just built or found.
    pub(crate) fn of(manifest: M) -> Self {
        Self {
            name: manifest.name().cloned(),
            manifest,
        }
    }
}

/// The manifest of one kind of bundle.
pub(crate) trait Manifest:
    Debug + Clone + PartialEq + Eq + Serialize + DeserializeOwned + Send + Sync + 'static
{
    /// The kind's word, in rows and for people.
    const KIND: &'static str;
    type Id: Copy + Ord + Display + FromStr + Send + Sync;
    type Name: Debug
        + Clone
        + Eq
        + Display
        + FromStr<Err = banger_core::name::NameError>
        + Serialize
        + DeserializeOwned
        + Send
        + Sync;

    fn id(&self) -> Self::Id;
    fn uuid(&self) -> Uuid;
    /// The name that it was built under.
    fn name(&self) -> Option<&Self::Name>;
    /// The folder of all bundles of the kind.
    fn shelf(paths: &Paths) -> PathBuf;
    /// Reads it from its bundle's folder.
    fn read(folder: &Path) -> Result<Self, BuildError>;
    fn all(catalog: &Catalog) -> &[Bundle<Self>];
    fn all_mut(catalog: &mut Catalog) -> &mut Vec<Bundle<Self>>;
}

impl Manifest for ImageManifest {
    const KIND: &'static str = "image";
    type Id = ImageId;
    type Name = ImageName;

    fn id(&self) -> ImageId {
        self.id
    }

    fn uuid(&self) -> Uuid {
        self.id.as_uuid()
    }

    fn name(&self) -> Option<&ImageName> {
        self.name.as_ref()
    }

    fn shelf(paths: &Paths) -> PathBuf {
        paths.images()
    }

    fn read(folder: &Path) -> Result<Self, BuildError> {
        banger_image::image::read_manifest(folder)
    }

    fn all(catalog: &Catalog) -> &[Bundle<Self>] {
        &catalog.images
    }

    fn all_mut(catalog: &mut Catalog) -> &mut Vec<Bundle<Self>> {
        &mut catalog.images
    }
}

impl Manifest for KernelManifest {
    const KIND: &'static str = "kernel";
    type Id = KernelId;
    type Name = KernelName;

    fn id(&self) -> KernelId {
        self.id
    }

    fn uuid(&self) -> Uuid {
        self.id.as_uuid()
    }

    fn name(&self) -> Option<&KernelName> {
        self.name.as_ref()
    }

    fn shelf(paths: &Paths) -> PathBuf {
        paths.kernels()
    }

    fn read(folder: &Path) -> Result<Self, BuildError> {
        banger_image::kernel::read_manifest(folder)
    }

    fn all(catalog: &Catalog) -> &[Bundle<Self>] {
        &catalog.kernels
    }

    fn all_mut(catalog: &mut Catalog) -> &mut Vec<Bundle<Self>> {
        &mut catalog.kernels
    }
}
