//! The names of an instance's VMs: `calm-otter.vm`, and back from its address.

use crate::private::octets;
use crate::wire::kind;
use crate::wire::name::Name;
use crate::wire::query::Question;
use crate::wire::reply::{Apex, Record};
use banger_core::addr::{Ipv4Net, Pool};
use banger_core::name::VmName;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Why a change was refused; the zone is as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ZoneError {
    /// The address is none of the guests'.
    #[error("{address} is not in the guests' network {network}")]
    NotOfGuests {
        /// The address that was given.
        address: Ipv4Addr,
        /// The guests' network.
        network: Ipv4Net,
    },
    /// Another VM has the address.
    #[error("{address} is the address of VM `{holder}` already")]
    AddressTaken {
        /// The address that was given.
        address: Ipv4Addr,
        /// Who has it.
        holder: VmName,
    },
    /// Another VM has the name.
    #[error("VM `{name}` is in the zone already")]
    NameTaken {
        /// The name that was given.
        name: VmName,
    },
    /// There is no such name.
    #[error("VM `{name}` is not in the zone")]
    Unknown {
        /// The name that was given.
        name: VmName,
    },
}

/// One VM of the zone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ZoneEntry {
    /// Its name, without `.vm`.
    pub name: VmName,
    /// Its address.
    pub address: Ipv4Addr,
    /// Whether it may ask for names of the internet.
    pub nat: bool,
    /// Whether these may lead it into private networks.
    pub private: bool,
}

/// The names and addresses of an instance's VMs, which of them may ask for names of the internet, and whose may lead
/// into private networks. Clones are the same zone: the daemon changes it while the server reads it. A change is seen
/// by the next query.
#[derive(Debug, Clone)]
pub struct Zone {
    pool: Pool,
    tables: Arc<RwLock<Tables>>,
}

/// Each VM is in both tables of names. Locks on these are held for a look-up and never across an await.
#[derive(Debug, Default)]
struct Tables {
    addresses: HashMap<Arc<str>, Ipv4Addr>,
    names: HashMap<Ipv4Addr, Arc<str>>,
    nat: HashSet<Ipv4Addr>,
    /// Who of them reaches private networks, too.
    private: HashSet<Ipv4Addr>,
    /// The host's own addresses.
    host: BTreeSet<Ipv4Addr>,
    changes: u32,
}

/// What the zone says to a question of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) is_there: bool,
    pub(crate) record: Option<Record>,
    pub(crate) apex: Apex,
}

/// Makes a guest one of those that have a switch on, or no longer.
fn switch(guests: &mut HashSet<Ipv4Addr>, address: Ipv4Addr, on: bool) {
    if on {
        guests.insert(address);
    } else {
        guests.remove(&address);
    }
}

impl Zone {
    /// An empty zone for the guests of `pool`.
    pub fn new(pool: Pool) -> Self {
        Self {
            pool,
            tables: Arc::default(),
        }
    }

    /// The pool that it was made for.
    pub const fn pool(&self) -> Pool {
        self.pool
    }

    /// Gives `name` an address, in place of the one that it had. An old address loses its NAT.
    ///
    /// # Errors
    ///
    /// [`ZoneError::NotOfGuests`] and [`ZoneError::AddressTaken`].
    pub fn set(&self, name: &VmName, address: Ipv4Addr) -> Result<(), ZoneError> {
        self.check(address)?;
        let mut tables = self.write();
        match tables.names.get(&address) {
            Some(holder) if **holder != *name.as_str() => {
                return Err(ZoneError::AddressTaken {
                    address,
                    holder: vm_name(holder),
                });
            }
            Some(_) => return Ok(()),
            None => {}
        }
        tables.forget(name);
        tables.insert(name, address);
        tables.changes = tables.changes.wrapping_add(1);
        Ok(())
    }

    /// Removes a name, its address and its NAT. Returns whether it was there.
    pub fn remove(&self, name: &VmName) -> bool {
        let mut tables = self.write();
        let was_there = tables.forget(name).is_some();
        tables.changes = tables.changes.wrapping_add(u32::from(was_there));
        was_there
    }

    /// Gives a VM another name. It keeps its address and its NAT.
    ///
    /// # Errors
    ///
    /// [`ZoneError::Unknown`] and [`ZoneError::NameTaken`].
    pub fn rename(&self, from: &VmName, to: &VmName) -> Result<(), ZoneError> {
        let mut tables = self.write();
        let Some(&address) = tables.addresses.get(from.as_str()) else {
            return Err(ZoneError::Unknown { name: from.clone() });
        };
        if from == to {
            return Ok(());
        }
        if tables.addresses.contains_key(to.as_str()) {
            return Err(ZoneError::NameTaken { name: to.clone() });
        }
        tables.addresses.remove(from.as_str());
        tables.insert(to, address);
        tables.changes = tables.changes.wrapping_add(1);
        Ok(())
    }

    /// All VMs, by name.
    pub fn list(&self) -> Vec<ZoneEntry> {
        let tables = self.read();
        let mut entries: Vec<ZoneEntry> = tables
            .addresses
            .iter()
            .map(|(name, address)| ZoneEntry {
                name: vm_name(name),
                address: *address,
                nat: tables.nat.contains(address),
                private: tables.reaches_private(*address),
            })
            .collect();
        drop(tables);
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        entries
    }

