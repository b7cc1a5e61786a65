//! The one NIC, set up by a handful of netlink messages.

use super::uevents;
use banger_guest::boot_config::Network;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netdevice, recv, send,
    socket_with,
};
use std::io;
use std::net::Ipv4Addr;
use std::time::Duration;

/// The name that the NIC gets.
pub(crate) const NAME: &str = "eth0";
/// How long the NIC may take to appear.
const APPEAR_LIMIT: Duration = Duration::from_secs(5);

// From <linux/netlink.h>, <linux/rtnetlink.h> and <linux/if_link.h>.
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const AF_INET: u8 = 2;
const IFF_UP: u32 = 1;
const IFLA_IFNAME: u16 = 3;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;

/// One netlink request under construction.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16, header: &[u8]) -> Self {
        let mut bytes = vec![0; 16];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
        bytes.extend_from_slice(header);
        Self(bytes)
    }

    fn link(index: u32, flags: u32, change: u32) -> Self {
        let mut header = [0; 16];
        header[4..8].copy_from_slice(&index.to_ne_bytes());
        header[8..12].copy_from_slice(&flags.to_ne_bytes());
        header[12..16].copy_from_slice(&change.to_ne_bytes());
        Self::new(RTM_NEWLINK, 0, &header)
    }

    fn address(index: u32, address: Ipv4Addr, prefix: u8) -> Self {
        let mut header = [0; 8];
        header[0] = AF_INET;
        header[1] = prefix;
        header[4..8].copy_from_slice(&index.to_ne_bytes());
        let message = Self::new(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &header)
            .attribute(IFA_LOCAL, &address.octets())
            .attribute(IFA_ADDRESS, &address.octets());
        match broadcast(address, prefix) {
            Some(broadcast) => message.attribute(IFA_BROADCAST, &broadcast.octets()),
            None => message,
        }
    }

    fn default_route(index: u32, gateway: Ipv4Addr) -> Self {
        // Main table, made at boot, everywhere, unicast; on-link, so that a /32 address works as well.
        const RTNH_F_ONLINK: u32 = 4;
        let mut header = [AF_INET, 0, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0];
        header[8..12].copy_from_slice(&RTNH_F_ONLINK.to_ne_bytes());
        Self::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &header)
            .attribute(RTA_OIF, &index.to_ne_bytes())
            .attribute(RTA_GATEWAY, &gateway.octets())
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.0
            .extend_from_slice(&(4 + value.len() as u16).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

fn broadcast(address: Ipv4Addr, prefix: u8) -> Option<Ipv4Addr> {
    let hosts = u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
    (hosts > 1).then(|| Ipv4Addr::from(u32::from(address) | hosts))
}

/// The error code of an acknowledgement; 0 is success.
fn acknowledged(reply: &[u8]) -> Option<i32> {
    let kind = u16::from_ne_bytes(reply.get(4..6)?.try_into().ok()?);
    let code = i32::from_ne_bytes(reply.get(16..20)?.try_into().ok()?);
    (kind == NLMSG_ERROR).then_some(-code)
}

struct Netlink(OwnedFd);

impl Netlink {
    fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        Ok(Self(socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            flags,
            None,
        )?))
    }

    fn ask(&self, what: &str, message: Message) -> io::Result<()> {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{what}: {error}"));
        send(&self.0, &message.finish(), SendFlags::empty())
            .map_err(|error| named(error.into()))?;
        let mut reply = [0; 4096];
        let (count, _) =
            recv(&self.0, &mut reply, RecvFlags::empty()).map_err(|error| named(error.into()))?;
        match acknowledged(&reply[..count]) {
            Some(0) => Ok(()),
            Some(code) => Err(named(Errno::from_raw_os_error(code).into())),
            None => Err(named(io::Error::other("not an acknowledgement"))),
        }
    }

    fn index(&self, name: &str) -> io::Result<u32> {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
        Ok(netdevice::name_to_index(socket, name)?)
    }
}

/// Sets `lo` up.
pub(crate) fn loopback_up() -> io::Result<()> {
    let netlink = Netlink::open()?;
    let index = netlink.index("lo")?;
    netlink.ask("lo up", Message::link(index, IFF_UP, IFF_UP))
}

/// Finds the NIC by its MAC, names it and gives it its address and route.
pub(crate) fn set_up(network: &Network) -> io::Result<()> {
    let mac = network.mac.to_ascii_lowercase();
    let name = uevents::wait_for(APPEAR_LIMIT, || name_of(&mac))
        .ok_or_else(|| io::Error::other(format!("no NIC has the address {mac}")))?;
    let netlink = Netlink::open()?;
    let index = netlink.index(&name)?;
    if name != NAME {
        let mut value = NAME.as_bytes().to_vec();
        value.push(0);
        let rename = Message::link(index, 0, 0).attribute(IFLA_IFNAME, &value);
        netlink.ask("name", rename)?;
    }
    let Network {
        address,
        prefix,
        gateway,
        ..
    } = *network;
    netlink.ask("address", Message::address(index, address, prefix))?;
    netlink.ask("up", Message::link(index, IFF_UP, IFF_UP))?;
    netlink.ask("default route", Message::default_route(index, gateway))
}

fn name_of(mac: &str) -> Option<String> {
    std::fs::read_dir("/sys/class/net")
        .ok()?
        .filter_map(Result::ok)
        .find(|entry| {
            std::fs::read_to_string(entry.path().join("address"))
                .is_ok_and(|address| address.trim() == mac)
        })
        .and_then(|entry| entry.file_name().into_string().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_to_four_bytes_and_the_length_is_the_whole() {
        let bytes = Message::link(7, 0, 0)
            .attribute(IFLA_IFNAME, b"eth0\0")
            .finish();
        assert_eq!(bytes.len(), 16 + 16 + 12);
        assert_eq!(bytes[..4], 44_u32.to_ne_bytes());
        assert_eq!(bytes[20..24], 7_u32.to_ne_bytes());
        assert_eq!(bytes[32..34], 9_u16.to_ne_bytes());
        assert_eq!(&bytes[36..], b"eth0\0\0\0\0");
    }

    #[test]
    fn a_broadcast_address_exists_only_where_there_is_room_for_one() {
        let address = Ipv4Addr::new(172, 16, 5, 9);
        assert_eq!(broadcast(address, 24), Some(Ipv4Addr::new(172, 16, 5, 255)));
        assert_eq!(
            broadcast(address, 20),
            Some(Ipv4Addr::new(172, 16, 15, 255))
        );
        assert_eq!(broadcast(address, 31), None);
        assert_eq!(broadcast(address, 32), None);
    }

    #[test]
    fn an_acknowledgement_gives_the_error_code() {
        let mut reply = [0; 36];
        reply[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        assert_eq!(acknowledged(&reply), Some(0));
        reply[16..20].copy_from_slice(&(-17_i32).to_ne_bytes());
        assert_eq!(acknowledged(&reply), Some(17));
        assert_eq!(acknowledged(&reply[..10]), None);
    }
}
