//! The ledger: everything that banger has on the host, measured, and whose it is. `removal` takes away what is left
//! over.

use crate::blocking::blocking;
use crate::network::{HOST_NAMES_ROUTED, Now, network_error};
use crate::server::App;
use crate::storage::Owner;
use crate::vm::files::VmFiles;
use crate::vm::scope;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::host::{HostKind, HostObject};
use banger_core::id::VmId;
use banger_host::net::pasta;
use banger_host::op::OwnedKind;
use banger_host::storage::ops;
use banger_vmm::lock::{Stray, holders_of_each, strays};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;

mod removal;

pub(crate) use removal::{clean, remove_left_over};

/// Whose it is that belongs to no VM.
const INSTANCE: &str = "(instance)";
/// Whose it is that belongs to another state folder of the same user.
const OTHER_INSTANCE: &str = "(another instance) ";

/// An object, and how it goes where it is left over.
#[derive(Debug, Clone)]
struct Found {
    object: HostObject,
    remedy: Remedy,
}

/// How a left over object goes.
#[derive(Debug, Clone)]
enum Remedy {
    /// With another one.
    Nothing,
    /// A port of the bridge, with all that goes with it; the VM's lock says that nobody starts on it just now, if it
    /// is a VM's.
    Port(String, Option<PathBuf>),
    /// By the host's side, in one go.
    HostSide,
    /// A snapshot; the VM's lock likewise, if it is of this instance.
    Snapshot(Owner, Option<PathBuf>),
    /// One of our programs that holds the lock of a VM that does not run.
    Process(i32, PathBuf),
    /// A program of somebody else's that holds it: not ours to end.
    Stranger(i32),
    /// A process of a VM whose folder was removed while it ran. What is on its disks is nowhere else.
    Stray(Stray),
    /// A process that should have ended by itself.
    Waiting(i32),
}

/// What is known of a VM.
#[derive(Debug, Clone)]
struct Known {
    name: String,
    live: bool,
}

/// Everything on the host.
pub(crate) async fn list(app: &App) -> Result<Vec<HostObject>, ErrorBody> {
    let found = look(app).await?;
    Ok(found.into_iter().map(|found| found.object).collect())
}

async fn look(app: &App) -> Result<Vec<Found>, ErrorBody> {
    let network = app.world.network.now().await;
    let network = network.map_err(|error| network_error(&error))?;
    let handles = [false, true].map(|trash| app.registry.list(trash)).concat();
    let is_live = |handle: &crate::vm::Handle| handle.view.borrow().phase.is_live();
    // A VM that ends, or begins, while its processes are looked for has them by right.
    let before: Vec<bool> = handles.iter().map(is_live).collect();
    let ids: Vec<VmId> = handles.iter().map(|handle| handle.id).collect();
    let shared = app.clone();
    let keeper = network.keeper;
    // It takes as long as there are processes and devices.
    let measured = blocking(move || Seen::look(&shared, &ids, keeper)).await?;
    let measured = measured.map_err(|error| ErrorBody::from_error(ErrorCode::Internal, &error))?;
    let vms: HashMap<VmId, Known> = handles
        .iter()
        .zip(before)
        .map(|(handle, before)| {
            let known = Known {
                name: handle.latest().record.name.to_string(),
                live: before || is_live(handle),
            };
            (handle.id, known)
        })
        .collect();
    let lock = |vm| VmFiles::of(&app.world.paths, vm).lock();
    let (own, snapshots, loops) = (app.world.instance.id, &measured.snapshots, &measured.loops);
    let mut found = of_storage(own, snapshots, loops, &vms, lock);
    of_network(app, &network, &vms, &mut found);
    measured.tell_processes(app, &vms, &mut found);
    found.sort_by(|one, other| one.object.cmp(&other.object));
    Ok(found)
}

/// What the kernel says of processes and devices.
struct Seen {
    /// The keeper's, `pasta` and who holds it.
    network: Vec<(i32, String)>,
    /// Who holds a VM's lock, and whether it is a program of ours.
    holders: Vec<(VmId, i32, String, bool)>,
    strays: Vec<(Stray, String)>,
    /// The cgroups that systemd made for VMs.
    groups: BTreeSet<(VmId, String)>,
    /// Names of snapshots of this user.
    snapshots: Vec<String>,
    /// What is below them.
    loops: Vec<ops::LoopBelow>,
}

