//! Links, addresses, routes and neighbours of the network namespace that the calling thread is in, by netlink.

use banger_core::addr::Ipv4Net;
use banger_core::id::MacAddress;
use linux_raw_sys::net::{AF_BRIDGE, AF_INET};
use netlink_bindings::traits::{NetlinkRequest, Pusher};
use netlink_bindings::utils::{finalize_nested_header, push_header, push_nested_header};
use netlink_bindings::{rt_addr, rt_link, rt_neigh, rt_route};
use netlink_socket2::{NetlinkSocket, ReplyError};
use rustix::fd::{AsRawFd, BorrowedFd};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

const IFF_UP: u32 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_IFNAME: u16 = 3;
const IFLA_NET_NS_FD: u16 = 28;
const VETH_INFO_PEER: u16 = 1;
const NUD_INCOMPLETE: u16 = 0x01;
const NUD_FAILED: u16 = 0x20;
const NUD_NOARP: u16 = 0x40;
const NUD_PERMANENT: u16 = 0x80;
const NTF_MASTER: u8 = 0x04;
const RTN_UNICAST: u8 = 1;
const RTNH_F_ONLINK: u32 = 4;
const RTPROT_BOOT: u8 = 3;
const RT_SCOPE_LINK: u8 = 253;
/// The bits of a network that is a half of everything. Some VPNs divide their route to everywhere so, and no network
/// of one's own is as large.
pub const HALF: u8 = 1;
/// The main routing table.
pub const TABLE_MAIN: u32 = 254;
/// The table of the host's own addresses.
pub const TABLE_LOCAL: u32 = 255;

/// The kernel refused a request about the network.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}")]
pub struct NetlinkError {
    what: String,
    #[source]
    source: io::Error,
}

impl NetlinkError {
    pub(crate) fn new(what: impl Into<String>) -> impl FnOnce(ReplyError) -> Self {
        let mut what = what.into();
        move |reply| {
            if let Some(words) = reply.ext_ack().and_then(|ack| ack.get_msg().ok()) {
                let _ = write!(what, " ({})", words.to_string_lossy().escape_debug());
            }
            let source = reply.into();
            Self { what, source }
        }
    }

    /// The kernel's error number.
    pub fn errno(&self) -> Option<Errno> {
        Errno::from_io_error(&self.source)
    }
}

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The kernel's number for it.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is enabled.
    pub up: bool,
    /// The bridge it is a port of.
    pub master: Option<u32>,
    /// For one end of a veth: the number of the other end, in the other end's namespace.
    pub peer: Option<u32>,
    /// What it is: `bridge`, `veth`, `tun`…; nothing for a physical device.
    pub kind: Option<String>,
    /// Its Ethernet address.
    pub mac: Option<MacAddress>,
    /// Whether it is a bridge port that may not talk to other isolated ports.
    pub isolated: bool,
    /// The words that somebody left with it.
    pub alias: Option<String>,
    /// The number of its group; 0 unless somebody chose one.
    pub group: u32,
}

/// An IPv4 address of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// The link's number.
    pub link: u32,
    /// The address.
    pub address: Ipv4Addr,
    /// The bits of its network.
    pub prefix: u8,
}

/// An IPv4 route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The routing table.
    pub table: u32,
    /// Where to.
    pub destination: Ipv4Net,
    /// Through which link.
    pub link: Option<u32>,
    /// By way of whom.
    pub gateway: Option<Ipv4Addr>,
    /// Whose address our own packets carry.
    pub source: Option<Ipv4Addr>,
}

/// A netlink socket in the calling thread's network namespace.
pub struct Links {
    socket: NetlinkSocket,
}

impl Default for Links {
    fn default() -> Self {
        Self::new()
    }
}

impl Links {
    /// A socket that is opened at the first request.
    pub fn new() -> Self {
        Self {
            socket: NetlinkSocket::new(),
        }
    }

