//! The operations inside the instance's network namespace, done by `banger-netns`.

use super::connect::{self, ConnectError};
use super::dns_sockets::{self, DnsSocketError};
use super::links::{Address, Link, Links, NetlinkError, Route, TABLE_MAIN};
use super::nft::elements::{Set, decode_address, decode_pair, decode_port};
use super::nft::{NftError, Rules, Shape};
use super::publish::{Publications, PublishError};
use super::ruleset::Ruleset;
use super::tap::{self, TapError};
use super::watch::Watch;
use super::{conntrack, routing};
use crate::op::{BRIDGE, NamespaceAnswer, NamespaceOp, Port, PortState, Publication, UPLINK};
use banger_core::addr::{Ipv4Net, Pool};
use banger_core::id::MacAddress;
use rustix::fd::OwnedFd;
use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const TAP_PREFIX: &str = "bt";
/// Fixed, so that ports that come and go do not change it under the guests.
const BRIDGE_MAC: MacAddress = MacAddress([0x02, 0x62, 0x61, 0x6e, 0x67, 0x72]);
/// How soon a repair that failed is tried again.
const REPAIR_AGAIN: Duration = Duration::from_secs(1);
/// The least time between two repairs, so that somebody who flushes without end does not take the machine.
const REPAIR_PAUSE: Duration = Duration::from_millis(50);
/// What each sysctl must be, and whether it may be missing (IPv6 or bridge filtering not in the kernel).
const SYSCTLS: [(&str, &str, Missing); 9] = [
    ("ipv6/conf/all/disable_ipv6", "1", Missing::IsFine),
    ("ipv6/conf/default/disable_ipv6", "1", Missing::IsFine),
    ("ipv4/ip_forward", "1", Missing::IsAnError),
    ("ipv4/conf/all/accept_redirects", "0", Missing::IsAnError),
    ("ipv4/conf/all/send_redirects", "0", Missing::IsAnError),
    ("ipv4/conf/default/send_redirects", "0", Missing::IsAnError),
    // A guest learns only the address that it may ask for.
    ("ipv4/conf/all/arp_ignore", "1", Missing::IsAnError),
    ("bridge/bridge-nf-call-iptables", "0", Missing::IsFine),
    ("bridge/bridge-nf-call-arptables", "0", Missing::IsFine),
];
/// The same for the bridge, once it is there: it answers, at once, for a guest that is joined to the one that asks.
const BRIDGE_SYSCTLS: [(&str, &str, Missing); 3] = [
    ("ipv4/conf/br0/proxy_arp_pvlan", "1", Missing::IsAnError),
    ("ipv4/neigh/br0/proxy_delay", "0", Missing::IsAnError),
    ("ipv4/conf/br0/send_redirects", "0", Missing::IsAnError),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    IsFine,
    IsAnError,
}