impl Seen {
    fn look(app: &App, ids: &[VmId], keeper: Option<i32>) -> std::io::Result<Self> {
        let paths = &app.world.paths;
        let locks: Vec<PathBuf> = ids
            .iter()
            .map(|id| VmFiles::of(paths, *id).lock())
            .collect();
        let holders = ids.iter().zip(holders_of_each(&locks)?);
        let holders = holders.flat_map(|(id, pids)| pids.into_iter().map(|pid| (*id, pid)));
        let holders: Vec<(VmId, i32)> = holders.collect();
        let named = |pid: i32| (pid, describe(pid));
        // Everybody may see them, also without whoever made them.
        let uid = rustix::process::geteuid().as_raw();
        let snapshots = ops::list(uid).into_iter();
        let ways_out = keeper.map(pasta::processes).unwrap_or_default();
        Ok(Self {
            network: keeper.into_iter().chain(ways_out).map(named).collect(),
            groups: holders
                .iter()
                .filter_map(|(id, pid)| Some((*id, scope::of(*pid)?)))
                .collect(),
            holders: holders
                .into_iter()
                .map(|(id, pid)| (id, pid, describe(pid), is_ours(app, pid)))
                .collect(),
            snapshots: snapshots.map(|object| object.name).collect(),
            loops: ops::loops(uid),
            strays: strays(&paths.vms())?
                .into_iter()
                .map(|stray| {
                    let name = describe(stray.pid);
                    (stray, name)
                })
                .collect(),
        })
    }

    fn tell_processes(self, app: &App, vms: &HashMap<VmId, Known>, found: &mut Vec<Found>) {
        let mut add = |name: String, owner: &str, expected, remedy| {
            found.push(new(HostKind::Process, name, owner, expected, remedy));
        };
        let own = format!("{} (bangerd)", std::process::id());
        add(own, INSTANCE, true, Remedy::Nothing);
        for (pid, name) in self.network {
            add(name, INSTANCE, true, Remedy::Waiting(pid));
        }
        for (id, pid, name, is_ours) in self.holders {
            let known = &vms[&id];
            let remedy = if is_ours {
                Remedy::Process(pid, VmFiles::of(&app.world.paths, id).lock())
            } else {
                Remedy::Stranger(pid)
            };
            add(name, &known.name, known.live, remedy);
        }
        for (stray, name) in self.strays {
            let id = stray.folder.parse::<VmId>().ok();
            let known = id.and_then(|id| vms.get(&id));
            let owner = known.map_or(stray.folder.clone(), |known| known.name.clone());
            let live = known.is_some_and(|known| known.live);
            add(name, &owner, live, Remedy::Stray(stray));
        }
        // They go with their processes.
        for (id, group) in self.groups {
            let known = &vms[&id];
            let (kind, remedy) = (HostKind::Cgroup, Remedy::Nothing);
            found.push(new(kind, group, &known.name, known.live, remedy));
        }
    }
}

fn new(kind: HostKind, name: String, owner: &str, expected: bool, remedy: Remedy) -> Found {
    Found {
        object: HostObject {
            kind,
            name,
            owner: owner.to_owned(),
            expected,
        },
        remedy,
    }
}

/// Whether a process runs one of the programs that banger starts on a VM's disks.
fn is_ours(app: &App, pid: i32) -> bool {
    let driver = &app.world.config.driver;
    let configured = [&driver.qemu, &driver.firecracker];
    let mut programs: BTreeSet<&str> = BTreeSet::from(["qemu-system-x86_64", "firecracker"]);
    let own = configured.into_iter().flatten();
    let own = own.chain([&app.world.programs.shim]);
    // The kernel names the file itself, to which a configured path may be a link.
    let own: Vec<PathBuf> = own
        .map(|path| path.canonicalize().unwrap_or_else(|_| path.clone()))
        .collect();
    programs.extend(own.iter().filter_map(|path| path.file_name()?.to_str()));
    std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|program| {
        let name = program.file_name().and_then(std::ffi::OsStr::to_str);
        // As the kernel shows one that was installed anew since.
        let name = name.map(|name| name.strip_suffix(" (deleted)").unwrap_or(name));
        name.is_some_and(|name| programs.contains(name))
    })
}

fn describe(pid: i32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("{pid} ({})", name.trim().escape_debug())
}

