//! What a person asked for. A [`VmSpec`] can only be obtained valid.

use crate::id::{ImageId, KernelId, VmId};
use crate::publish::{Protocol, PublishedPort};
use crate::size::{CpuLimit, DiskBytes, MemoryMib, VcpuCount};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::SocketAddr;

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

impl DriverChoice {
    /// The choice's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Firecracker => "firecracker",
            Self::Qemu => "qemu",
        }
    }
}

/// How a VM gets its own `/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Storage {
    /// The image's blocks, shared by the host's filesystem until one of the two changes.
    Reflink,
    /// The image read-only and shared, an ext4 per VM, joined by overlayfs in the guest.
    Overlay,
    /// A sparse copy of the image.
    Copy,
    /// A device-mapper snapshot of the image.
    Snapshot,
}

impl Storage {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Reflink, Self::Overlay, Self::Copy, Self::Snapshot];
    /// Those that `auto` takes, the best first. A snapshot is lost when its room runs out, so it is taken only by
    /// choice.
    pub const AUTO: [Self; 3] = [Self::Reflink, Self::Overlay, Self::Copy];

    /// The storage driver's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Reflink => "reflink",
            Self::Overlay => "overlay",
            Self::Copy => "copy",
            Self::Snapshot => "snapshot",
        }
    }
}

impl std::fmt::Display for Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Which storage driver a person asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum StorageChoice {
    /// The first that host, image and driver allow, decided at creation.
    #[default]
    Auto,
    /// [`Storage::Reflink`].
    Reflink,
    /// [`Storage::Overlay`].
    Overlay,
    /// [`Storage::Copy`].
    Copy,
    /// [`Storage::Snapshot`].
    Snapshot,
}

impl StorageChoice {
    /// The storage driver that was asked for by name.
    pub const fn named(self) -> Option<Storage> {
        match self {
            Self::Auto => None,
            Self::Reflink => Some(Storage::Reflink),
            Self::Overlay => Some(Storage::Overlay),
            Self::Copy => Some(Storage::Copy),
            Self::Snapshot => Some(Storage::Snapshot),
        }
    }
}

/// No storage driver that was asked for can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{storage} is not possible: {why}")]
pub struct StorageImpossible {
    /// The one asked for, or the last that was tried.
    pub storage: Storage,
    /// Why it cannot be used.
    pub why: String,
}

/// The answer to a storage choice, with the reason that `vm show` and `doctor` print. `judge` says of a driver what
/// speaks for it (`Ok`) or why it is not possible (`Err`).
///
/// # Errors
/// The one that was asked for, or every one of [`Storage::AUTO`], is not possible.
pub fn resolve_storage(
    choice: StorageChoice,
    mut judge: impl FnMut(Storage) -> Result<String, String>,
) -> Result<(Storage, String), StorageImpossible> {
    if let Some(storage) = choice.named() {
        return match judge(storage) {
            Ok(_) => Ok((storage, "asked for".to_owned())),
            Err(why) => Err(StorageImpossible { storage, why }),
        };
    }
    let mut refused: Vec<StorageImpossible> = Vec::new();
    for storage in Storage::AUTO {
        match judge(storage) {
            Ok(why) if refused.is_empty() => return Ok((storage, format!("auto: {why}"))),
            Ok(_) => {
                let refused: Vec<String> = refused.iter().map(ToString::to_string).collect();
                return Ok((storage, format!("auto: {}", refused.join("; "))));
            }
            Err(why) => refused.push(StorageImpossible { storage, why }),
        }
    }
    Err(refused.pop().unwrap_or(StorageImpossible {
        storage: Storage::Copy,
        why: "there is no storage driver".to_owned(),
    }))
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
    /// Whether its guest may reach the public internet.
    #[serde(default)]
    pub nat: bool,
    /// Whether NAT leads to private networks as well.
    #[serde(default)]
    pub nat_private: bool,
    /// Ports of the host that lead into the guest, in order, none twice.
    #[serde(default)]
    pub ports: BTreeSet<PublishedPort>,
    /// Other VMs that this one and they may reach. Said by one of the two, it holds for both.
    #[serde(default)]
    pub joins: BTreeSet<VmId>,
    /// Started when the host boots, if it was to run.
    #[serde(default)]
    pub autostart: bool,
    /// How much CPU time its VMM may take, in per cent of one CPU, if that is limited.
    #[serde(default)]
    pub cpu_limit: Option<CpuLimit>,
}

/// A change of a spec; what is `None` stays.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmSpecPatch {
    /// What the next boot takes.
    pub boot: BootPatch,
    /// What holds at once.
    pub live: LivePatch,
}

/// A change that a VM must be stopped for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BootPatch {
    /// A new number of vCPUs.
    pub vcpus: Option<VcpuCount>,
    /// A new amount of memory.
    pub memory_mib: Option<MemoryMib>,
    /// Another driver: a VM's files belong to none.
    pub driver: Option<DriverChoice>,
}

/// A change that holds at once, whatever the VM does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LivePatch {
    /// Whether its guest may reach the public internet.
    pub nat: Option<bool>,
    /// Whether NAT leads to private networks as well.
    pub nat_private: Option<bool>,
    /// A port to publish.
    pub publish: Option<PublishedPort>,
    /// A port to close: protocol and place on the host.
    pub unpublish: Option<(Protocol, SocketAddr)>,
    /// A VM to join.
    pub join: Option<VmId>,
    /// A VM to leave.
    pub leave: Option<VmId>,
    /// Whether it starts when the host boots.
    pub autostart: Option<bool>,
    /// How much CPU time its VMM may take, or that there is no limit.
    pub cpu_limit: Option<Option<CpuLimit>>,
}