    /// Says whether the guest with `address` may ask for names of the internet. The guest need not have a name.
    ///
    /// # Errors
    ///
    /// [`ZoneError::NotOfGuests`].
    pub fn set_nat(&self, address: Ipv4Addr, on: bool) -> Result<(), ZoneError> {
        self.check(address)?;
        switch(&mut self.write().nat, address, on);
        Ok(())
    }

    /// Says whether names of the internet may lead the guest with `address`, if it has NAT, into private networks.
    ///
    /// # Errors
    ///
    /// [`ZoneError::NotOfGuests`].
    pub fn set_private(&self, address: Ipv4Addr, on: bool) -> Result<(), ZoneError> {
        self.check(address)?;
        switch(&mut self.write().private, address, on);
        Ok(())
    }

    /// Says which addresses the host has itself. No name leads a guest to one that is in a private network.
    pub fn set_host_addresses(&self, addresses: BTreeSet<Ipv4Addr>) {
        self.write().host = addresses;
    }

    /// How often names or addresses changed; the serial of its SOA. What was written for one count is good until
    /// there is another.
    pub fn changes(&self) -> u32 {
        self.read().changes
    }

    pub(crate) fn has_nat(&self, client: IpAddr) -> bool {
        matches!(client, IpAddr::V4(address) if self.read().nat.contains(&address))
    }

    /// Whether names may lead the client into private networks.
    pub(crate) fn reaches_private(&self, client: IpAddr) -> bool {
        matches!(client, IpAddr::V4(address) if self.read().reaches_private(address))
    }

    /// Whether the host has this address.
    pub(crate) fn is_host(&self, address: Ipv4Addr) -> bool {
        self.read().host.contains(&address)
    }

    /// Whether the client is a guest of this instance.
    pub(crate) fn is_guest(&self, client: IpAddr) -> bool {
        matches!(client, IpAddr::V4(address) if self.pool.guests().contains(address))
    }

    /// Whether `name` is one of the zone's, there or not: no other server is ever asked for it.
    pub(crate) fn owns(&self, name: &Name) -> bool {
        match (name.label(0), name.label(1)) {
            (Some(b"vm"), _) => true,
            (Some(b"arpa"), Some(b"in-addr")) => self.owned_octets(name).is_some(),
            _ => false,
        }
    }

    /// The octets of a name below `in-addr.arpa` that belongs to the pool. It has a zone for each third octet.
    fn owned_octets(&self, name: &Name) -> Option<([u8; 4], usize)> {
        let (octets, count) = octets(name);
        let [a, b, c, _] = octets;
        let network = Ipv4Net::new(Ipv4Addr::new(a, b, c, 0), 24);
        (count >= 3 && self.pool.network().overlaps(&network)).then_some((octets, count))
    }

    /// What the zone says to a question. `None` if it is not of this zone.
    pub(crate) fn find(&self, question: &Question) -> Option<Found> {
        let name = &question.name;
        if !self.owns(name) {
            return None;
        }
        let tables = self.read();
        let found = |labels, is_there, record| Found {
            is_there,
            record,
            apex: Apex {
                labels,
                serial: tables.changes,
            },
        };
        if name.label(0) == Some(b"vm") {
            return Some(match (name.labels(), name.label(1)) {
                (1, _) => found(1, true, apex_record(question.kind)),
                (2, Some(label)) => {
                    let address = std::str::from_utf8(label)
                        .ok()
                        .and_then(|label| tables.addresses.get(label));
                    let record = address.filter(|_| question.kind == kind::A);
                    found(
                        1,
                        address.is_some(),
                        record.map(|address| Record::Address(*address)),
                    )
                }
                // Nothing is below a VM.
                _ => found(1, false, None),
            });
        }
        // The zone of a third octet, below in-addr.arpa.
        const REVERSE: usize = 5;
        let (octets, count) = self.owned_octets(name)?;
        Some(if name.labels() == REVERSE {
            found(REVERSE, true, apex_record(question.kind))
        } else if count == 4 && name.labels() == REVERSE + 1 {
            let vm = tables.names.get(&Ipv4Addr::from(octets));
            let record = vm.filter(|_| question.kind == kind::PTR);
            found(
                REVERSE,
                vm.is_some(),
                record.map(|vm| Record::Pointer(vm.clone())),
            )
        } else {
            found(REVERSE, false, None)
        })
    }

    fn check(&self, address: Ipv4Addr) -> Result<(), ZoneError> {
        let network = self.pool.guests();
        if network.contains(address) {
            Ok(())
        } else {
            Err(ZoneError::NotOfGuests { address, network })
        }
    }

    // A panic while a lock is held leaves whole tables: every change is made after its last check.
    fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.tables.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tables {
    fn insert(&mut self, name: &VmName, address: Ipv4Addr) {
        let name: Arc<str> = name.as_str().into();
        self.addresses.insert(name.clone(), address);
        self.names.insert(address, name);
    }

    fn reaches_private(&self, address: Ipv4Addr) -> bool {
        self.nat.contains(&address) && self.private.contains(&address)
    }

    fn forget(&mut self, name: &VmName) -> Option<Ipv4Addr> {
        let address = self.addresses.remove(name.as_str())?;
        self.names.remove(&address);
        self.nat.remove(&address);
        self.private.remove(&address);
        Some(address)
    }
}

fn apex_record(asked: u16) -> Option<Record> {
    match asked {
        kind::SOA => Some(Record::Authority),
        kind::NS => Some(Record::NameServer),
        _ => None,
    }
}

fn vm_name(name: &str) -> VmName {
    VmName::new(name).expect("the tables hold names of VMs alone")
}

#[cfg(test)]
mod tests;
