//! What a daemon does between its start and its first request: it reads settings and records, brings rows and folders
//! together, finds out which mode this is, and looks which VMs live.

use crate::config::Config;
use crate::drivers::Drivers;
use crate::events::Hub;
use crate::images::{Images, store_error};
use crate::instance::{self, Origin};
use crate::names::{self, Names};
use crate::network::{Network, NetworkSetup};
use crate::operations::Operations;
use crate::record::VmRecord;
use crate::registry::Registry;
use crate::server::App;
use crate::storage::{StorageHost, watermark};
use crate::store::{Opened, Store};
use crate::vm::actor::Found;
use crate::vm::files::VmFiles;
use crate::world::{ModeReason, Programs, World};
use crate::{keys, reconcile, trash};
use banger_api::daemon::Mode;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::paths::{Env, Paths, ProcessEnv, find_program};
use banger_api::version::build_id;
use banger_core::id::VmId;
use banger_core::phase::Phase;
use banger_dns::Zone;
use banger_host::host_side::{HELPER_SOCKET, HostSide};
use jiff::Timestamp;
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use tokio::sync::watch;

fn programs() -> Result<Programs, ErrorBody> {
    let exe = std::env::current_exe()
        .map_err(|error| ErrorBody::from_error(ErrorCode::Internal, &error))?;
    let find = |name: &str| {
        find_program(&ProcessEnv, &exe, name).ok_or_else(|| {
            ErrorBody::new(
                ErrorCode::HostUnfit,
                format!("the program `{name}` is missing"),
            )
            .hint("install banger again: it belongs beside `bangerd` or into ../libexec/banger")
        })
    };
    Ok(Programs {
        shim: find("banger-shim")?,
        keeper: find("banger-netns")?,
        init: find("banger-init")?,
    })
}

/// Everything that serves requests.
pub(crate) async fn build(paths: &Paths) -> Result<App, ErrorBody> {
    let config = Config::load(&paths.config_file()).map_err(|error| {
        ErrorBody::from_error(ErrorCode::InvalidRequest, &error)
            .hint("fix the file, or remove it for the defaults")
    })?;
    let programs = programs()?;
    let internal = |error: &(dyn std::error::Error + 'static)| {
        ErrorBody::from_error(ErrorCode::Internal, error)
    };
    let boot_id = banger_host::storage::boot_id().map_err(|error| internal(&error))?;
    let machine = banger_host::storage::machine_id().map_err(|error| internal(&error))?;
    let Opened {
        store,
        rows,
        damaged,
    } = Store::open(&paths.database()).map_err(|error| store_error(&error))?;
    let mut notices = Vec::new();
    if let Some(aside) = damaged {
        notices.push(format!(
            "the database was damaged; it was moved to `{}` and made again",
            aside.display()
        ));
    }
    let rows = reconcile::reconcile(paths, &store, rows, &mut notices)
        .await
        .map_err(|error| store_error(&error))?;
    let routes = || banger_host::net::host::host_routes().unwrap_or_default();
    let loaded = instance::load(
        &paths.instance_file(),
        &paths.state,
        machine,
        config.pool(),
        routes,
    );
    let (instance, origin) = loaded.map_err(|error| {
        ErrorBody::from_error(ErrorCode::HostUnfit, &error)
            .hint("set `pool` under `[network]` in config.toml")
    })?;
    if origin == Origin::Copied {
        notices.push(
            "the state folder was copied or moved: this is a new instance with new addresses"
                .to_owned(),
        );
    }
    for notice in &notices {
        tracing::warn!(notice, "found at start-up");
    }
    let authorized_key = keys::ensure_own(&paths.ssh()).map_err(|error| internal(&error))?;
    let (mode, host) = host_side(config.network.mode)?;
    let mode_reason = mode_reason(mode, config.network.mode, Path::new(HELPER_SOCKET));
    let host = host.map(Arc::new);
    // Two: a server that is being started, and its successor.
    let zone = Zone::new(instance.pool);
    let names = Names::new(zone.clone(), paths.state.join("records.json"));
    let (servers, sockets) = tokio::sync::mpsc::channel(2);
    let network = Network::start(NetworkSetup {
        instance: instance.id,
        pool: instance.pool,
        mode,
        host: host.clone(),
        pasta: config.network.pasta(),
        names: servers,
        zone,
        keeper_program: programs.keeper.clone(),
        keeper_socket: paths.keeper_socket(),
    });
    let exe = std::env::current_exe().map_err(|error| internal(&error))?;
    let images = Arc::new(Images::new(
        paths.clone(),
        store.clone(),
        config.defaults.kernel.clone(),
        rows.images,
        rows.kernels,
    ));
    let world = Arc::new(World {
        drivers: Drivers::new(
            config.driver.clone(),
            paths.drivers(),
            programs.keeper.clone(),
            paths.state.join("kvm.json"),
            boot_id.clone(),
        ),
        storage: StorageHost::new(host),
        paths: paths.clone(),
        config,
        instance,
        mode,
        mode_reason,
        programs,
        store,
        hub: Hub::new(u64::try_from(Timestamp::now().as_microsecond()).unwrap_or_default()),
        network,
        names,
        images,
        operations: Arc::new(Operations::default()),
        authorized_key,
        boot_id,
        build: build_id(&exe).map_err(|error| internal(&error))?,
        started_at: Timestamp::now(),
        notices,
        draining: false.into(),
        shutdown: watch::Sender::new(false),
    });
    let registry = Arc::new(Registry::default());
    let mut recovered = Vec::new();
    let records = readdress(&world, rows.vms).await?;
    let at_rest = find_at_rest(&world, &records).await;
    for record in records {
        world
            .images
            .pin_known(record.spec.image, record.spec.kernel, record.id);
        if at_rest.contains(&record.id) {
            registry.spawn(&world, record, Found::Stopped);
        } else {
            let (_, looked) = registry.spawn(&world, record, Found::Unknown);
            recovered.push(looked);
        }
    }
    // Nobody may ask before it is known what lives.
    for looked in recovered {
        let _ = looked.await;
    }
    remove_foreign_ports(&world, &registry).await;
    detach_foreign_snapshots(&world, &registry).await;
    tokio::spawn(watermark::watch(Arc::clone(&world), Arc::clone(&registry)));
    let app = App { world, registry };
    tokio::spawn(names::keep_serving(app.clone(), sockets));
    tokio::spawn(finish_startup(app.clone()));
    tokio::spawn(trash::keep_emptying(app.clone()));
    Ok(app)
}

