//! Kernel bundles on the wire.

use banger_core::id::KernelId;
use banger_core::name::KernelName;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A kernel bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Kernel {
    /// Its id.
    pub id: KernelId,
    /// The name that points to it, if one does.
    pub name: Option<KernelName>,
    /// Its release, such as `6.12.95+deb13-cloud-amd64`.
    pub release: String,
    /// Where it came from.
    pub source: String,
    /// SHA-256 of its `vmlinux`, in hexadecimal.
    pub digest: String,
    /// The size of the bundle in bytes.
    pub bytes: u64,
    /// When it was imported.
    #[schemars(with = "String")]
    pub created_at: Timestamp,
    /// Where its files are.
    pub directory: String,
}

/// A request to import a kernel. The reply is an operation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ImportKernel {
    /// The name that shall point to it: `default` without one.
    pub name: Option<String>,
    /// An absolute path to a package, a `bzImage` or a `vmlinux`; without one, the distribution's cloud kernel.
    pub path: Option<String>,
    /// An absolute path to the folder of its modules (`/lib/modules/<release>`), for a bare kernel.
    pub modules: Option<String>,
    /// Import it even if the same source was imported under that name.
    pub reimport: bool,
}
