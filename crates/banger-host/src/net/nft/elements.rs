//! What the sets of the ruleset hold: as it is wanted, and as the kernel writes it.

use crate::op::Port;
use banger_core::id::MacAddress;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::Ipv4Addr;

/// `ifname` (16 bytes), `ether_addr` (6, filled up to 8), `ipv4_addr` (4).
const KEY_BYTES: usize = 28;
const NAME_BYTES: usize = 16;

/// A set that the keeper fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Set {
    /// Port, MAC and address of every guest.
    Ports,
    /// Who reaches the internet.
    NatVms,
    /// Who of them reaches private networks, too.
    PrivateVms,
    /// Who reaches whom, as IPv4 is routed.
    Joins,
    /// Who may ask for whose address.
    ArpJoins,
    /// The host's own addresses.
    HostAddresses,
}

impl Set {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Ports,
        Self::NatVms,
        Self::PrivateVms,
        Self::Joins,
        Self::ArpJoins,
        Self::HostAddresses,
    ];

    /// Whether it is in the table of the bridge family, and its name there.
    pub const fn place(self) -> (bool, &'static str) {
        match self {
            Self::Ports => (true, "ports"),
            Self::ArpJoins => (true, "joins"),
            Self::NatVms => (false, "nat_vms"),
            Self::PrivateVms => (false, "private_vms"),
            Self::Joins => (false, "joins"),
            Self::HostAddresses => (false, "host_addresses"),
        }
    }
}

/// An element of a set, as the kernel writes its key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Element {
    /// Which set.
    pub set: Set,
    /// The key's bytes.
    pub key: Vec<u8>,
}

/// What the sets must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Elements {
    /// By TAP name.
    pub ports: BTreeMap<String, Port>,
    /// Guests.
    pub nat_vms: BTreeSet<Ipv4Addr>,
    /// Guests.
    pub private_vms: BTreeSet<Ipv4Addr>,
    /// Pairs of guests, the lower address first.
    pub joins: BTreeSet<(Ipv4Addr, Ipv4Addr)>,
    /// Of the host.
    pub host_addresses: BTreeSet<Ipv4Addr>,
}

/// Elements to take out of the sets, then to put in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Change {
    /// These are there.
    pub remove: Vec<Element>,
    /// These are not.
    pub add: Vec<Element>,
}

impl Change {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.add.is_empty()
    }
}

/// Each change is made here first; what it returns brings the kernel's sets to the same state. It costs what changes,
/// not what is there.
impl Elements {
    /// The port that sends as `address`.
    pub fn port_of(&self, address: Ipv4Addr) -> Option<&Port> {
        self.ports.values().find(|port| port.address == address)
    }

    /// Lets a port send as `port` says and in no other way.
    pub fn set_port(&mut self, port: &Port) -> Change {
        let mut change = match self.ports.get(&port.tap) {
            Some(same) if same == port => return Change::default(),
            Some(_) => self.remove_port(&port.tap),
            None => Change::default(),
        };
        self.ports.insert(port.tap.clone(), port.clone());
        change.add.push(of_port(port));
        change
    }

    /// Takes a port out, and its guest out of every other set.
    pub fn remove_port(&mut self, tap: &str) -> Change {
        let mut change = Change::default();
        let Some(port) = self.ports.remove(tap) else {
            return change;
        };
        change.remove.push(of_port(&port));
        change
            .remove
            .extend(self.set_nat(port.address, false).remove);
        change
            .remove
            .extend(self.set_private(port.address, false).remove);
        let joined =
            |pair: &&(Ipv4Addr, Ipv4Addr)| pair.0 == port.address || pair.1 == port.address;
        let joins: Vec<_> = self.joins.iter().filter(joined).copied().collect();
        for (one, other) in joins {
            change
                .remove
                .extend(self.set_join(one, other, false).remove);
        }
        change
    }

    /// Lets a guest reach the internet, or not.
    pub fn set_nat(&mut self, address: Ipv4Addr, on: bool) -> Change {
        let changed = if on {
            self.nat_vms.insert(address)
        } else {
            self.nat_vms.remove(&address)
        };
        let elements = vec![of_address(Set::NatVms, address)];
        change(changed, on, elements)
    }

    /// Lets a guest with NAT reach private networks, or not.
    pub fn set_private(&mut self, address: Ipv4Addr, on: bool) -> Change {
        let changed = if on {
            self.private_vms.insert(address)
        } else {
            self.private_vms.remove(&address)
        };
        let elements = vec![of_address(Set::PrivateVms, address)];
        change(changed, on, elements)
    }

