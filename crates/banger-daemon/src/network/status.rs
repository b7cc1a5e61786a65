//! The network on the wire: what the records want beside what the kernel has.

use super::{Now, network_error};
use crate::server::App;
use banger_api::error::ErrorBody;
use banger_api::network::{NetworkStatus, VmNetwork, VmPort, WayOut};
use banger_core::id::VmId;
use banger_core::name::VmName;
use banger_core::publish::PublishedPort;
use std::collections::BTreeMap;

/// All of it.
pub(crate) async fn status(app: &App) -> Result<NetworkStatus, ErrorBody> {
    let now = app.world.network.now().await;
    let now = now.map_err(|error| network_error(&error))?;
    let views: Vec<_> = app
        .registry
        .list(false)
        .iter()
        .map(|handle| handle.latest())
        .collect();
    let names: BTreeMap<VmId, VmName> = views
        .iter()
        .map(|view| (view.record.id, view.record.name.clone()))
        .collect();
    let mut vms: Vec<VmNetwork> = views
        .iter()
        .map(|view| {
            let record = &view.record;
            let live = view.phase.is_live();
            // A join holds for both, whoever said it.
            let said_by_others = views
                .iter()
                .filter(|other| other.record.spec.joins.contains(&record.id))
                .map(|other| other.record.id);
            let mut joins: Vec<VmName> = record
                .spec
                .joins
                .iter()
                .copied()
                .chain(said_by_others)
                .filter_map(|id| names.get(&id).cloned())
                .collect();
            joins.sort();
            joins.dedup();
            VmNetwork {
                id: record.id,
                name: record.name.clone(),
                address: record.address,
                live,
                nat: record.spec.nat,
                nat_now: now.nat.contains(&record.address),
                nat_private: record.spec.nat_private,
                nat_private_now: now.private.contains(&record.address),
                ports: record
                    .spec
                    .ports
                    .iter()
                    .map(|port| port_now(port, live, &now))
                    .collect(),
                joins,
            }
        })
        .collect();
    vms.sort_by(|one, other| one.name.cmp(&other.name));
    let dropped = now.dropped.into_iter();
    Ok(NetworkStatus {
        mode: app.world.mode,
        way_out: now.way_out.unwrap_or(WayOut::Closed),
        vms,
        dropped: dropped
            .map(|(reason, dropped)| (reason, dropped.packets))
            .collect(),
        repairs: now.repairs,
    })
}

fn port_now(port: &PublishedPort, live: bool, now: &Now) -> VmPort {
    let place = (port.protocol, port.listen);
    let found = now
        .published
        .iter()
        .find(|state| super::plan::place(&state.publication) == place);
    let problem = now
        .problems
        .iter()
        .find(|problem| (problem.protocol, problem.listen) == place)
        .map(|problem| problem.why.clone());
    VmPort {
        port: port.clone(),
        open: found.is_some(),
        connections: found.map_or(0, |state| state.connections),
        problem: problem.filter(|_| live && found.is_none()),
    }
}
