//! What the registry holds for somebody until it is dropped: names, addresses, keys and ports of the host.

use super::Registry;
use banger_core::id::VmId;
use banger_core::name::VmName;
use banger_core::publish::PublishedPort;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;

/// A name that nobody else may take, until it is dropped.
pub(super) struct HeldName {
    pub(super) registry: Arc<Registry>,
    pub(super) name: VmName,
}

impl Drop for HeldName {
    fn drop(&mut self) {
        self.registry.state().reserved_names.remove(&self.name);
    }
}

/// Places of the host that no other VM may take, until it is dropped.
pub(super) struct HeldPorts {
    pub(super) registry: Arc<Registry>,
    pub(super) own: VmId,
    pub(super) ports: BTreeSet<PublishedPort>,
}

impl Drop for HeldPorts {
    fn drop(&mut self) {
        let mut state = self.registry.state();
        for port in &self.ports {
            let held = |(own, held): &(VmId, PublishedPort)| (*own, held) == (self.own, port);
            // One alone: two requests may hold the same.
            if let Some(found) = state.reserved_ports.iter().position(held) {
                state.reserved_ports.swap_remove(found);
            }
        }
    }
}

/// A name and an address, given back unless a VM took them.
pub(super) struct Reservation {
    pub(super) registry: Arc<Registry>,
    pub(super) key: Option<String>,
    pub(super) name: VmName,
    pub(super) address: Ipv4Addr,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.registry.state();
        state.reserved_names.remove(&self.name);
        if let Some(key) = &self.key {
            state.reserved_keys.remove(key);
        }
        state.reserved_addresses.remove(&self.address);
    }
}
