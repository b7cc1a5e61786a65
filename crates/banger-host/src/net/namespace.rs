//! The operations inside the instance's network namespace, done by `banger-netns`.

use super::connect::{self, ConnectError};
use super::links::{Address, Link, Links, NetlinkError, Route, TABLE_MAIN};
use super::nft::{Fingerprint, NftError, Rules};
use super::tap::{self, TapError};
use crate::op::{BRIDGE, NamespaceAnswer, NamespaceOp, Port, PortState, UPLINK};
use banger_core::addr::{Ipv4Net, Pool};
use banger_core::id::MacAddress;
use rustix::fd::OwnedFd;
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

const TAP_PREFIX: &str = "bt";
/// Fixed, so that ports that come and go do not change it under the guests.
const BRIDGE_MAC: MacAddress = MacAddress([0x02, 0x62, 0x61, 0x6e, 0x67, 0x72]);
/// What each sysctl must be, and whether it may be missing (IPv6 or bridge filtering not in the kernel).
const SYSCTLS: [(&str, &str, Missing); 8] = [
    ("ipv6/conf/all/disable_ipv6", "1", Missing::IsFine),
    ("ipv6/conf/default/disable_ipv6", "1", Missing::IsFine),
    ("ipv4/ip_forward", "1", Missing::IsAnError),
    ("ipv4/conf/all/accept_redirects", "0", Missing::IsAnError),
    ("ipv4/conf/all/send_redirects", "0", Missing::IsAnError),
    // A guest learns only the address that it may ask for.
    ("ipv4/conf/all/arp_ignore", "1", Missing::IsAnError),
    ("bridge/bridge-nf-call-iptables", "0", Missing::IsFine),
    ("bridge/bridge-nf-call-arptables", "0", Missing::IsFine),
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
        address: std::net::Ipv4Addr,
        /// The guests' network.
        network: Ipv4Net,
    },
    /// This keeper does not know how.
    #[error("`{0}` is not available yet")]
    NotAvailable(&'static str),
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
    base: Mutex<Option<Base>>,
}

/// The base as it was when it was whole.
#[derive(Debug, Clone, Copy)]
struct Base {
    pool: Pool,
    rules: Fingerprint,
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
        _descriptors: Vec<OwnedFd>,
    ) -> Result<(NamespaceAnswer, Vec<OwnedFd>), NamespaceError> {
        if let NamespaceOp::Connect {
            address,
            port,
            timeout_ms,
        } = op
        {
            let timeout = std::time::Duration::from_millis((*timeout_ms).into());
            let socket = connect::connect(SocketAddrV4::new(*address, *port), timeout)?;
            return Ok((NamespaceAnswer::Done, vec![socket]));
        }
        // What a thread that panicked left is found out by measuring.
        let mut base = self.base.lock().unwrap_or_else(PoisonError::into_inner);
        let mut network = Network {
            links: Links::new(),
            rules: Rules::new(),
        };
        match op {
            NamespaceOp::EnsureBase { pool } => network.ensure_base(&mut base, *pool)?,
            NamespaceOp::EnsureUplink { pool } => network.ensure_uplink(*pool)?,
            NamespaceOp::EnsurePort(port) => network.ensure_port(&mut base, port)?,
            NamespaceOp::RemovePort { tap } => network.remove_port(tap)?,
            NamespaceOp::ListPorts => {
                let ports = network.list_ports()?;
                return Ok((NamespaceAnswer::Ports { ports }, Vec::new()));
            }
            NamespaceOp::EnsureWayOut
            | NamespaceOp::SetNat { .. }
            | NamespaceOp::ListNat
            | NamespaceOp::SetJoin { .. }
            | NamespaceOp::ListJoins
            | NamespaceOp::SetHostAddresses { .. }
            | NamespaceOp::DnsSockets
            | NamespaceOp::Publish(_)
            | NamespaceOp::Unpublish { .. }
            | NamespaceOp::ListPublished
            | NamespaceOp::Counters => return Err(NamespaceError::NotAvailable(op.name())),
            NamespaceOp::Hello
            | NamespaceOp::Keepalive
            | NamespaceOp::Namespaces
            | NamespaceOp::Connect { .. } => return Err(NamespaceError::NotMine(op.name())),
        }
        Ok((NamespaceAnswer::Done, Vec::new()))
    }
}

/// The sockets of one operation.
struct Network {
    links: Links,
    rules: Rules,
}