fn of_network(app: &App, network: &Now, vms: &HashMap<VmId, Known>, found: &mut Vec<Found>) {
    let mut add = |kind, name: String, owner: &str, expected, remedy| {
        found.push(new(kind, name, owner, expected, remedy));
    };
    if let Some(keeper) = network.keeper
        && let Ok(namespace) = std::fs::read_link(format!("/proc/{keeper}/ns/net"))
    {
        let name = namespace.display().to_string();
        add(HostKind::Namespace, name, INSTANCE, true, Remedy::Nothing);
    }
    let by_tap: HashMap<String, (&VmId, &Known)> = vms
        .iter()
        .map(|(id, known)| (id.tap_name(), (id, known)))
        .collect();
    let owner = |tap: &str| match by_tap.get(tap) {
        Some((id, known)) => {
            let lock = VmFiles::of(&app.world.paths, **id).lock();
            let remedy = Remedy::Port(tap.to_owned(), Some(lock));
            (known.name.as_str(), known.live, remedy)
        }
        None => (INSTANCE, false, Remedy::Port(tap.to_owned(), None)),
    };
    for port in &network.ports {
        let (name, live, remedy) = owner(&port.tap);
        add(HostKind::Tap, port.tap.clone(), name, live, remedy);
    }
    for state in &network.published {
        let published = &state.publication;
        let (name, live, remedy) = owner(&published.tap);
        let text = format!("{} ({})", published.listen, published.protocol);
        add(HostKind::PublishedPort, text, name, live, remedy);
    }
    for object in &network.owned {
        let kind = match object.kind {
            OwnedKind::Veth => HostKind::Veth,
            OwnedKind::NftTable => HostKind::NftTable,
            OwnedKind::Forwarding => HostKind::Forwarding,
            OwnedKind::Snapshot => continue,
        };
        let ours = object.instance == app.world.instance.id;
        let told = network.host_names.as_deref() == Some(HOST_NAMES_ROUTED);
        if ours && kind == HostKind::Veth && told {
            let name = object.name.clone();
            add(HostKind::Resolver, name, INSTANCE, true, Remedy::Nothing);
        }
        if ours {
            // VMs may live without a keeper.
            let expected = network.keeper.is_some() || vms.values().any(|known| known.live);
            let name = object.name.clone();
            add(kind, name, INSTANCE, expected, Remedy::HostSide);
        } else {
            // Another instance's are for its own daemon to judge.
            let owner = format!("{OTHER_INSTANCE}{}", object.instance);
            add(kind, object.name.clone(), &owner, true, Remedy::Nothing);
        }
    }
}

/// The snapshots and the loop devices below them. Another instance's are for its own daemon to judge, unless the file
/// that they write to has no name any more: its folder was removed, and nobody comes back for it.
fn of_storage(
    own: banger_core::id::InstanceId,
    snapshots: &[String],
    loops: &[ops::LoopBelow],
    vms: &HashMap<VmId, Known>,
    lock: impl Fn(VmId) -> PathBuf,
) -> Vec<Found> {
    let unlinked: BTreeSet<(_, VmId)> = loops
        .iter()
        .filter(|below| below.is_written_to && below.is_unlinked())
        .map(|below| (below.instance, below.vm))
        .collect();
    let judge = |instance, vm: VmId| -> (String, bool) {
        let gone = unlinked.contains(&(instance, vm));
        match vms.get(&vm) {
            _ if instance != own => (format!("{OTHER_INSTANCE}{instance}"), !gone),
            Some(known) => (known.name.clone(), known.live),
            None => (INSTANCE.to_owned(), false),
        }
    };
    let mut found = Vec::new();
    for name in snapshots {
        let Some((_, instance, vm)) = ops::owner(name) else {
            continue;
        };
        let (owner, expected) = judge(instance, vm);
        let lock = (instance == own).then(|| lock(vm));
        let remedy = Remedy::Snapshot(Owner { instance, vm }, lock);
        found.push(new(
            HostKind::Snapshot,
            name.clone(),
            &owner,
            expected,
            remedy,
        ));
    }
    // One of an image is shared by all VMs of it.
    let mut shared: BTreeMap<(&str, &str), BTreeMap<String, bool>> = BTreeMap::new();
    for below in loops {
        let (owner, expected) = judge(below.instance, below.vm);
        let owners = shared.entry((&below.name, &below.file)).or_default();
        *owners.entry(owner).or_default() |= expected;
    }
    for ((name, file), owners) in shared {
        let expected = owners.values().any(|expected| *expected);
        let owner = owners.into_keys().collect::<Vec<_>>().join(", ");
        let name = format!("{name} ({file})");
        found.push(new(HostKind::Loop, name, &owner, expected, Remedy::Nothing));
    }
    found
}

#[cfg(test)]
mod tests;
