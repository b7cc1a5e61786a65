//! The ledger: everything that banger has on the host, measured, and whose it is; and how what is left over is removed.

use crate::network::{HOST_NAMES_ROUTED, Now, network_error};
use crate::registry;
use crate::server::App;
use crate::storage::Owner;
use crate::vm::files::VmFiles;
use crate::vm::{Ask, scope};
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::host::{CleanHost, HostKind, HostObject, Mended};
use banger_core::decide::Request;
use banger_core::id::VmId;
use banger_host::net::pasta;
use banger_host::op::OwnedKind;
use banger_host::storage::ops;
use banger_vmm::lock::{LockError, Stray, holders_of_each, strays, try_lock};
use banger_vmm::process;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Whose it is that belongs to no VM.
const INSTANCE: &str = "(instance)";
/// Whose it is that belongs to another state folder of the same user.
const OTHER_INSTANCE: &str = "(another instance) ";
/// How long a process that was killed, or lost what it lives by, may take to be gone.
const DEATH: Duration = Duration::from_secs(10);

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
    /// A port of the bridge, with all that goes with it.
    Port(String),
    /// By the host's side, in one go.
    HostSide,
    /// A snapshot; the VM's lock says that nobody starts on it just now, if the VM is known.
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
    // One look at all processes, which takes as long as there are many.
    let processes = tokio::task::spawn_blocking(move || Processes::look(&shared, &ids, keeper));
    let internal = |error: &(dyn std::error::Error + 'static)| {
        ErrorBody::from_error(ErrorCode::Internal, error)
    };
    let processes = processes.await.map_err(|error| internal(&error))?;
    let processes = processes.map_err(|error| internal(&error))?;
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
    let mut found = Vec::new();
    processes.tell(app, &vms, &mut found);
    of_network(app, &network, &vms, &mut found);
    let (uid, instance) = (rustix::process::geteuid().as_raw(), app.world.instance.id);
    // Everybody may see them, also without whoever made them.
    let snapshots = ops::list(uid).into_iter();
    let snapshots: Vec<String> = snapshots.map(|object| object.name).collect();
    let lock = |vm| VmFiles::of(&app.world.paths, vm).lock();
    found.extend(of_storage(
        instance,
        &snapshots,
        &ops::loops(uid),
        &vms,
        lock,
    ));
    found.sort_by(|one, other| one.object.cmp(&other.object));
    Ok(found)
}

/// The processes of the instance.
struct Processes {
    /// The keeper's, `pasta` and who holds it.
    network: Vec<(i32, String)>,
    /// Who holds a VM's lock.
    holders: Vec<(VmId, i32, String)>,
    strays: Vec<(Stray, String)>,
    /// The cgroups that systemd made for VMs.
    groups: BTreeSet<(VmId, String)>,
}