/// Who does what only root may, and what that makes possible.
fn host_side(wanted: Option<Mode>) -> Result<(Mode, Option<HostSide>), ErrorBody> {
    if wanted == Some(Mode::Rootless) && ProcessEnv.uid() != 0 {
        return Ok((Mode::Rootless, None));
    }
    // Without root VMs that live by the helper could not be kept, so one that is only busy is no reason for it.
    let found = HostSide::find().map_err(|error| {
        ErrorBody::from_error(ErrorCode::HostUnfit, &error).hint(
            "`journalctl -u banger-helper` says more; `mode = \"rootless\"` under `[network]` in config.toml does without it",
        )
    })?;
    let (mode, host) = match found {
        Some(host @ HostSide::InProcess(_)) => (Mode::Root, Some(host)),
        Some(host @ HostSide::Helper(_)) => (Mode::Helper, Some(host)),
        None => (Mode::Rootless, None),
    };
    match wanted {
        Some(wanted) if wanted != mode => {
            let message = format!(
                "the settings ask for {} mode, and this is {} mode",
                wanted.name(),
                mode.name()
            );
            Err(ErrorBody::new(ErrorCode::HostUnfit, message).hint(
                "root mode needs root, helper mode needs `banger-helper`; without `mode` in config.toml the best one is taken",
            ))
        }
        _ => Ok((mode, host)),
    }
}

/// Why it is this mode, for who would have another.
fn mode_reason(mode: Mode, wanted: Option<Mode>, socket: &Path) -> ModeReason {
    let place = socket.display();
    let (mut why, hint) = match mode {
        Mode::Root => ("the daemon runs as root".to_owned(), None),
        Mode::Helper => (format!("`banger-helper` serves at `{place}`"), None),
        Mode::Rootless if wanted == Some(mode) => (
            "neither root nor the helper is asked".to_owned(),
            Some("without `mode` in config.toml the best one is taken when the daemon starts"),
        ),
        Mode::Rootless => {
            let why = if socket.exists() {
                format!("`{place}` is there, but does not serve this user")
            } else {
                "there is no `banger-helper` here".to_owned()
            };
            let hint =
                "`sudo make install` gives the helper, `banger daemon restart` then takes it";
            (why, Some(hint))
        }
    };
    if wanted.is_some() {
        why.push_str(", and `mode` in config.toml demands it");
    }
    ModeReason { why, hint }
}

/// What nobody waits for at the start: leftovers on the host and of killed builds are removed, and VMs with autostart
/// are started. Of those, all are started once per boot of the host; at any time those that stopped because of a logout
/// or a shutdown, which a daemon that died in the middle of this may not have started.
async fn finish_startup(app: App) {
    // Goes on by itself; a build that starts meanwhile is none of its business.
    drop(tokio::task::spawn_blocking(
        banger_image::image::sweep_killed_builds,
    ));
    if let Err(error) = app.world.network.settle().await {
        let error = banger_host::error_chain(&error);
        tracing::warn!(error, "what is left of the network on the host stays");
    }
    let first = instance::first_start_of_boot(&app.world.paths.state, &app.world.boot_id);
    let outcomes = app
        .registry
        .restore(|record| comes_back(record, first))
        .await;
    for outcome in outcomes {
        match outcome.error {
            None => tracing::info!(vm = %outcome.id, name = %outcome.name, "started with the host"),
            Some(error) => {
                tracing::warn!(vm = %outcome.id, error = error.message, "not started with the host")
            }
        }
    }
}

