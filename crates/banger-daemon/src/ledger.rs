//! The ledger: everything that banger has on the host, measured, and whose it is.

use crate::network::network_error;
use crate::registry;
use crate::server::App;
use crate::vm::files::VmFiles;
use crate::vm::{Ask, scope};
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::host::{CleanHost, HostObject, Mended};
use banger_core::decide::Request;
use banger_host::op::OwnedKind;
use banger_vmm::lock::holders_of_each;
use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;

/// Whose it is that belongs to no VM.
const INSTANCE: &str = "(instance)";
/// Whose it is that belongs to another state folder of the same user.
const OTHER_INSTANCE: &str = "(another instance) ";

/// Everything on the host.
pub(crate) async fn list(app: &App) -> Result<Vec<HostObject>, ErrorBody> {
    let network = app.world.network.now().await;
    let network = network.map_err(|error| network_error(&error))?;
    let mut objects = Vec::new();
    let mut add = |kind: &str, name: String, owner: String, expected| {
        objects.push(HostObject {
            kind: kind.to_owned(),
            name,
            owner,
            expected,
        });
    };
    add(
        "process",
        format!("{} (bangerd)", std::process::id()),
        INSTANCE.to_owned(),
        true,
    );
    if let Some(keeper) = network.keeper {
        add(
            "process",
            format!("{keeper} (banger-netns)"),
            INSTANCE.to_owned(),
            true,
        );
        let namespace = std::fs::read_link(format!("/proc/{keeper}/ns/net"));
        if let Ok(namespace) = namespace {
            let name = namespace.display().to_string();
            add("namespace", name, INSTANCE.to_owned(), true);
        }
    }
    let handles = [false, true].map(|trash| app.registry.list(trash)).concat();
    let locks: Vec<PathBuf> = handles
        .iter()
        .map(|handle| VmFiles::of(&app.world.paths, handle.id).lock())
        .collect();
    // One look at all processes, which takes as long as there are many.
    let holders = tokio::task::spawn_blocking(move || holders_of_each(&locks)).await;
    let holders = holders.map_err(|error| ErrorBody::from_error(ErrorCode::Internal, &error))?;
    let holders = holders.map_err(|error| ErrorBody::from_error(ErrorCode::Internal, &error))?;
    let mut by_tap = HashMap::new();
    for (handle, holders) in handles.iter().zip(holders) {
        let view = handle.latest();
        let live = view.phase.is_live();
        let name = view.record.name.to_string();
        let mut groups = BTreeSet::new();
        for pid in holders {
            add("process", describe(pid), name.clone(), live);
            groups.extend(scope::of(pid));
        }
        for group in groups {
            add("cgroup", group, name.clone(), live);
        }
        by_tap.insert(handle.id.tap_name(), (name, live));
    }
    let owner = |tap: &str| {
        by_tap
            .get(tap)
            .cloned()
            .unwrap_or_else(|| (INSTANCE.to_owned(), false))
    };
    for port in &network.ports {
        let (name, live) = owner(&port.tap);
        add("tap", port.tap.clone(), name, live);
    }
    for state in &network.published {
        let published = &state.publication;
        let (name, live) = owner(&published.tap);
        let text = format!("{} ({})", published.listen, published.protocol);
        add("published-port", text, name, live);
    }
    for object in &network.owned {
        let kind = match object.kind {
            OwnedKind::Veth => "veth",
            OwnedKind::NftTable => "nft-table",
            OwnedKind::Forwarding => "forwarding",
            OwnedKind::Snapshot => "snapshot",
        };
        let ours = object.instance == app.world.instance.id;
        let vm = banger_host::storage::ops::owner(&object.name).map(|(_, _, vm)| vm);
        let (owner, expected) = match (object.kind, vm) {
            // Another instance's are for its own daemon to judge.
            _ if !ours => (format!("{OTHER_INSTANCE}{}", object.instance), true),
            (OwnedKind::Snapshot, Some(vm)) => owner(&vm.tap_name()),
            _ => (INSTANCE.to_owned(), network.keeper.is_some()),
        };
        add(kind, object.name.clone(), owner, expected);
    }
    objects.sort();
    Ok(objects)
}

fn describe(pid: i32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("{pid} ({})", name.trim().escape_debug())
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
    let before = list(app).await?;
    let mut mended = Mended::default();
    let mut alive = BTreeSet::new();
    for outcome in registry::each(live, Ask::new(Request::Stop)).await {
        if let Some(error) = outcome.error {
            let why = format!("VM {}: {}", outcome.name, error.message);
            mended.left.push(why);
            alive.insert(outcome.name.to_string());
        }
    }
    // Who lives on keeps its port.
    let taps = before.iter().filter(|object| object.kind == "tap");
    for port in taps.filter(|port| !alive.contains(&port.owner)) {
        if let Err(error) = app.world.network.release(port.name.clone()).await {
            let why = banger_host::error_chain(&error);
            mended.left.push(format!("tap {}: {why}", port.name));
        }
    }
    if let Err(error) = app.world.network.close().await {
        mended.left.push(banger_host::error_chain(&error));
    }
    let after = list(app).await?;
    for object in before.iter().filter(|object| !after.contains(object)) {
        mended
            .done
            .push(format!("removed {} {}", object.kind, object.name));
    }
    for object in &after {
        // Another instance's is no business of ours, and this daemon goes when it is told to stop.
        let others = object.owner.starts_with(OTHER_INSTANCE);
        if !others && (object.owner != INSTANCE || object.kind != "process") {
            mended.left.push(format!(
                "{} {} of {}",
                object.kind, object.name, object.owner
            ));
        }
    }
    Ok(mended)
}
