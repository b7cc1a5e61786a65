//! The connections that the namespace's kernel tracks.

use super::links::NetlinkError;
use linux_raw_sys::net::{AF_INET, NFPROTO_IPV4};
use netlink_bindings::conntrack::{self, IterableConntrackAttrs, Nfgenmsg};
use netlink_bindings::traits::{NetlinkRequest, Protocol};
use netlink_bindings::utils::{finalize_nested_header, push_nested_header};
use netlink_socket2::{NetlinkSocket, ReplyError};
use rustix::io::Errno;
use std::net::Ipv4Addr;

const NETLINK_NETFILTER: u16 = 12;
/// `NFNL_SUBSYS_CTNETLINK`, `IPCTNL_MSG_CT_DELETE`.
const DELETE: u16 = (1 << 8) | 2;
const CTA_TUPLE_ORIG: u16 = 1;

/// Drops every connection whose ends `matches`: from whom, to whom, as the first packet went. Answers how many.
///
/// # Errors
/// The kernel refuses; it may be built without what lists connections.
pub fn drop_matching(
    mut matches: impl FnMut(Ipv4Addr, Ipv4Addr) -> bool,
) -> Result<usize, NetlinkError> {
    let mut socket = NetlinkSocket::new();
    let found =
        find(&mut socket, &mut matches).map_err(NetlinkError::new("list the connections"))?;
    let mut dropped = 0;
    for delete in found {
        match drop_one(&mut socket, &delete).map_err(NetlinkError::new("drop a connection")) {
            Ok(()) => dropped += 1,
            // It ended by itself.
            Err(error) if error.errno() == Some(Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(dropped)
}

fn drop_one(socket: &mut NetlinkSocket, delete: &Delete) -> Result<(), ReplyError> {
    socket.request(delete)?.recv_ack()
}

fn find(
    socket: &mut NetlinkSocket,
    matches: &mut impl FnMut(Ipv4Addr, Ipv4Addr) -> bool,
) -> Result<Vec<Delete>, ReplyError> {
    let request = conntrack::Request::new().op_get_dump(&header());
    let mut reply = socket.request(&request)?;
    let mut found = Vec::new();
    while let Some((_, connection)) = reply.recv().transpose()? {
        let Ok(tuple) = connection.get_tuple_orig() else {
            continue;
        };
        let ends = tuple
            .get_tuple_ip()
            .and_then(|ip| Ok((ip.get_ip_v4_src()?, ip.get_ip_v4_dst()?)));
        if let (Ok((from, to)), Ok(id)) = (ends, connection.get_id())
            && matches(from, to)
        {
            found.push(Delete::new(tuple.get_buf(), id));
        }
    }
    Ok(found)
}

fn header() -> Nfgenmsg {
    let mut header = Nfgenmsg::new();
    const { assert!(NFPROTO_IPV4 as u32 == AF_INET) };
    header.nfgen_family = NFPROTO_IPV4 as u8;
    header
}

/// The request to delete one connection, which the bindings do not know.
struct Delete {
    payload: Vec<u8>,
}

impl Delete {
    /// `tuple` is how the kernel itself described the connection, and `id` tells it from a later one like it.
    fn new(tuple: &[u8], id: u32) -> Self {
        let mut payload = header().as_slice().to_vec();
        let nested = push_nested_header(&mut payload, CTA_TUPLE_ORIG);
        payload.extend(tuple);
        finalize_nested_header(&mut payload, nested);
        conntrack::PushConntrackAttrs::new(&mut payload).push_id(id);
        Self { payload }
    }
}

impl NetlinkRequest for Delete {
    fn protocol(&self) -> Protocol {
        Protocol::Raw {
            protonum: NETLINK_NETFILTER,
            request_type: DELETE,
        }
    }

    fn flags(&self) -> u16 {
        0
    }

    fn payload(&self) -> &[u8] {
        &self.payload
    }

    type ReplyType<'buf> = IterableConntrackAttrs<'buf>;

    fn decode_reply(buf: &[u8]) -> Self::ReplyType<'_> {
        conntrack::ConntrackAttrs::new(buf.get(Nfgenmsg::len()..).unwrap_or_default())
    }
}