/// Whether a VM that is to run is started with the daemon, which is the `first` one of this boot of the host or not.
fn comes_back(record: &VmRecord, first: bool) -> bool {
    record.spec.autostart && (first || record.last_stop.is_of_the_host())
}

/// Gives VMs whose address is not of this instance's pool another one: the state folder was copied, or the pool
/// changed.
async fn readdress(world: &World, mut records: Vec<VmRecord>) -> Result<Vec<VmRecord>, ErrorBody> {
    let pool = world.instance.pool;
    let mut taken: HashSet<_> = records
        .iter()
        .map(|record| record.address)
        .filter(|address| pool.guests().contains(*address))
        .collect();
    for record in &mut records {
        if pool.guests().contains(record.address) {
            continue;
        }
        let Some(address) = pool.next_address(None, |address| taken.contains(&address)) else {
            continue;
        };
        taken.insert(address);
        record.address = address;
        record.record_version += 1;
        world
            .store
            .update_vm(record.clone())
            .await
            .map_err(|error| store_error(&error))?;
    }
    Ok(records)
}

/// The VMs of which nothing is left on the host: one look at all of it, since most VMs are of this kind. All others are
/// looked at one by one.
async fn find_at_rest(world: &World, records: &[VmRecord]) -> HashSet<VmId> {
    let ports: HashSet<String> = match world.network.now().await {
        Ok(now) => now.ports.into_iter().map(|port| port.tap).collect(),
        Err(error) => {
            let error = banger_host::error_chain(&error);
            tracing::warn!(error, "the ports cannot be listed: every VM is looked at");
            return HashSet::new();
        }
    };
    let snapshots = world.storage.snapshot().attached(world.instance.id);
    // Nobody is served yet whom this could keep waiting.
    let at_rest = records.iter().filter(|record| {
        !ports.contains(&record.id.tap_name())
            && !snapshots.contains(&record.id)
            && VmFiles::of(&world.paths, record.id).are_at_rest()
    });
    at_rest.map(|record| record.id).collect()
}

/// Snapshots of ours that belong to no VM are left from a VM whose record is gone: they are detached.
async fn detach_foreign_snapshots(world: &Arc<World>, registry: &Registry) {
    let known = [false, true]
        .into_iter()
        .flat_map(|trash| registry.list(trash))
        .map(|handle| handle.id)
        .collect();
    let shared = Arc::clone(world);
    let swept = tokio::task::spawn_blocking(move || {
        shared.storage.snapshot().sweep(shared.instance.id, &known)
    });
    let swept = swept.await;
    for (vm, error) in swept.unwrap_or_default() {
        tracing::warn!(%vm, error = error.message, causes = ?error.causes, "a snapshot could not be detached");
    }
}

/// Ports of our namespace that belong to no VM that runs are left from one that died, or whose record is gone: they go.
async fn remove_foreign_ports(world: &World, registry: &Registry) {
    let ports = match world.network.now().await {
        Ok(now) => now.ports,
        Err(error) => {
            tracing::warn!(
                error = banger_host::error_chain(&error),
                "the ports cannot be listed"
            );
            return;
        }
    };
    let known: HashSet<String> = [false, true]
        .into_iter()
        .flat_map(|trash| registry.list(trash))
        .filter(|handle| !matches!(handle.view.borrow().phase, Phase::Stopped { .. }))
        .map(|handle| handle.id.tap_name())
        .collect();
    for port in ports.into_iter().filter(|port| !known.contains(&port.tap)) {
        tracing::warn!(tap = port.tap, "a port without a VM that runs is removed");
        if let Err(error) = world.network.release(port.tap).await {
            tracing::warn!(
                error = banger_host::error_chain(&error),
                "a port could not be removed"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_says_why_it_is_and_what_would_give_the_helper() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("helper.sock");
        let said = |mode, wanted| mode_reason(mode, wanted, &socket).to_string();
        assert_eq!(said(Mode::Root, None), "the daemon runs as root");
        assert!(said(Mode::Helper, None).contains("`banger-helper` serves at"));
        let without = said(Mode::Rootless, None);
        assert!(
            without.starts_with("there is no `banger-helper` here; `sudo make install`"),
            "{without}"
        );
        std::fs::write(&socket, "").unwrap();
        assert!(said(Mode::Rootless, None).contains("does not serve this user"));
        let demanded = said(Mode::Rootless, Some(Mode::Rootless));
        assert!(
            demanded.contains("`mode` in config.toml demands it"),
            "{demanded}"
        );
        assert!(!demanded.contains("make install"), "{demanded}");
    }
}