    fn act<R: NetlinkRequest>(&mut self, request: &R) -> Result<(), ReplyError> {
        self.socket.request(request)?.recv_ack()
    }

    /// All links.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn dump(&mut self) -> Result<Vec<Link>, NetlinkError> {
        self.dump_raw().map_err(NetlinkError::new("list the links"))
    }

    fn dump_raw(&mut self) -> Result<Vec<Link>, ReplyError> {
        let request = rt_link::Request::new().op_getlink_dump(&rt_link::Ifinfomsg::new());
        let mut reply = self.socket.request(&request)?;
        let mut links = Vec::new();
        while let Some((header, attributes)) = reply.recv().transpose()? {
            links.extend(link_of(&header, &attributes));
        }
        Ok(links)
    }

    /// The link called `name`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn find(&mut self, name: &str) -> Result<Option<Link>, NetlinkError> {
        match self
            .find_raw(name)
            .map_err(NetlinkError::new(format!("look for link `{name}`")))
        {
            Err(error) if error.errno() == Some(Errno::NODEV) => Ok(None),
            found => found,
        }
    }

    fn find_raw(&mut self, name: &str) -> Result<Option<Link>, ReplyError> {
        let mut request = rt_link::Request::new().op_getlink_do(&rt_link::Ifinfomsg::new());
        request.encode().push_ifname_bytes(name.as_bytes());
        let mut reply = self.socket.request(&request)?;
        let mut link = None;
        // To the end, so that the acknowledgement is not left for the next request.
        while let Some((header, attributes)) = reply.recv().transpose()? {
            link = link_of(&header, &attributes);
        }
        Ok(link)
    }

    /// Makes a bridge (down) with a fixed MAC, no spanning tree and no multicast snooping.
    ///
    /// # Errors
    /// The name is taken, or the kernel refuses.
    pub fn create_bridge(&mut self, name: &str, mac: MacAddress) -> Result<(), NetlinkError> {
        let mut request = rt_link::Request::new()
            .set_create()
            .set_excl()
            .op_newlink_do(&rt_link::Ifinfomsg::new());
        request
            .encode()
            .push_ifname_bytes(name.as_bytes())
            .push_address(&mac.0)
            .nested_linkinfo()
            .nested_data_bridge()
            .push_stp_state(0)
            .push_mcast_snooping(0)
            .push_nf_call_iptables(0)
            .push_nf_call_ip6tables(0)
            .push_nf_call_arptables(0);
        self.act(&request)
            .map_err(NetlinkError::new(format!("make bridge `{name}`")))
    }

    /// Makes a veth (down): `name` here and in the group `group`, `peer` in `namespace`.
    ///
    /// # Errors
    /// A name is taken, or the kernel refuses.
    pub fn create_veth(
        &mut self,
        name: &str,
        group: u32,
        peer: &str,
        namespace: BorrowedFd<'_>,
    ) -> Result<(), NetlinkError> {
        let mut request = rt_link::Request::new()
            .set_create()
            .set_excl()
            .op_newlink_do(&rt_link::Ifinfomsg::new());
        {
            let mut info = request
                .encode()
                .push_ifname_bytes(name.as_bytes())
                .push_group(group)
                .nested_linkinfo()
                .push_kind(c"veth");
            // The bindings do not know the veth's own data: a header and attributes of the other end.
            let buffer = info.as_vec_mut();
            let data = push_nested_header(buffer, IFLA_INFO_DATA);
            let other = push_nested_header(buffer, VETH_INFO_PEER);
            buffer.extend(rt_link::Ifinfomsg::new().as_slice());
            let length = u16::try_from(peer.len() + 1).unwrap_or(u16::MAX);
            push_header(buffer, IFLA_IFNAME, length);
            buffer.extend(peer.as_bytes());
            buffer.push(0);
            push_header(buffer, IFLA_NET_NS_FD, 4);
            buffer.extend(namespace.as_raw_fd().to_ne_bytes());
            finalize_nested_header(buffer, other);
            finalize_nested_header(buffer, data);
        }
        self.act(&request)
            .map_err(NetlinkError::new(format!("make veth `{name}`")))
    }

    /// Leaves words with a link and takes it out of its group, both at once.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_alias(&mut self, link: u32, alias: &str) -> Result<(), NetlinkError> {
        let mut request = rt_link::Request::new().op_setlink_do(&header_of(link));
        request
            .encode()
            .push_ifalias_bytes(alias.as_bytes())
            .push_group(0);
        self.act(&request)
            .map_err(NetlinkError::new(format!("name the owner of link {link}")))
    }

    /// Removes the link called `name`; says whether it was there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn delete(&mut self, name: &str) -> Result<bool, NetlinkError> {
        let mut request = rt_link::Request::new().op_dellink_do(&rt_link::Ifinfomsg::new());
        request.encode().push_ifname_bytes(name.as_bytes());
        match self
            .act(&request)
            .map_err(NetlinkError::new(format!("remove link `{name}`")))
        {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == Some(Errno::NODEV) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Enables or disables a link.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_up(&mut self, link: u32, up: bool) -> Result<(), NetlinkError> {
        let header = rt_link::Ifinfomsg {
            ifi_index: link.cast_signed(),
            ifi_flags: if up { IFF_UP } else { 0 },
            ifi_change: IFF_UP,
            ..Default::default()
        };
        let what = format!("{} link {link}", if up { "enable" } else { "disable" });
        self.act(&rt_link::Request::new().op_setlink_do(&header))
            .map_err(NetlinkError::new(what))
    }

    /// Renames a link that is down.
    ///
    /// # Errors
    /// The name is taken, or the kernel refuses.
    pub fn rename(&mut self, link: u32, name: &str) -> Result<(), NetlinkError> {
        let mut request = rt_link::Request::new().op_setlink_do(&header_of(link));
        request.encode().push_ifname_bytes(name.as_bytes());
        self.act(&request)
            .map_err(NetlinkError::new(format!("rename link {link} to `{name}`")))
    }

    /// Joins a link to a bridge.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_master(&mut self, link: u32, bridge: u32) -> Result<(), NetlinkError> {
        let mut request = rt_link::Request::new().op_setlink_do(&header_of(link));
        request.encode().push_master(bridge);
        self.act(&request)
            .map_err(NetlinkError::new(format!("join link {link} to the bridge")))
    }

    /// Makes a bridge port reach the bridge alone: isolated, nothing flooded to it, nothing learned from it.
    ///
    /// # Errors
    /// The link is no bridge port, or the kernel refuses.
    pub fn close_port(&mut self, link: u32) -> Result<(), NetlinkError> {
        let mut request = rt_link::Request::new().op_newlink_do(&header_of(link));
        request
            .encode()
            .nested_linkinfo()
            .nested_slave_data_bridge()
            .push_isolated(1)
            .push_learning(0)
            .push_unicast_flood(0)
            .push_mcast_flood(0)
            .push_bcast_flood(0);
        self.act(&request)
            .map_err(NetlinkError::new(format!("isolate bridge port {link}")))
    }

    /// All IPv4 addresses.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn addresses(&mut self) -> Result<Vec<Address>, NetlinkError> {
        self.addresses_raw()
            .map_err(NetlinkError::new("list the addresses"))
    }

    fn addresses_raw(&mut self) -> Result<Vec<Address>, ReplyError> {
        let request = rt_addr::Request::new().op_getaddr_dump(&rt_addr::Ifaddrmsg {
            ifa_family: INET,
            ..Default::default()
        });
        let mut reply = self.socket.request(&request)?;
        let mut addresses = Vec::new();
        while let Some((header, attributes)) = reply.recv().transpose()? {
            let address = attributes.get_local().or_else(|_| attributes.get_address());
            if let Ok(IpAddr::V4(address)) = address {
                addresses.push(Address {
                    link: header.ifa_index,
                    address,
                    prefix: header.ifa_prefixlen,
                });
            }
        }
        Ok(addresses)
    }

    /// Gives a link an address, if it has it not yet.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn ensure_address(&mut self, wanted: Address) -> Result<(), NetlinkError> {
        if self.addresses()?.contains(&wanted) {
            return Ok(());
        }
        let mut request = rt_addr::Request::new()
            .set_change()
            .op_newaddr_do(&rt_addr::Ifaddrmsg {
                ifa_family: INET,
                ifa_prefixlen: wanted.prefix,
                ifa_index: wanted.link,
                ..Default::default()
            });
        request.encode().push_local(wanted.address.into());
        self.act(&request).map_err(NetlinkError::new(format!(
            "give link {} the address {}/{}",
            wanted.link, wanted.address, wanted.prefix
        )))
    }

    /// All IPv4 routes of all tables.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn routes(&mut self) -> Result<Vec<Route>, NetlinkError> {
        self.routes_raw()
            .map_err(NetlinkError::new("list the routes"))
    }

    fn routes_raw(&mut self) -> Result<Vec<Route>, ReplyError> {
        let request = rt_route::Request::new().op_getroute_dump(&rt_route::Rtmsg {
            rtm_family: INET,
            ..Default::default()
        });
        let mut reply = self.socket.request(&request)?;
        let mut routes = Vec::new();
        let v4 = |address| match address {
            Ok(IpAddr::V4(address)) => Some(address),
            _ => None,
        };
        while let Some((header, attributes)) = reply.recv().transpose()? {
            if header.rtm_family != INET {
                continue;
            }
            let destination = v4(attributes.get_dst()).unwrap_or(Ipv4Addr::UNSPECIFIED);
            routes.push(Route {
                table: attributes.get_table().unwrap_or(header.rtm_table.into()),
                destination: Ipv4Net::new(destination, header.rtm_dst_len),
                link: attributes.get_oif().ok(),
                gateway: v4(attributes.get_gateway()),
                source: v4(attributes.get_prefsrc()),
            });
        }
        Ok(routes)
    }

    /// The devices of all IPv4 routes to everywhere (or to a half of it, as some VPNs divide it).
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn default_devices(&mut self) -> Result<BTreeSet<u32>, NetlinkError> {
        self.default_devices_raw()
            .map_err(NetlinkError::new("list the default routes"))
    }

    fn default_devices_raw(&mut self) -> Result<BTreeSet<u32>, ReplyError> {
        let request = rt_route::Request::new().op_getroute_dump(&rt_route::Rtmsg {
            rtm_family: INET,
            ..Default::default()
        });
        let mut reply = self.socket.request(&request)?;
        let mut devices = BTreeSet::new();
        while let Some((header, attributes)) = reply.recv().transpose()? {
            if header.rtm_family != INET
                || header.rtm_type != RTN_UNICAST
                || header.rtm_dst_len > HALF
            {
                continue;
            }
            devices.extend(attributes.get_oif().ok());
            devices.extend(next_hops(attributes.get_multipath().unwrap_or_default()));
        }
        Ok(devices)
    }

    /// Makes a route of the main table, if it is not there yet.
    ///
    /// # Errors
    /// The kernel refuses; another route to the same network is such a reason.
    pub fn ensure_route(&mut self, wanted: &Route) -> Result<(), NetlinkError> {
        if self.routes()?.contains(wanted) {
            return Ok(());
        }
        let header = rt_route::Rtmsg {
            rtm_family: INET,
            rtm_dst_len: wanted.destination.prefix(),
            rtm_table: u8::try_from(wanted.table).unwrap_or(0),
            rtm_protocol: RTPROT_BOOT,
            rtm_scope: if wanted.gateway.is_some() {
                0
            } else {
                RT_SCOPE_LINK
            },
            rtm_type: RTN_UNICAST,
            rtm_flags: if wanted.gateway.is_some() {
                RTNH_F_ONLINK
            } else {
                0
            },
            ..Default::default()
        };
        let mut request = rt_route::Request::new()
            .set_create()
            .set_excl()
            .op_newroute_do(&header);
        {
            let mut attributes = request
                .encode()
                .push_dst(wanted.destination.base().into())
                .push_table(wanted.table);
            if let Some(link) = wanted.link {
                attributes = attributes.push_oif(link);
            }
            if let Some(gateway) = wanted.gateway {
                attributes = attributes.push_gateway(gateway.into());
            }
            if let Some(source) = wanted.source {
                attributes.push_prefsrc(source.into());
            }
        }
        self.act(&request).map_err(NetlinkError::new(format!(
            "add the route to {}",
            wanted.destination
        )))
    }

    /// The permanent IPv4 neighbours of a link.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn permanent_neighbours(
        &mut self,
        link: u32,
    ) -> Result<Vec<(Ipv4Addr, MacAddress)>, NetlinkError> {
        self.neighbours_raw(link)
            .map_err(NetlinkError::new("list the neighbours"))
    }

    /// All IPv4 neighbours that are known: the link of each, and its address.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn neighbours(&mut self) -> Result<Vec<(u32, Ipv4Addr)>, NetlinkError> {
        self.all_neighbours_raw()
            .map_err(NetlinkError::new("list the neighbours"))
    }

    fn all_neighbours_raw(&mut self) -> Result<Vec<(u32, Ipv4Addr)>, ReplyError> {
        let request = rt_neigh::Request::new().op_getneigh_dump(&rt_neigh::Ndmsg {
            ndm_family: INET,
            ..Default::default()
        });
        let mut reply = self.socket.request(&request)?;
        let mut neighbours = Vec::new();
        while let Some((header, attributes)) = reply.recv().transpose()? {
            // Who never answered is none.
            if header.ndm_state & (NUD_INCOMPLETE | NUD_FAILED) != 0 {
                continue;
            }
            if let Ok(IpAddr::V4(address)) = attributes.get_dst() {
                neighbours.push((header.ndm_ifindex.cast_unsigned(), address));
            }
        }
        Ok(neighbours)
    }

    fn neighbours_raw(&mut self, link: u32) -> Result<Vec<(Ipv4Addr, MacAddress)>, ReplyError> {
        let request = rt_neigh::Request::new().op_getneigh_dump(&rt_neigh::Ndmsg {
            ndm_family: INET,
            ..Default::default()
        });
        let mut reply = self.socket.request(&request)?;
        let mut neighbours = Vec::new();
        while let Some((header, attributes)) = reply.recv().transpose()? {
            if header.ndm_ifindex != link.cast_signed() || header.ndm_state & NUD_PERMANENT == 0 {
                continue;
            }
            if let (Ok(IpAddr::V4(address)), Ok(mac)) =
                (attributes.get_dst(), attributes.get_lladdr())
                && let Ok(mac) = mac.try_into()
            {
                neighbours.push((address, MacAddress(mac)));
            }
        }
        Ok(neighbours)
    }

    /// Says once and for all which MAC an address on `link` has, so that nobody is asked.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_neighbour(
        &mut self,
        link: u32,
        address: Ipv4Addr,
        mac: MacAddress,
    ) -> Result<(), NetlinkError> {
        let header = rt_neigh::Ndmsg {
            ndm_family: INET,
            ndm_ifindex: link.cast_signed(),
            ndm_state: NUD_PERMANENT,
            ..Default::default()
        };
        let mut request = rt_neigh::Request::new()
            .set_change()
            .op_newneigh_do(&header);
        request
            .encode()
            .push_dst(address.into())
            .push_lladdr(&mac.0);
        self.act(&request)
            .map_err(NetlinkError::new(format!("set the neighbour {address}")))
    }

    /// Forgets the neighbour, if it is there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove_neighbour(&mut self, link: u32, address: Ipv4Addr) -> Result<(), NetlinkError> {
        let header = rt_neigh::Ndmsg {
            ndm_family: INET,
            ndm_ifindex: link.cast_signed(),
            ..Default::default()
        };
        let mut request = rt_neigh::Request::new().op_delneigh_do(&header);
        request.encode().push_dst(address.into());
        match self
            .act(&request)
            .map_err(NetlinkError::new(format!("remove the neighbour {address}")))
        {
            Err(error) if error.errno() != Some(Errno::NOENT) => Err(error),
            _ => Ok(()),
        }
    }

    /// Says which MAC is behind a bridge port, as nothing is learned there.
    ///
    /// # Errors
    /// The link is no bridge port, or the kernel refuses.
    pub fn set_port_mac(&mut self, port: u32, mac: MacAddress) -> Result<(), NetlinkError> {
        let header = rt_neigh::Ndmsg {
            ndm_family: BRIDGE_FAMILY,
            ndm_ifindex: port.cast_signed(),
            ndm_state: NUD_NOARP,
            ndm_flags: NTF_MASTER,
            ..Default::default()
        };
        let mut request = rt_neigh::Request::new()
            .set_change()
            .op_newneigh_do(&header);
        request.encode().push_lladdr(&mac.0);
        self.act(&request)
            .map_err(NetlinkError::new(format!("set the MAC behind port {port}")))
    }
}