/// What an operation in the namespace could not do.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// The kernel refused a request about the network.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The packet filter's rules could not be loaded.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// The TAP could not be made.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The guest could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The sockets for the DNS server could not be made.
    #[error(transparent)]
    DnsSocket(#[from] DnsSocketError),
    /// The port could not be published.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// A kernel setting could not be made.
    #[error("cannot set `{}`", path.display())]
    Sysctl {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Ports need the base first.
    #[error("the namespace has no bridge and no rules yet")]
    NoBase,
    /// The veth has not been attached.
    #[error("the namespace has no link `{UPLINK}`: the host's veth is not attached")]
    NoUplink,
    /// Something made by nobody of us has the name.
    #[error("link `{name}` is a {kind}, not a {wanted}")]
    WrongKind {
        /// Its name.
        name: String,
        /// What it is.
        kind: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// Not the name of one of our TAPs.
    #[error("`{}` is not the name of a VM's TAP", .0.escape_debug())]
    BadTapName(String),
    /// A guest must not have this address.
    #[error("{address} is not a guest's address of {network}")]
    BadAddress {
        /// The address.
        address: Ipv4Addr,
        /// The guests' network.
        network: Ipv4Net,
    },
    /// No port sends as this address.
    #[error("no running VM has the address {0}")]
    NoSuchGuest(Ipv4Addr),
    /// A guest reaches itself anyway.
    #[error("{0} cannot be joined to itself")]
    JoinedToItself(Ipv4Addr),
    /// A publication leads to a guest that is not behind its TAP.
    #[error("`{}` is not the TAP of a running VM with the address {address}", tap.escape_debug())]
    NotItsGuest {
        /// The TAP.
        tap: String,
        /// The address.
        address: Ipv4Addr,
    },
    /// Something that the caller of [`Namespace::perform`] answers itself.
    #[error("`{0}` is not an operation on the network")]
    NotMine(&'static str),
}

/// Whether `name` is `bt` and twelve hexadecimal digits.
pub fn is_tap_name(name: &str) -> bool {
    name.strip_prefix(TAP_PREFIX).is_some_and(|digits| {
        digits.len() == 12
            && digits
                .bytes()
                .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// The network namespace of this process, with what has been set up in it.
#[derive(Debug, Default)]
pub struct Namespace {
    ruleset: Mutex<Ruleset>,
    publications: Publications,
}

impl Namespace {
    /// The namespace that the calling thread, and every thread that will call [`Namespace::perform`], is in.
    pub fn new() -> Self {
        Self::default()
    }

    /// Does `op`, with the descriptors that came with it. Operations take turns, but for [`NamespaceOp::Connect`].
    ///
    /// # Errors
    /// The kernel refuses, or the operation makes no sense here; each `Ensure…` can be tried again.
    pub fn perform(
        &self,
        op: &NamespaceOp,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(NamespaceAnswer, Vec<OwnedFd>), NamespaceError> {
        if let NamespaceOp::Connect {
            address,
            port,
            timeout_ms,
        } = op
        {
            let timeout = Duration::from_millis((*timeout_ms).into());
            let socket = connect::connect(SocketAddrV4::new(*address, *port), timeout)?;
            return Ok((NamespaceAnswer::Done, vec![socket]));
        }
        let mut network = Network {
            links: Links::new(),
            rules: Rules::new(),
            ruleset: self.ruleset(),
            publications: &self.publications,
        };
        let answer = match op {
            NamespaceOp::EnsureBase { pool } => network.ensure_base(*pool)?,
            NamespaceOp::EnsureUplink { pool } => network.ensure_uplink(*pool)?,
            NamespaceOp::EnsureWayOut => network.ensure_way_out()?,
            NamespaceOp::EnsurePort(port) => network.ensure_port(port)?,
            NamespaceOp::RemovePort { tap } => network.remove_port(tap)?,
            NamespaceOp::ListPorts => network.list_ports()?,
            NamespaceOp::ListLinks => network.list_links()?,
            NamespaceOp::SetNat { address, on } => network.set_nat(*address, *on)?,
            NamespaceOp::ListNat => network.list_guests(Set::NatVms)?,
            NamespaceOp::SetPrivate { address, on } => network.set_private(*address, *on)?,
            NamespaceOp::ListPrivate => network.list_guests(Set::PrivateVms)?,
            NamespaceOp::SetJoin { one, other, on } => network.set_join(*one, *other, *on)?,
            NamespaceOp::ListJoins => network.list_joins()?,
            NamespaceOp::SetHostAddresses { addresses } => network.set_host_addresses(addresses)?,
            NamespaceOp::DnsSockets => return network.dns_sockets(),
            NamespaceOp::Counters => NamespaceAnswer::Counters {
                dropped: network.rules.counters()?,
                repairs: network.ruleset.repairs(),
            },
            NamespaceOp::Publish(publication) => network.publish(publication, descriptors)?,
            NamespaceOp::Unpublish { protocol, listen } => {
                self.publications.unpublish(*protocol, *listen);
                NamespaceAnswer::Done
            }
            NamespaceOp::ListPublished => NamespaceAnswer::Published {
                publications: self.publications.list(),
            },
            NamespaceOp::Hello
            | NamespaceOp::Keepalive
            | NamespaceOp::Namespaces
            | NamespaceOp::Connect { .. } => return Err(NamespaceError::NotMine(op.name())),
        };
        Ok((answer, Vec::new()))
    }

    fn ruleset(&self) -> MutexGuard<'_, Ruleset> {
        // What a thread that panicked left is found out by measuring.
        self.ruleset.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Loads the ruleset again if somebody else has changed or flushed it, now and whenever that happens, as long as
    /// the process lives.
    ///
    /// # Errors
    /// The kernel does not tell of changes.
    pub fn keep_whole(&self) -> io::Result<()> {
        let watch = Watch::open()?;
        // What happened before nobody has told.
        let mut again = Some(Duration::ZERO);
        loop {
            watch.wait(again, None)?;
            let repaired = self.ruleset().repair(&mut Rules::new());
            again = repaired.is_err().then_some(REPAIR_AGAIN);
            if matches!(repaired, Ok(true)) {
                std::thread::sleep(REPAIR_PAUSE);
            }
        }
    }
}

/// The sockets of one operation.
struct Network<'a> {
    links: Links,
    rules: Rules,
    ruleset: MutexGuard<'a, Ruleset>,
    publications: &'a Publications,
}

impl Network<'_> {
    fn ensure_base(&mut self, pool: Pool) -> Result<NamespaceAnswer, NamespaceError> {
        set_sysctls(&SYSCTLS)?;
        // Closed first: nothing is up without.
        routing::ensure_closed()?;
        let masquerade = self.ruleset.shape().is_some_and(|shape| shape.masquerade);
        self.ruleset
            .ensure(&mut self.rules, Shape { pool, masquerade })?;
        if let Some(loopback) = self.links.find("lo")?
            && !loopback.up
        {
            self.links.set_up(loopback.index, true)?;
        }
        let bridge = match self.links.find(BRIDGE)? {
            Some(link) => of_kind(link, "bridge")?,
            None => {
                self.links.create_bridge(BRIDGE, BRIDGE_MAC)?;
                self.links.find(BRIDGE)?.ok_or(NamespaceError::NoBase)?
            }
        };
        set_sysctls(&BRIDGE_SYSCTLS)?;
        self.links.ensure_address(Address {
            link: bridge.index,
            address: pool.gateway(),
            prefix: pool.guests().prefix(),
        })?;
        if !bridge.up {
            self.links.set_up(bridge.index, true)?;
        }
        Ok(NamespaceAnswer::Done)
    }

    fn ensure_uplink(&mut self, pool: Pool) -> Result<NamespaceAnswer, NamespaceError> {
        let link = self.links.find(UPLINK)?.ok_or(NamespaceError::NoUplink)?;
        let uplink = of_kind(link, "veth")?;
        self.links.ensure_address(Address {
            link: uplink.index,
            address: pool.uplink(),
            prefix: 32,
        })?;
        if !uplink.up {
            self.links.set_up(uplink.index, true)?;
        }
        let route = |network, gateway| Route {
            table: TABLE_MAIN,
            destination: network,
            link: Some(uplink.index),
            gateway,
            source: Some(pool.uplink()),
        };
        self.links
            .ensure_route(&route(Ipv4Net::new(pool.host(), 32), None))?;
        let everywhere = Ipv4Net::new(Ipv4Addr::UNSPECIFIED, 0);
        self.links
            .ensure_route(&route(everywhere, Some(pool.host())))?;
        Ok(NamespaceAnswer::Done)
    }

    fn ensure_way_out(&mut self) -> Result<NamespaceAnswer, NamespaceError> {
        let shape = self.ruleset.shape().ok_or(NamespaceError::NoBase)?;
        let Some(link) = self.links.find(UPLINK)? else {
            return Ok(NamespaceAnswer::WayOut { ready: false });
        };
        let uplink = of_kind(link, "tun")?;
        let routed = self
            .links
            .routes()?
            .iter()
            .any(|route| route.destination.prefix() == 0 && route.link == Some(uplink.index));
        let ready = uplink.up && routed;
        if ready {
            let masquerade = true;
            self.ruleset.ensure(
                &mut self.rules,
                Shape {
                    masquerade,
                    ..shape
                },
            )?;
        }
        Ok(NamespaceAnswer::WayOut { ready })
    }

    fn list_links(&mut self) -> Result<NamespaceAnswer, NamespaceError> {
        let shared = [BRIDGE, UPLINK];
        let links = self.links.dump()?.into_iter();
        let mut links: Vec<String> = links
            .filter(|link| link.up && shared.contains(&link.name.as_str()))
            .map(|link| link.name)
            .collect();
        links.sort_unstable();
        Ok(NamespaceAnswer::Links { links })
    }

    fn ensure_port(&mut self, port: &Port) -> Result<NamespaceAnswer, NamespaceError> {
        if !is_tap_name(&port.tap) {
            return Err(NamespaceError::BadTapName(port.tap.clone()));
        }
        let pool = self.ruleset.shape().ok_or(NamespaceError::NoBase)?.pool;
        let network = pool.guests();
        if !network.contains(port.address) || port.address == pool.gateway() {
            return Err(NamespaceError::BadAddress {
                address: port.address,
                network,
            });
        }
        let bridge = self.links.find(BRIDGE)?.ok_or(NamespaceError::NoBase)?;
        let tap = match self.links.find(&port.tap)? {
            Some(link) => of_kind(link, "tun")?,
            None => {
                tap::create(&port.tap, rustix::process::geteuid().as_raw())?;
                let made = self.links.find(&port.tap)?;
                made.ok_or_else(|| NamespaceError::BadTapName(port.tap.clone()))?
            }
        };
        let before = self.ruleset.elements().ports.get(&port.tap).cloned();
        self.ruleset
            .change(&mut self.rules, |elements| elements.set_port(port))?;
        if let Some(before) = before.filter(|before| before.address != port.address) {
            self.publications.end_of(&port.tap);
            self.links.remove_neighbour(bridge.index, before.address)?;
        }
        if tap.master != Some(bridge.index) {
            self.links.set_master(tap.index, bridge.index)?;
        }
        self.links.close_port(tap.index)?;
        self.links.set_port_mac(tap.index, port.mac)?;
        // Nobody has to be asked, so the first packet goes out at once.
        self.links
            .set_neighbour(bridge.index, port.address, port.mac)?;
        if !tap.up {
            self.links.set_up(tap.index, true)?;
        }
        Ok(NamespaceAnswer::Done)
    }

    /// The link goes before its elements, and every part is tried whatever became of the others.
    fn remove_port(&mut self, tap: &str) -> Result<NamespaceAnswer, NamespaceError> {
        if !is_tap_name(tap) {
            return Err(NamespaceError::BadTapName(tap.to_owned()));
        }
        self.publications.end_of(tap);
        let link = self.links.delete(tap);
        let port = self.ruleset.elements().ports.get(tap).cloned();
        let elements = self
            .ruleset
            .change(&mut self.rules, |elements| elements.remove_port(tap));
        if let Some(port) = port {
            forget_connections(|from, to| from == port.address || to == port.address);
        }
        let neighbours = self.sweep_neighbours();
        link?;
        elements?;
        neighbours?;
        Ok(NamespaceAnswer::Done)
    }

    fn set_nat(&mut self, address: Ipv4Addr, on: bool) -> Result<NamespaceAnswer, NamespaceError> {
        if on {
            self.require_guest(address)?;
        }
        let changed = self
            .ruleset
            .change(&mut self.rules, |elements| elements.set_nat(address, on));
        if on && changed.is_err() {
            // Not a wish for later: the caller hears that it failed.
            let _ = self
                .ruleset
                .change(&mut self.rules, |elements| elements.set_nat(address, false));
        }
        if !on && let Some(shape) = self.ruleset.shape() {
            let inside = shape.pool.network();
            forget_connections(|from, to| from == address && !inside.contains(to));
        }
        changed?;
        Ok(NamespaceAnswer::Done)
    }

    fn set_private(
        &mut self,
        address: Ipv4Addr,
        on: bool,
    ) -> Result<NamespaceAnswer, NamespaceError> {
        if on {
            self.require_guest(address)?;
        }
        let changed = self.ruleset.change(&mut self.rules, |elements| {
            elements.set_private(address, on)
        });
        if on && changed.is_err() {
            let _ = self.ruleset.change(&mut self.rules, |elements| {
                elements.set_private(address, false)
            });
        }
        if !on && let Some(shape) = self.ruleset.shape() {
            let inside = shape.pool.network();
            // Those to the public internet, to other guests and to the name server stay.
            let is_shared = |to: Ipv4Addr| to.octets()[0] == 100 && to.octets()[1] & 0xc0 == 64;
            let is_private = |to: Ipv4Addr| to.is_private() || is_shared(to);
            forget_connections(|from, to| {
                from == address && is_private(to) && !inside.contains(to)
            });
        }
        changed?;
        Ok(NamespaceAnswer::Done)
    }

    fn set_join(
        &mut self,
        one: Ipv4Addr,
        other: Ipv4Addr,
        on: bool,
    ) -> Result<NamespaceAnswer, NamespaceError> {
        if one == other {
            return Err(NamespaceError::JoinedToItself(one));
        }
        if on {
            self.require_guest(one)?;
            self.require_guest(other)?;
        }
        let changed = self.ruleset.change(&mut self.rules, |elements| {
            elements.set_join(one, other, on)
        });
        if on && changed.is_err() {
            let _ = self.ruleset.change(&mut self.rules, |elements| {
                elements.set_join(one, other, false)
            });
        }
        if !on {
            forget_connections(|from, to| (from, to) == (one, other) || (from, to) == (other, one));
        }
        changed?;
        Ok(NamespaceAnswer::Done)
    }

    fn require_guest(&self, address: Ipv4Addr) -> Result<(), NamespaceError> {
        match self.ruleset.elements().port_of(address) {
            Some(_) => Ok(()),
            None => Err(NamespaceError::NoSuchGuest(address)),
        }
    }

    fn set_host_addresses(
        &mut self,
        addresses: &[Ipv4Addr],
    ) -> Result<NamespaceAnswer, NamespaceError> {
        self.ruleset.change(&mut self.rules, |elements| {
            elements.set_host_addresses(addresses)
        })?;
        Ok(NamespaceAnswer::Done)
    }

    fn list_guests(&mut self, set: Set) -> Result<NamespaceAnswer, NamespaceError> {
        let keys = self.rules.keys(set)?;
        let addresses = keys.iter().filter_map(|key| decode_address(key)).collect();
        Ok(NamespaceAnswer::Nat { addresses })
    }

    fn list_joins(&mut self) -> Result<NamespaceAnswer, NamespaceError> {
        let keys = self.rules.keys(Set::Joins)?;
        let pairs = keys.iter().filter_map(|key| decode_pair(key));
        let joins = pairs.filter(|(one, other)| one < other).collect();
        Ok(NamespaceAnswer::Joins { joins })
    }

    fn publish(
        &mut self,
        publication: &Publication,
        descriptors: Vec<OwnedFd>,
    ) -> Result<NamespaceAnswer, NamespaceError> {
        let (tap, address) = (&publication.tap, *publication.guest.ip());
        let port = self.ruleset.elements().ports.get(tap);
        if port.is_none_or(|port| port.address != address) {
            let tap = tap.clone();
            return Err(NamespaceError::NotItsGuest { tap, address });
        }
        self.publications.publish(publication, descriptors)?;
        Ok(NamespaceAnswer::Done)
    }

    fn dns_sockets(mut self) -> Result<(NamespaceAnswer, Vec<OwnedFd>), NamespaceError> {
        let pool = self.ruleset.shape().ok_or(NamespaceError::NoBase)?.pool;
        let uplink = self.links.find(UPLINK)?;
        let host = uplink.is_some_and(|uplink| uplink.kind.as_deref() == Some("veth"));
        // It may have to wait, and nobody else has to wait for that.
        drop(self.ruleset);
        let sockets = dns_sockets::open(pool, host)?;
        Ok((NamespaceAnswer::DnsSockets { host }, sockets))
    }

    /// Removes the neighbours that no element names any more.
    fn sweep_neighbours(&mut self) -> Result<(), NamespaceError> {
        let Some(bridge) = self.links.find(BRIDGE)? else {
            return Ok(());
        };
        for (address, mac) in self.links.permanent_neighbours(bridge.index)? {
            let port = self.ruleset.elements().port_of(address);
            if port.is_none_or(|port| port.mac != mac) {
                self.links.remove_neighbour(bridge.index, address)?;
            }
        }
        Ok(())
    }

    fn list_ports(&mut self) -> Result<NamespaceAnswer, NamespaceError> {
        let mut ports = BTreeMap::new();
        let state = |tap: String| PortState {
            tap,
            link: false,
            allowed: None,
        };
        for link in self.links.dump()? {
            if link.name.starts_with(TAP_PREFIX) {
                ports
                    .entry(link.name.clone())
                    .or_insert_with(|| state(link.name))
                    .link = true;
            }
        }
        let allowed = self.rules.keys(Set::Ports)?;
        for port in allowed.iter().filter_map(|key| decode_port(key)) {
            ports
                .entry(port.tap.clone())
                .or_insert_with(|| state(port.tap))
                .allowed = Some((port.mac, port.address));
        }
        let ports = ports.into_values().collect();
        Ok(NamespaceAnswer::Ports { ports })
    }
}

fn of_kind(link: Link, wanted: &'static str) -> Result<Link, NamespaceError> {
    if link.kind.as_deref() == Some(wanted) {
        return Ok(link);
    }
    Err(NamespaceError::WrongKind {
        name: link.name,
        kind: link.kind.unwrap_or_else(|| "device".to_owned()),
        wanted,
    })
}

/// Drops the connections that `matches`. The rules let nothing of them pass any more, so one that cannot be dropped is
/// only a line in the kernel's table until its time is over.
fn forget_connections(matches: impl Fn(Ipv4Addr, Ipv4Addr) -> bool) {
    if let Err(error) = conntrack::drop_matching(matches) {
        tracing::warn!(error = crate::error_chain(&error), "connections are left");
    }
}

fn set_sysctls(settings: &[(&str, &str, Missing)]) -> Result<(), NamespaceError> {
    for &(name, value, missing) in settings {
        let path = Path::new("/proc/sys/net").join(name);
        match set_sysctl(&path, value) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound && missing == Missing::IsFine => {
            }
            Err(source) => return Err(NamespaceError::Sysctl { path, source }),
        }
    }
    Ok(())
}

/// Writes a kernel setting if it has another value.
pub(crate) fn set_sysctl(path: &Path, value: &str) -> io::Result<()> {
    if std::fs::read_to_string(path)?.trim() == value {
        return Ok(());
    }
    std::fs::write(path, value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bt_and_twelve_hexadecimal_digits_name_a_tap() {
        assert!(is_tap_name("bt0123456789ab"));
        for name in [
            "",
            "bt",
            "bt0123456789a",
            "bt0123456789abc",
            "bt0123456789aB",
            "bv0123456789ab",
            "bt0123456789a;",
        ] {
            assert!(!is_tap_name(name), "{name}");
        }
    }
}