impl VmSpecPatch {
    /// Whether it can be done whatever the VM does.
    pub fn is_live(&self) -> bool {
        self.boot == BootPatch::default()
    }
}

impl VmSpec {
    /// The spec with `patch` applied.
    #[must_use]
    pub fn patched(&self, patch: &VmSpecPatch) -> Self {
        let VmSpecPatch { boot, live } = patch;
        let mut spec = self.clone();
        spec.vcpus = boot.vcpus.unwrap_or(spec.vcpus);
        spec.memory_mib = boot.memory_mib.unwrap_or(spec.memory_mib);
        spec.driver = boot.driver.unwrap_or(spec.driver);
        spec.nat = live.nat.unwrap_or(spec.nat);
        spec.nat_private = live.nat_private.unwrap_or(spec.nat_private);
        spec.autostart = live.autostart.unwrap_or(spec.autostart);
        spec.cpu_limit = live.cpu_limit.unwrap_or(spec.cpu_limit);
        spec.ports.extend(live.publish.clone());
        if let Some(closed) = live.unpublish {
            spec.ports
                .retain(|port| (port.protocol, port.listen) != closed);
        }
        spec.joins.extend(live.join);
        if let Some(left) = live.leave {
            spec.joins.remove(&left);
        }
        spec
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
    if let Some(exact) = candidates.iter().find(|c| id(c) == query) {
        return Resolution::One(exact);
    }
    // Several may have had the same name by the time they came into the trash.
    let named: Vec<&T> = candidates
        .iter()
        .filter(|c| name(c) == Some(query))
        .collect();
    match named.as_slice() {
        [] => {}
        [one] => return Resolution::One(one),
        _ => return Resolution::Many(named),
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
    fn a_spec_of_before_opens_nothing_that_it_did_not_know() {
        let before = serde_json::json!({
            "image": "0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a",
            "kernel": "0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6b",
            "vcpus": 2, "memory_mib": 1024, "overlay_bytes": 8_589_934_592_u64, "disk_bytes": null,
            "driver": "auto", "storage": "copy", "nat": true,
        });
        let spec: VmSpec = serde_json::from_value(before).unwrap();
        assert!(spec.nat && !spec.nat_private && spec.cpu_limit.is_none());
        let mut patch = VmSpecPatch::default();
        patch.live.nat_private = Some(true);
        assert!(patch.is_live() && spec.patched(&patch).nat_private);
        let limit = CpuLimit::new(150).ok();
        patch.live.cpu_limit = Some(limit);
        let limited = spec.patched(&patch);
        assert!(patch.is_live() && limited.cpu_limit == limit);
        patch.live.cpu_limit = Some(None);
        assert_eq!(limited.patched(&patch).cpu_limit, None);
        patch.live.cpu_limit = None;
        assert_eq!(limited.patched(&patch).cpu_limit, limit);
        patch.boot.driver = Some(DriverChoice::Qemu);
        assert!(!patch.is_live(), "a VMM is not exchanged below a guest");
        assert_eq!(spec.patched(&patch).driver, DriverChoice::Qemu);
    }

    #[test]
    fn a_whole_name_wins_over_a_longer_one_that_starts_alike() {
        assert_eq!(find("calm"), "calm");
        assert_eq!(find("calm-"), "calm-otter");
        assert_eq!(find("0299"), "brave-fox");
    }

    #[test]
    fn auto_takes_the_first_possible_storage_and_says_why_not_the_ones_before() {
        let everything = |_| Ok("/home is btrfs".to_owned());
        assert_eq!(
            resolve_storage(StorageChoice::Auto, everything),
            Ok((Storage::Reflink, "auto: /home is btrfs".to_owned()))
        );
        let no_reflink = |storage| match storage {
            Storage::Reflink => Err("ext4 does not share blocks".to_owned()),
            _ => Ok(String::new()),
        };
        assert_eq!(
            resolve_storage(StorageChoice::Auto, no_reflink),
            Ok((
                Storage::Overlay,
                "auto: reflink is not possible: ext4 does not share blocks".to_owned()
            ))
        );
    }

    #[test]
    fn a_storage_that_was_asked_for_by_name_is_taken_or_refused_and_never_replaced() {
        let no = |_| Err("the host has no device-mapper".to_owned());
        let refused = resolve_storage(StorageChoice::Snapshot, no).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "snapshot is not possible: the host has no device-mapper"
        );
        let yes = |_| Ok("whatever".to_owned());
        for storage in Storage::ALL {
            let choice: StorageChoice =
                serde_json::from_value(serde_json::to_value(storage).unwrap()).unwrap();
            assert_eq!(
                resolve_storage(choice, yes),
                Ok((storage, "asked for".to_owned()))
            );
        }
        assert!(resolve_storage(StorageChoice::Auto, no).is_err());
    }

    #[test]
    fn a_name_that_two_have_is_ambiguous_and_an_id_is_not() {
        let all = [("calm", "01"), ("calm", "02"), ("calm-otter", "03")];
        let find = |query| match resolve(query, &all, |c| Some(c.0), |c| c.1.to_owned()) {
            Resolution::None => Vec::new(),
            Resolution::One(one) => vec![one.1],
            Resolution::Many(many) => many.iter().map(|c| c.1).collect(),
        };
        assert_eq!(find("calm"), ["01", "02"]);
        assert_eq!(find("02"), ["02"]);
    }

    #[test]
    fn an_ambiguous_prefix_lists_its_candidates() {
        assert_eq!(find("0198"), "calm-otter,calm");
        assert_eq!(find("x"), "none");
        assert_eq!(find(""), "none");
    }
}