const INET: u8 = AF_INET as u8;
const BRIDGE_FAMILY: u8 = AF_BRIDGE as u8;

/// The devices of a route with several ways: each a `struct rtnexthop` and its attributes.
fn next_hops(mut bytes: &[u8]) -> Vec<u32> {
    let mut devices = Vec::new();
    while let Some((header, _)) = bytes.split_first_chunk::<8>() {
        devices.push(u32::from_ne_bytes([
            header[4], header[5], header[6], header[7],
        ]));
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]])).next_multiple_of(4);
        bytes = bytes.get(length.max(8)..).unwrap_or_default();
    }
    devices
}

fn link_of(
    header: &rt_link::Ifinfomsg,
    attributes: &rt_link::IterableLinkAttrs<'_>,
) -> Option<Link> {
    let info = attributes.get_linkinfo().ok();
    let isolated = info.as_ref().is_some_and(|info| {
        matches!(
            info.get_slave_data(),
            Ok(rt_link::LinkinfoMemberDataMsg::Bridge(port)) if port.get_isolated() == Ok(1)
        )
    });
    Some(Link {
        index: header.ifi_index.cast_unsigned(),
        name: attributes.get_ifname().ok()?.to_string_lossy().into_owned(),
        up: header.ifi_flags & IFF_UP != 0,
        master: attributes.get_master().ok(),
        peer: attributes.get_link().ok(),
        kind: info
            .and_then(|info| info.get_kind().ok())
            .map(|kind| kind.to_string_lossy().into_owned()),
        mac: attributes
            .get_address()
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .map(MacAddress),
        isolated,
        alias: attributes
            .get_ifalias()
            .ok()
            .map(|alias| alias.to_string_lossy().into_owned()),
        group: attributes.get_group().unwrap_or(0),
    })
}

fn header_of(link: u32) -> rt_link::Ifinfomsg {
    rt_link::Ifinfomsg {
        ifi_index: link.cast_signed(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_of_a_route_with_several_is_seen_and_nonsense_ends_the_list() {
        let mut bytes = Vec::new();
        for device in [3_u32, 7] {
            bytes.extend(14_u16.to_ne_bytes());
            bytes.extend([0, 0]);
            bytes.extend(device.to_ne_bytes());
            bytes.extend([0; 8]);
        }
        assert_eq!(next_hops(&bytes), [3, 7]);
        assert_eq!(next_hops(&[0; 17]), [0, 0]);
        assert_eq!(next_hops(&[9; 7]), Vec::<u32>::new());
    }
}