impl Processes {
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
        let ways_out = keeper.map(pasta::processes).unwrap_or_default();
        Ok(Self {
            network: keeper.into_iter().chain(ways_out).map(named).collect(),
            groups: holders
                .iter()
                .filter_map(|(id, pid)| Some((*id, scope::of(*pid)?)))
                .collect(),
            holders: holders
                .into_iter()
                .map(|(id, pid)| (id, pid, describe(pid)))
                .collect(),
            strays: strays(&paths.vms())?
                .into_iter()
                .map(|stray| {
                    let name = describe(stray.pid);
                    (stray, name)
                })
                .collect(),
        })
    }

    fn tell(self, app: &App, vms: &HashMap<VmId, Known>, found: &mut Vec<Found>) {
        let mut add = |name: String, owner: &str, expected, remedy| {
            found.push(new(HostKind::Process, name, owner, expected, remedy));
        };
        let own = format!("{} (bangerd)", std::process::id());
        add(own, INSTANCE, true, Remedy::Nothing);
        for (pid, name) in self.network {
            add(name, INSTANCE, true, Remedy::Waiting(pid));
        }
        for (id, pid, name) in self.holders {
            let known = &vms[&id];
            let remedy = if is_ours(app, pid) {
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
    programs.extend(own.filter_map(|path| path.file_name()?.to_str()));
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
    let by_tap: HashMap<String, &Known> = vms
        .iter()
        .map(|(id, known)| (id.tap_name(), known))
        .collect();
    let owner = |tap: &str| match by_tap.get(tap) {
        Some(known) => (known.name.as_str(), known.live),
        None => (INSTANCE, false),
    };
    for port in &network.ports {
        let (name, live) = owner(&port.tap);
        let remedy = Remedy::Port(port.tap.clone());
        add(HostKind::Tap, port.tap.clone(), name, live, remedy);
    }
    for state in &network.published {
        let published = &state.publication;
        let (name, live) = owner(&published.tap);
        let text = format!("{} ({})", published.listen, published.protocol);
        let remedy = Remedy::Port(published.tap.clone());
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
            let (name, expected) = (object.name.clone(), network.keeper.is_some());
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
        .filter(|below| below.is_unlinked())
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
        let known = instance == own && vms.contains_key(&vm);
        let remedy = Remedy::Snapshot(Owner { instance, vm }, known.then(|| lock(vm)));
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

/// What a removal may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Removal {
    /// Nothing that anybody could miss.
    Careful,
    /// Also end processes whose disks are gone.
    Forced,
}

/// Removes what is left over, and tells what came of it.
pub(crate) async fn remove_left_over(app: &App) -> Result<Mended, ErrorBody> {
    let mut mended = Mended::default();
    let before = left_over(app).await?;
    if before.is_empty() {
        return Ok(mended);
    }
    let refused = remove(app, &before, Removal::Careful).await;
    let after = left_over(app).await?;
    for found in &before {
        if after.iter().all(|left| left.object != found.object) {
            mended.done.push(removed(&found.object));
        }
    }
    let left = after.iter().map(|found| left_as_it_is(found, &refused));
    mended.left.extend(left);
    Ok(mended)
}

async fn left_over(app: &App) -> Result<Vec<Found>, ErrorBody> {
    let mut found = look(app).await?;
    found.retain(|found| !found.object.expected);
    Ok(found)
}

/// Why what could not be removed, by the object's name.
type Refused = HashMap<String, ErrorBody>;

async fn remove(app: &App, found: &[Found], removal: Removal) -> Refused {
    let mut refused = Refused::new();
    let mut snapshots = BTreeSet::new();
    let mut swept = false;
    for Found { object, remedy } in found {
        let tried = match remedy {
            Remedy::Nothing | Remedy::Waiting(_) | Remedy::Stranger(_) => Ok(()),
            Remedy::Port(tap) => {
                let released = app.world.network.release(tap.clone()).await;
                released.map_err(|error| network_error(&error))
            }
            Remedy::HostSide if std::mem::replace(&mut swept, true) => Ok(()),
            Remedy::HostSide => {
                let gone = app.world.network.sweep().await;
                gone.map_err(|error| network_error(&error))
            }
            // It has two devices, and goes as a whole.
            Remedy::Snapshot(owner, _) if !snapshots.insert((owner.instance, owner.vm)) => Ok(()),
            Remedy::Snapshot(owner, lock) => detach(app, *owner, lock.clone()).await,
            Remedy::Process(pid, lock) => {
                let (pid, lock) = (*pid, lock.clone());
                end(move || process::end_holder(pid, &lock, DEATH)).await
            }
            Remedy::Stray(stray) if removal == Removal::Forced => {
                let stray = stray.clone();
                end(move || stray.end(DEATH)).await
            }
            Remedy::Stray(_) => Ok(()),
        };
        if let Err(error) = tried {
            tracing::warn!(
                kind = object.kind.name(),
                name = object.name,
                error = error.message,
                causes = ?error.causes,
                "it is left over and could not be removed"
            );
            refused.insert(object.name.clone(), error);
        }
    }
    refused
}

/// Nobody starts the VM meanwhile, since that takes its lock.
async fn detach(app: &App, owner: Owner, lock: Option<PathBuf>) -> Result<(), ErrorBody> {
    let world = app.world.clone();
    let detached = tokio::task::spawn_blocking(move || {
        let held = lock.as_deref().map(try_lock).transpose();
        match held {
            Err(error @ LockError::Held(_)) => {
                return Err(ErrorBody::from_error(ErrorCode::InUse, &error));
            }
            // Its folder was removed: then nobody starts it either.
            Ok(_) | Err(LockError::Io { .. }) => {}
        }
        crate::storage::StorageDriver::close(world.storage.snapshot(), &owner)
    });
    let detached = detached.await;
    detached.unwrap_or_else(|error| Err(ErrorBody::from_error(ErrorCode::Internal, &error)))
}

async fn end(
    kill: impl FnOnce() -> Result<(), process::KillError> + Send + 'static,
) -> Result<(), ErrorBody> {
    match tokio::task::spawn_blocking(kill).await {
        // It ended by itself.
        Ok(Ok(()) | Err(process::KillError::NotHolder { .. })) => Ok(()),
        Ok(Err(error)) => Err(ErrorBody::from_error(ErrorCode::Internal, &error)),
        Err(error) => Err(ErrorBody::from_error(ErrorCode::Internal, &error)),
    }
}

fn removed(object: &HostObject) -> String {
    let verb = if object.kind == HostKind::Process {
        "ended"
    } else {
        "removed"
    };
    let (kind, name, owner) = (object.kind.name(), &object.name, &object.owner);
    if owner == INSTANCE {
        format!("{verb} {kind} {name}")
    } else {
        format!("{verb} {kind} {name} of {owner}")
    }
}

/// An object that stays, why, and what helps.
fn left_as_it_is(found: &Found, refused: &Refused) -> ErrorBody {
    let HostObject {
        kind, name, owner, ..
    } = &found.object;
    let message = format!("{} {name} of {owner}", kind.name());
    let mut body = ErrorBody::new(ErrorCode::HostUnfit, message);
    if let Some(error) = refused.get(name) {
        body.causes.push(error.message.clone());
        body.causes.extend(error.causes.iter().cloned());
        body.hints.extend(error.hints.iter().cloned());
    }
    let (cause, hint) = match &found.remedy {
        Remedy::Stranger(pid) => (
            Some("it holds the lock of a VM that does not run, and banger did not start it".to_owned()),
            format!("the VM starts when it has ended; `kill {pid}` ends it"),
        ),
        Remedy::Stray(stray) => (
            Some("the VM's folder was removed while it ran: what is on its disks is nowhere else".to_owned()),
            format!(
                "copy what you need from `/proc/{}/fd`; then `banger host clean --force` ends it",
                stray.pid
            ),
        ),
        Remedy::Process(pid, _) | Remedy::Waiting(pid) => {
            (None, format!("`kill -9 {pid}` ends it, unless it waits for a disk"))
        }
        Remedy::Snapshot(..) => (
            None,
            "end what has it open (`lsblk`, `fuser -v /dev/dm-*` show that), then repeat the command"
                .to_owned(),
        ),
        Remedy::Nothing if *kind == HostKind::Loop => {
            (None, "it goes with the snapshot above it".to_owned())
        }
        Remedy::Nothing | Remedy::Port(_) | Remedy::HostSide => {
            (None, "`banger daemon logs` tells more; repeat the command".to_owned())
        }
    };
    body.causes.extend(cause);
    if body.hints.is_empty() {
        body.hints.push(hint);
    }
    body
}

/// Returns the host to what it was before banger: VMs keep their files and records.
pub(crate) async fn clean(app: &App, request: &CleanHost) -> Result<Mended, ErrorBody> {
    let live: Vec<_> = app
        .registry
        .list(false)
        .into_iter()
        .filter(|handle| handle.view.borrow().phase.is_live())
        .collect();
    if !live.is_empty() && !request.force {
        let names: Vec<String> = live
            .iter()
            .map(|handle| handle.latest().record.name.to_string())
            .collect();
        return Err(ErrorBody::new(
            ErrorCode::WrongPhase,
            format!("cannot clean the host: {} are live", names.join(", ")),
        )
        .hint("`banger vm stop` them first, or `banger host clean --force` stops them"));
    }
    let before = look(app).await?;
    let mut mended = Mended::default();
    let mut alive = BTreeSet::new();
    for outcome in registry::each(live, Ask::new(Request::Stop)).await {
        if let Some(error) = outcome.error {
            let keeps = format!("VM `{}` is live, and keeps what it needs", outcome.name);
            let hint = "then `banger host clean` takes the rest away; `banger host ls` shows it";
            let mut error = error.hint(hint);
            error.causes.insert(0, keeps);
            mended.left.push(error);
            alive.insert(outcome.name.to_string());
        }
    }
    // Who lives on keeps its port.
    let mut refused = Refused::new();
    let taps = before.iter().filter_map(|found| match &found.remedy {
        Remedy::Port(tap) if !alive.contains(&found.object.owner) => Some((found, tap)),
        _ => None,
    });
    for (found, tap) in taps {
        if let Err(error) = app.world.network.release(tap.clone()).await {
            refused.insert(found.object.name.clone(), network_error(&error));
        }
    }
    let removal = if request.force {
        Removal::Forced
    } else {
        Removal::Careful
    };
    // A process that is left over may hold the namespace.
    refused.extend(remove(app, &left_over(app).await?, removal).await);
    if let Err(error) = app.world.network.close().await {
        mended.left.push(network_error(&error));
    }
    if alive.is_empty() {
        wait_for_ends(&before).await;
    }
    // What stood on the namespace, or on nothing but it.
    refused.extend(remove(app, &left_over(app).await?, removal).await);
    let after = look(app).await?;
    let mut gone = before.iter();
    let there = |found: &&Found| after.iter().all(|left| left.object != found.object);
    mended.done.extend(
        gone.by_ref()
            .filter(there)
            .map(|found| removed(&found.object)),
    );
    let own = format!("{} (bangerd)", std::process::id());
    for found in &after {
        let HostObject {
            name,
            owner,
            expected,
            ..
        } = &found.object;
        // Another instance's is no business of ours, and this daemon goes when it is told to stop.
        let others = owner.starts_with(OTHER_INSTANCE) && *expected;
        // What those who live on need was told with them.
        let needed = *expected && !alive.is_empty();
        if !others && !needed && *name != own {
            mended.left.push(left_as_it_is(found, &refused));
        }
    }
    Ok(mended)
}

/// `pasta`, and who holds it, end a moment after the keeper.
async fn wait_for_ends(before: &[Found]) {
    let ends = before.iter().filter_map(|found| match found.remedy {
        Remedy::Waiting(pid) => process::open(pid).ok(),
        _ => None,
    });
    let ends: Vec<_> = ends.collect();
    let waited = tokio::task::spawn_blocking(move || {
        let deadline = Instant::now() + DEATH;
        for end in ends {
            let left = deadline.saturating_duration_since(Instant::now());
            // Who is not gone by then is told of.
            let _ = process::wait_any(&[end], left);
        }
    });
    let _ = waited.await;
}

#[cfg(test)]
mod tests;