    /// Lets two guests reach each other, or not.
    pub fn set_join(&mut self, one: Ipv4Addr, other: Ipv4Addr, on: bool) -> Change {
        let pair = (one.min(other), one.max(other));
        let changed = if on {
            self.joins.insert(pair)
        } else {
            self.joins.remove(&pair)
        };
        let sets = [Set::Joins, Set::ArpJoins];
        let elements = sets.into_iter().flat_map(|set| of_pair(set, pair));
        change(changed, on, elements.collect())
    }

    /// Replaces the host's addresses.
    pub fn set_host_addresses(&mut self, addresses: &[Ipv4Addr]) -> Change {
        let wanted: BTreeSet<Ipv4Addr> = addresses.iter().copied().collect();
        let had = std::mem::replace(&mut self.host_addresses, wanted);
        let element = |address: &Ipv4Addr| of_address(Set::HostAddresses, *address);
        Change {
            remove: had.difference(&self.host_addresses).map(element).collect(),
            add: self.host_addresses.difference(&had).map(element).collect(),
        }
    }

    /// All elements of `set`.
    pub fn of(&self, set: Set) -> BTreeSet<Element> {
        let addresses = |addresses: &BTreeSet<Ipv4Addr>| {
            let elements = addresses.iter().map(|address| of_address(set, *address));
            elements.collect()
        };
        match set {
            Set::Ports => self.ports.values().map(of_port).collect(),
            Set::NatVms => addresses(&self.nat_vms),
            Set::PrivateVms => addresses(&self.private_vms),
            Set::HostAddresses => addresses(&self.host_addresses),
            Set::Joins | Set::ArpJoins => {
                let joins = self.joins.iter();
                joins.flat_map(|pair| of_pair(set, *pair)).collect()
            }
        }
    }

    /// As lines of an nft script.
    pub fn script(&self) -> String {
        let mut script = String::new();
        for port in self.ports.values() {
            let _ = writeln!(
                script,
                "add element bridge banger ports {{ \"{}\" . {} . {} }}",
                port.tap, port.mac, port.address
            );
        }
        for (set, addresses) in [
            ("nat_vms", &self.nat_vms),
            ("private_vms", &self.private_vms),
        ] {
            for address in addresses {
                let _ = writeln!(script, "add element inet banger {set} {{ {address} }}");
            }
        }
        for (one, other) in &self.joins {
            for family in ["inet", "bridge"] {
                let _ = writeln!(
                    script,
                    "add element {family} banger joins {{ {one} . {other}, {other} . {one} }}"
                );
            }
        }
        for address in &self.host_addresses {
            let _ = writeln!(
                script,
                "add element inet banger host_addresses {{ {address} }}"
            );
        }
        script
    }
}

fn change(changed: bool, on: bool, elements: Vec<Element>) -> Change {
    match (changed, on) {
        (false, _) => Change::default(),
        (true, true) => Change {
            remove: Vec::new(),
            add: elements,
        },
        (true, false) => Change {
            remove: elements,
            add: Vec::new(),
        },
    }
}

fn of_port(port: &Port) -> Element {
    let key = encode_port(port).to_vec();
    let set = Set::Ports;
    Element { set, key }
}

fn of_address(set: Set, address: Ipv4Addr) -> Element {
    let key = address.octets().to_vec();
    Element { set, key }
}

fn of_pair(set: Set, (one, other): (Ipv4Addr, Ipv4Addr)) -> [Element; 2] {
    [(one, other), (other, one)].map(|(from, to)| Element {
        set,
        key: [from.octets(), to.octets()].concat(),
    })
}

/// The address that a key of four bytes is.
pub fn decode_address(key: &[u8]) -> Option<Ipv4Addr> {
    Some(Ipv4Addr::from(<[u8; 4]>::try_from(key).ok()?))
}

/// The two addresses that a key of eight bytes is.
pub fn decode_pair(key: &[u8]) -> Option<(Ipv4Addr, Ipv4Addr)> {
    let (one, other) = key.split_at_checked(4)?;
    Some((decode_address(one)?, decode_address(other)?))
}

fn encode_port(port: &Port) -> [u8; KEY_BYTES] {
    let mut key = [0; KEY_BYTES];
    let name = port.tap.as_bytes();
    let length = name.len().min(NAME_BYTES - 1);
    key[..length].copy_from_slice(&name[..length]);
    key[16..22].copy_from_slice(&port.mac.0);
    key[24..].copy_from_slice(&port.address.octets());
    key
}

