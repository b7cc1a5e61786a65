//! What a person asked for. A [`VmSpec`] can only be obtained valid.

use crate::id::{ImageId, KernelId};
use crate::size::{DiskBytes, MemoryMib, VcpuCount};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Driver {
    /// Firecracker, on KVM.
    Firecracker,
    /// QEMU, on KVM where that runs guests and by software emulation elsewhere.
    Qemu,
}

impl Driver {
    /// The driver's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Firecracker => "firecracker",
            Self::Qemu => "qemu",
        }
    }
}

impl std::fmt::Display for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Which driver a person asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DriverChoice {
    /// Whichever this host can run best, decided at each start.
    #[default]
    Auto,
    /// Firecracker, whatever the probe says.
    Firecracker,
    /// QEMU.
    Qemu,
}

/// How a VM gets its own `/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Storage {
    /// The image read-only and shared, an ext4 per VM, joined by overlayfs in the guest.
    Overlay,
    /// A sparse copy of the image.
    Copy,
}

impl Storage {
    /// The storage driver's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Overlay => "overlay",
            Self::Copy => "copy",
        }
    }
}

/// Which storage driver a person asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum StorageChoice {
    /// The first that host, image and driver allow, decided at creation.
    #[default]
    Auto,
    /// [`Storage::Overlay`].
    Overlay,
    /// [`Storage::Copy`].
    Copy,
}

/// The answer to a storage choice, with the reason that `vm show` and `doctor` print.
pub const fn resolve_storage(choice: StorageChoice) -> (Storage, &'static str) {
    match choice {
        StorageChoice::Auto => (
            Storage::Overlay,
            "auto: shares the image and needs nothing of the host",
        ),
        StorageChoice::Overlay => (Storage::Overlay, "asked for"),
        StorageChoice::Copy => (Storage::Copy, "asked for"),
    }
}

/// What a person asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmSpec {
    /// The image its `/` comes from.
    pub image: ImageId,
    /// The kernel that it boots.
    pub kernel: KernelId,
    /// Virtual CPUs.
    pub vcpus: VcpuCount,
    /// Memory in MiB.
    pub memory_mib: MemoryMib,
    /// New data that the VM may write to `/`, in bytes.
    pub overlay_bytes: DiskBytes,
    /// Size of its work disk in bytes, if it has one.
    pub disk_bytes: Option<DiskBytes>,
    /// The driver asked for.
    pub driver: DriverChoice,
    /// The storage driver, resolved at creation.
    pub storage: Storage,
}

/// A change of a spec; what is `None` stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmSpecPatch {
    /// A new number of vCPUs.
    pub vcpus: Option<VcpuCount>,
    /// A new amount of memory.
    pub memory_mib: Option<MemoryMib>,
}

impl VmSpecPatch {
    /// Whether the patch changes nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl VmSpec {
    /// The spec with `patch` applied.
    #[must_use]
    pub fn patched(&self, patch: &VmSpecPatch) -> Self {
        Self {
            vcpus: patch.vcpus.unwrap_or(self.vcpus),
            memory_mib: patch.memory_mib.unwrap_or(self.memory_mib),
            ..self.clone()
        }
    }
}

/// The default number of vCPUs.
pub const DEFAULT_VCPUS: u64 = 2;
/// The default amount of memory in MiB.
pub const DEFAULT_MEMORY_MIB: u64 = 1024;
/// The default overlay size in bytes.
pub const DEFAULT_OVERLAY_BYTES: u64 = 8 << 30;

/// Finds what `query` (a name, an id, or a prefix of either) means among `candidates`.
///
/// A whole name or id wins over prefixes.
pub fn resolve<'a, T>(
    query: &str,
    candidates: &'a [T],
    name: impl Fn(&T) -> Option<&str>,
    id: impl Fn(&T) -> String,
) -> Resolution<'a, T> {
    if query.is_empty() {
        return Resolution::None;
    }
    if let Some(exact) = candidates
        .iter()
        .find(|c| name(c) == Some(query) || id(c) == query)
    {
        return Resolution::One(exact);
    }
    let matching: Vec<&T> = candidates
        .iter()
        .filter(|c| name(c).is_some_and(|n| n.starts_with(query)) || id(c).starts_with(query))
        .collect();
    match matching.as_slice() {
        [] => Resolution::None,
        [one] => Resolution::One(one),
        _ => Resolution::Many(matching),
    }
}

/// What a query means.
#[derive(Debug, PartialEq, Eq)]
pub enum Resolution<'a, T> {
    /// Nothing.
    None,
    /// Exactly one thing.
    One(&'a T),
    /// A prefix of several things.
    Many(Vec<&'a T>),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(query: &str) -> String {
        let all = [
            ("calm-otter", "0198aa"),
            ("calm", "0198ab"),
            ("brave-fox", "0299cc"),
        ];
        match resolve(query, &all, |c| Some(c.0), |c| c.1.to_owned()) {
            Resolution::None => "none".to_owned(),
            Resolution::One(one) => one.0.to_owned(),
            Resolution::Many(many) => many.iter().map(|c| c.0).collect::<Vec<_>>().join(","),
        }
    }

    #[test]
    fn a_whole_name_wins_over_a_longer_one_that_starts_alike() {
        assert_eq!(find("calm"), "calm");
        assert_eq!(find("calm-"), "calm-otter");
        assert_eq!(find("0299"), "brave-fox");
    }

    #[test]
    fn an_ambiguous_prefix_lists_its_candidates() {
        assert_eq!(find("0198"), "calm-otter,calm");
        assert_eq!(find("x"), "none");
        assert_eq!(find(""), "none");
    }
}