impl Network {
    fn ensure_base(&mut self, base: &mut Option<Base>, pool: Pool) -> Result<(), NamespaceError> {
        set_sysctls()?;
        // The rules first: nothing is up without them.
        self.ensure_rules(base, pool)?;
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
        self.links.ensure_address(Address {
            link: bridge.index,
            address: pool.gateway(),
            prefix: pool.guests().prefix(),
        })?;
        if !bridge.up {
            self.links.set_up(bridge.index, true)?;
        }
        Ok(())
    }

    fn ensure_rules(&mut self, base: &mut Option<Base>, pool: Pool) -> Result<(), NamespaceError> {
        if let Some(base) = base
            && base.pool == pool
            && self.rules.fingerprint()? == base.rules
        {
            return Ok(());
        }
        *base = None;
        self.rules.load(pool.host())?;
        *base = Some(Base {
            pool,
            rules: self.rules.fingerprint()?,
        });
        Ok(())
    }

    fn ensure_uplink(&mut self, pool: Pool) -> Result<(), NamespaceError> {
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
        Ok(self.links.ensure_route(&Route {
            table: TABLE_MAIN,
            destination: Ipv4Net::new(pool.host(), 32),
            link: Some(uplink.index),
            gateway: None,
            source: Some(pool.uplink()),
        })?)
    }

    fn ensure_port(&mut self, base: &mut Option<Base>, port: &Port) -> Result<(), NamespaceError> {
        if !is_tap_name(&port.tap) {
            return Err(NamespaceError::BadTapName(port.tap.clone()));
        }
        let pool = base.as_ref().ok_or(NamespaceError::NoBase)?.pool;
        let network = pool.guests();
        if !network.contains(port.address) || port.address == pool.gateway() {
            return Err(NamespaceError::BadAddress {
                address: port.address,
                network,
            });
        }
        let bridge = self.links.find(BRIDGE)?.ok_or(NamespaceError::NoBase)?;
        self.ensure_rules(base, pool)?;
        let tap = match self.links.find(&port.tap)? {
            Some(link) => of_kind(link, "tun")?,
            None => {
                tap::create(&port.tap, rustix::process::geteuid().as_raw())?;
                let made = self.links.find(&port.tap)?;
                made.ok_or_else(|| NamespaceError::BadTapName(port.tap.clone()))?
            }
        };
        let allowed = self.rules.ports()?;
        let stale: Vec<Port> = allowed
            .iter()
            .filter(|other| other.tap == port.tap && *other != port)
            .cloned()
            .collect();
        if !stale.is_empty() || !allowed.contains(port) {
            self.rules
                .change_ports(&stale, std::slice::from_ref(port))?;
        }
        for stale in stale.iter().filter(|stale| stale.address != port.address) {
            self.links.remove_neighbour(bridge.index, stale.address)?;
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
        Ok(())
    }

    /// The link goes before its elements, and every part is tried whatever became of the others.
    fn remove_port(&mut self, tap: &str) -> Result<(), NamespaceError> {
        if !is_tap_name(tap) {
            return Err(NamespaceError::BadTapName(tap.to_owned()));
        }
        let link = self.links.delete(tap);
        let elements = self.rules.ports().and_then(|allowed| {
            let stale: Vec<Port> = allowed.into_iter().filter(|port| port.tap == tap).collect();
            self.rules.change_ports(&stale, &[])
        });
        let neighbours = self.sweep_neighbours();
        link?;
        elements?;
        neighbours
    }

    /// Removes the neighbours that no element names any more.
    fn sweep_neighbours(&mut self) -> Result<(), NamespaceError> {
        let Some(bridge) = self.links.find(BRIDGE)? else {
            return Ok(());
        };
        let allowed = self.rules.ports()?;
        for (address, mac) in self.links.permanent_neighbours(bridge.index)? {
            if !allowed
                .iter()
                .any(|port| port.address == address && port.mac == mac)
            {
                self.links.remove_neighbour(bridge.index, address)?;
            }
        }
        Ok(())
    }

    fn list_ports(&mut self) -> Result<Vec<PortState>, NamespaceError> {
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
        for port in self.rules.ports()? {
            ports
                .entry(port.tap.clone())
                .or_insert_with(|| state(port.tap))
                .allowed = Some((port.mac, port.address));
        }
        Ok(ports.into_values().collect())
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

fn set_sysctls() -> Result<(), NamespaceError> {
    for (name, value, missing) in SYSCTLS {
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