/// The port that a key of [`Set::Ports`] is.
pub fn decode_port(key: &[u8]) -> Option<Port> {
    let key: &[u8; KEY_BYTES] = key.try_into().ok()?;
    let end = key[..NAME_BYTES].iter().position(|&byte| byte == 0)?;
    let tap = std::str::from_utf8(&key[..end]).ok()?.to_owned();
    let mac = MacAddress(key[16..22].try_into().ok()?);
    let address = decode_address(&key[24..])?;
    Some(Port { tap, mac, address })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port() -> Port {
        Port {
            tap: "bt0123456789ab".to_owned(),
            mac: MacAddress([6, 1, 2, 3, 4, 5]),
            address: Ipv4Addr::new(172, 16, 0, 2),
        }
    }

    fn elements() -> Elements {
        let (one, other) = (port().address, Ipv4Addr::new(172, 16, 0, 3));
        Elements {
            ports: BTreeMap::from([(port().tap, port())]),
            nat_vms: BTreeSet::from([one]),
            private_vms: BTreeSet::from([one]),
            joins: BTreeSet::from([(one, other)]),
            host_addresses: BTreeSet::from([Ipv4Addr::new(8, 8, 8, 8)]),
        }
    }

    #[test]
    fn an_element_is_name_mac_and_address_each_at_its_place() {
        let key = encode_port(&port());
        assert_eq!(&key[..16], b"bt0123456789ab\0\0");
        assert_eq!(&key[16..24], [6, 1, 2, 3, 4, 5, 0, 0]);
        assert_eq!(&key[24..], [172, 16, 0, 2]);
        assert_eq!(decode_port(&key), Some(port()));
        assert_eq!(decode_port(&key[..27]), None);
        assert_eq!(decode_port(&[b'x'; KEY_BYTES]), None);
    }

    #[test]
    fn a_change_is_what_differs_and_nothing_else() {
        let mut elements = elements();
        let other = Ipv4Addr::new(172, 16, 0, 9);
        let element = of_address(Set::NatVms, other);
        let added = elements.set_nat(other, true).add;
        assert_eq!(added, [element]);
        assert!(elements.set_nat(other, true).is_empty());
        assert_eq!(elements.set_nat(other, false).remove, added);
        assert!(elements.set_nat(other, false).is_empty());
        assert!(elements.set_port(&port()).is_empty());
        let addresses = [Ipv4Addr::new(9, 9, 9, 9)];
        let change = elements.set_host_addresses(&addresses);
        assert_eq!((change.remove.len(), change.add.len()), (1, 1));
        assert!(elements.set_host_addresses(&addresses).is_empty());
    }

    #[test]
    fn a_port_that_goes_takes_its_guest_out_of_every_set() {
        let mut elements = elements();
        let change = elements.remove_port(&port().tap);
        assert_eq!((change.remove.len(), change.add.len()), (7, 0));
        for set in [
            Set::Ports,
            Set::NatVms,
            Set::PrivateVms,
            Set::Joins,
            Set::ArpJoins,
        ] {
            assert!(elements.of(set).is_empty(), "{set:?}");
        }
        assert!(elements.remove_port(&port().tap).is_empty());
    }

    #[test]
    fn a_port_with_another_address_loses_what_the_old_one_had() {
        let mut elements = elements();
        let mut moved = port();
        moved.address = Ipv4Addr::new(172, 16, 0, 9);
        let change = elements.set_port(&moved);
        assert_eq!(
            (change.remove.len(), change.add),
            (7, vec![of_port(&moved)])
        );
        assert_eq!(elements.port_of(moved.address), Some(&moved));
        assert_eq!(elements.port_of(port().address), None);
    }

    #[test]
    fn a_join_is_in_both_orders_and_both_tables() {
        let elements = elements();
        for set in [Set::Joins, Set::ArpJoins] {
            let pairs: Vec<_> = elements
                .of(set)
                .iter()
                .filter_map(|element| decode_pair(&element.key))
                .collect();
            let (one, other) = (port().address, Ipv4Addr::new(172, 16, 0, 3));
            assert_eq!(pairs, [(one, other), (other, one)]);
        }
    }

    #[test]
    fn the_script_holds_every_element() {
        assert_eq!(
            elements().script(),
            "add element bridge banger ports { \"bt0123456789ab\" . 06:01:02:03:04:05 . 172.16.0.2 }\n\
             add element inet banger nat_vms { 172.16.0.2 }\n\
             add element inet banger private_vms { 172.16.0.2 }\n\
             add element inet banger joins { 172.16.0.2 . 172.16.0.3, 172.16.0.3 . 172.16.0.2 }\n\
             add element bridge banger joins { 172.16.0.2 . 172.16.0.3, 172.16.0.3 . 172.16.0.2 }\n\
             add element inet banger host_addresses { 8.8.8.8 }\n"
        );
    }
}
