//! Images on the wire.

use banger_core::id::{ImageId, KernelId};
use banger_core::name::ImageName;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Image {
    /// Its id.
    pub id: ImageId,
    /// The name that points to it, if one does.
    pub name: Option<ImageName>,
    /// What it was built from: `debian bookworm`, `tiny`, …
    pub source: String,
    /// SHA-256 of its bytes, in hexadecimal.
    pub digest: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// SHA-256 of the list of packages and of the recipe that it was built from.
    pub packages_digest: Option<String>,
    /// The packages in it, `name version`.
    pub packages: Vec<String>,
    /// The kernel that its VMs boot if they name none.
    pub kernel: Option<KernelId>,
    /// Its init.
    pub init: String,
    /// When it was built.
    #[schemars(with = "String")]
    pub created_at: Timestamp,
    /// Where its files are.
    pub directory: String,
}

/// What to build an image from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ImageRecipe {
    /// The distribution of this host: systemd, sshd and what a person expects in a small machine.
    #[default]
    Default,
    /// busybox and dropbear.
    Tiny,
}

/// A request to build an image. The reply is an operation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BuildImage {
    /// The name that shall point to it: `default` or `tiny` without one. An image that had the name keeps its id
    /// and loses the name.
    pub name: Option<String>,
    /// What to build from.
    pub recipe: ImageRecipe,
    /// The text of a list of packages (one a line, `#` comments) instead of the recipe's own.
    pub packages: Option<String>,
    /// Build it even if an image of that name was built from the same recipe and packages.
    pub rebuild: bool,
}
