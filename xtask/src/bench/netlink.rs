//! The least that speaks to the kernel about its network: what banger's own way is held against.

use crate::failure::{Failure, Result};
use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

const HEADER: usize = 16;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const CREATE: u16 = 0x400;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NFTABLES: u16 = 10;
const GET_LINK: u16 = 18;
const GET_RULE: u16 = NFTABLES << 8 | 7;
const NEW_ELEMENT: u16 = NFTABLES << 8 | 12;
const DELETE_ELEMENT: u16 = NFTABLES << 8 | 14;
const INET: u8 = 1;
const NESTED: u16 = 0x8000;

/// A socket in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

/// A name in `table inet banger`, and what to do with an address in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Add,
    Delete,
}

impl Netlink {
    /// Speaks about the packet filter.
    pub(super) fn netfilter() -> Result<Self> {
        Self::open(Some(NETFILTER))
    }

    /// Speaks about links and routes.
    pub(super) fn route() -> Result<Self> {
        Self::open(None)
    }

    fn open(protocol: Option<rustix::net::Protocol>) -> Result<Self> {
        let failed =
            |error: rustix::io::Errno| Failure::io("cannot open a netlink socket")(error.into());
        let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
        let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, protocol)
            .map_err(failed)?;
        rustix::net::connect(&socket, &SocketAddrNetlink::new(0, 0)).map_err(failed)?;
        Ok(Self {
            socket,
            buffer: vec![0; 1 << 17],
        })
    }

    /// Puts one address into the set `nat_vms`, or takes it out: one transaction, and its acknowledgement.
    pub(super) fn change_nat(&mut self, change: Change, address: Ipv4Addr) -> Result<()> {
        self.send(&nat_batch(change, address))?;
        let length = self.receive()?;
        match acknowledged(&self.buffer[..length]) {
            Some(0) => Ok(()),
            other => Err(Failure::new(format!(
                "the kernel refused an element: {other:?}"
            ))),
        }
    }

    /// Reads all links, and answers how many bytes they are.
    pub(super) fn dump_links(&mut self) -> Result<usize> {
        self.dump(&message(GET_LINK, REQUEST | DUMP, &[0; 16]))
    }

    /// Reads all rules of the packet filter.
    pub(super) fn dump_rules(&mut self) -> Result<usize> {
        self.dump(&message(GET_RULE, REQUEST | DUMP, &[0; 4]))
    }

    fn dump(&mut self, request: &[u8]) -> Result<usize> {
        self.send(request)?;
        let mut bytes = 0;
        loop {
            let length = self.receive()?;
            bytes += length;
            match ends(&self.buffer[..length]) {
                Some(DONE) => return Ok(bytes),
                Some(_) => return Err(Failure::new("the kernel refused a dump")),
                None => {}
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> Result<()> {
        let sent = rustix::net::send(&self.socket, bytes, SendFlags::empty());
        sent.map(drop)
            .map_err(|error| Failure::io("cannot ask the kernel")(error.into()))
    }

    fn receive(&mut self) -> Result<usize> {
        let received = rustix::net::recv(&self.socket, &mut self.buffer[..], RecvFlags::empty());
        received
            .map(|(length, _)| length)
            .map_err(|error| Failure::io("the kernel does not answer")(error.into()))
    }
}

fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend(body);
    bytes
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(4 + value.len());
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A transaction of one message, which is acknowledged.
fn nat_batch(change: Change, address: Ipv4Addr) -> Vec<u8> {
    let value = attribute(1, &address.octets());
    let key = attribute(1 | NESTED, &value);
    let element = attribute(1 | NESTED, &key);
    let mut body = vec![INET, 0, 0, 0];
    body.extend(attribute(1, b"banger\0"));
    body.extend(attribute(2, b"nat_vms\0"));
    body.extend(attribute(3 | NESTED, &element));
    let (kind, flags) = match change {
        Change::Add => (NEW_ELEMENT, REQUEST | ACK | CREATE),
        Change::Delete => (DELETE_ELEMENT, REQUEST | ACK),
    };
    let [high, low] = NFTABLES.to_be_bytes();
    let batch = [0, 0, high, low];
    [
        message(BATCH_BEGIN, REQUEST, &batch),
        message(kind, flags, &body),
        message(BATCH_END, REQUEST, &batch),
    ]
    .concat()
}

/// The messages in what was received, each with its kind.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?);
        let length = usize::try_from(length).ok()?.max(HEADER);
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        let body = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

/// The kind of the message that ends a dump, if it is among these.
fn ends(bytes: &[u8]) -> Option<u16> {
    messages(bytes)
        .map(|(kind, _)| kind)
        .find(|kind| matches!(*kind, ERROR | DONE))
}

/// What the kernel says of the transaction: zero, or an error's number.
fn acknowledged(bytes: &[u8]) -> Option<i32> {
    let (_, body) = messages(bytes).find(|(kind, _)| *kind == ERROR)?;
    Some(i32::from_ne_bytes(body.get(..4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_three_messages_whose_lengths_add_up() {
        let batch = nat_batch(Change::Add, Ipv4Addr::new(1, 2, 3, 4));
        let kinds: Vec<u16> = messages(&batch).map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [BATCH_BEGIN, NEW_ELEMENT, BATCH_END]);
        assert!(batch.windows(4).any(|window| window == [1, 2, 3, 4]));
    }

    #[test]
    fn an_end_and_an_error_are_told_apart() {
        let end = [message(GET_LINK, 0, &[0; 16]), message(DONE, 0, &[0; 4])].concat();
        assert_eq!(ends(&end), Some(DONE));
        assert_eq!(
            acknowledged(&message(ERROR, 0, &(-2i32).to_ne_bytes())),
            Some(-2)
        );
        assert_eq!(ends(&message(GET_LINK, 0, &[0; 16])), None);
    }
}
