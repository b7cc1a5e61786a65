//! Sockets for the DNS server, which lives outside of the namespace.

use crate::op::{BRIDGE, UPLINK};
use banger_core::addr::Pool;
use rustix::fd::OwnedFd;
use socket2::{Domain, Socket, Type};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

const PORT: u16 = 53;
const BACKLOG: i32 = 64;
/// How long a server that is just ending may still hold the place.
const TAKEN_LIMIT: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(10);

/// A socket could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen for DNS at {address} on `{link}`")]
pub struct DnsSocketError {
    address: SocketAddrV4,
    link: &'static str,
    #[source]
    source: io::Error,
}

/// UDP, then listening TCP, for guests; with `host`, the same two for the host. Waits up to two seconds for a place
/// that is taken.
pub(crate) fn open(pool: Pool, host: bool) -> Result<Vec<OwnedFd>, DnsSocketError> {
    let mut sockets = pair(pool.gateway(), BRIDGE)?;
    if host {
        // The same address, which the host has a route to; which socket hears is decided by the device.
        sockets.extend(pair(pool.gateway(), UPLINK)?);
    }
    Ok(sockets)
}

fn pair(address: Ipv4Addr, link: &'static str) -> Result<Vec<OwnedFd>, DnsSocketError> {
    let address = SocketAddrV4::new(address, PORT);
    let failed = |source| DnsSocketError {
        address,
        link,
        source,
    };
    let udp = free(Type::DGRAM, address, link).map_err(failed)?;
    let tcp = free(Type::STREAM, address, link).map_err(failed)?;
    Ok(vec![udp.into(), tcp.into()])
}

/// Waits for the place, as long as another copy of an earlier socket at it may be about to be closed.
fn free(kind: Type, address: SocketAddrV4, link: &str) -> io::Result<Socket> {
    let deadline = Instant::now() + TAKEN_LIMIT;
    loop {
        match bound(kind, address, link) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::sleep(PAUSE);
            }
            done => return done,
        }
    }
}

fn bound(kind: Type, address: SocketAddrV4, link: &str) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, kind.nonblocking().cloexec(), None)?;
    if kind == Type::STREAM {
        // The connections of an earlier server may still be ending.
        socket.set_reuse_address(true)?;
    }
    socket.bind_device(Some(link.as_bytes()))?;
    socket.bind(&address.into())?;
    if kind == Type::STREAM {
        socket.listen(BACKLOG)?;
    }
    Ok(socket)
}
