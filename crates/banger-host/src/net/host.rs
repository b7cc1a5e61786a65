//! The operations that need root on the host: the veth between it and the instance's namespace.

use super::links::{Address, Links, NetlinkError, Route, TABLE_LOCAL, TABLE_MAIN};
use super::namespace::set_sysctl;
use crate::host_side::HelperError;
use crate::op::{HostOp, UPLINK};
use banger_core::addr::{Ipv4Net, Pool};
use banger_core::id::InstanceId;
use rustix::fd::BorrowedFd;
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::io;
use std::path::Path;

/// What a host operation could not do.
#[derive(Debug, thiserror::Error)]
pub enum HostOpError {
    /// The kernel refused a request about the network.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// Somebody else's route covers a part of the pool.
    #[error("the host's {route} overlaps the guests' network {pool}; choose another pool")]
    RouteInTheWay {
        /// The route, as `route 172.16.0.0/12 via 10.0.0.1 dev eth0`.
        route: String,
        /// The pool.
        pool: Ipv4Net,
    },
    /// The operation needs the network namespace, and none was given.
    #[error("no network namespace was given to attach the veth to")]
    NoNamespace,
    /// Descriptors are missing, or there are too many.
    #[error("{operation} comes with {wanted} descriptors, not {given}")]
    Descriptors {
        /// The operation's name.
        operation: &'static str,
        /// How many belong to it.
        wanted: usize,
        /// How many came.
        given: usize,
    },
    /// It cannot be done yet.
    #[error("{0} is not supported yet")]
    NotYet(&'static str),
    /// The helper could not be reached, or did not do it.
    #[error(transparent)]
    Helper(#[from] HelperError),
    /// The namespace could not be entered.
    #[error("cannot enter the instance's network namespace")]
    Enter(#[source] io::Error),
    /// The veth vanished while it was set up.
    #[error("link `{0}` vanished while it was set up")]
    Vanished(String),
}

/// Does `op`; `namespace` is the instance's network namespace, which [`HostOp::AttachVeth`] needs.
///
/// # Errors
/// The kernel refuses, or a route of somebody else overlaps the pool.
pub fn perform(op: &HostOp, namespace: Option<BorrowedFd<'_>>) -> Result<(), HostOpError> {
    match op {
        HostOp::AttachVeth { instance, pool } => {
            attach_veth(*instance, *pool, namespace.ok_or(HostOpError::NoNamespace)?)
        }
        HostOp::DetachVeth { instance } => {
            // The address, the route and the other end go with it.
            Links::new().delete(&instance.veth_name())?;
            Ok(())
        }
        _ => Err(HostOpError::NotYet(op.name())),
    }
}

/// Every IPv4 network that this host has a route to or an address of (default routes are left out), for the choice of
/// a pool.
///
/// # Errors
/// The kernel's tables cannot be read.
pub fn host_routes() -> Result<Vec<Ipv4Net>, HostOpError> {
    let mut links = Links::new();
    let routes = links.routes()?.into_iter().map(|route| route.destination);
    let mut networks: Vec<Ipv4Net> = routes.filter(|network| network.prefix() > 0).collect();
    for address in links.addresses()? {
        networks.push(Ipv4Net::new(address.address, address.prefix));
    }
    networks.sort_unstable_by_key(|network| (network.base(), network.prefix()));
    networks.dedup();
    Ok(networks)
}

fn attach_veth(
    instance: InstanceId,
    pool: Pool,
    namespace: BorrowedFd<'_>,
) -> Result<(), HostOpError> {
    let name = instance.veth_name();
    let mut links = Links::new();
    let existing = links.find(&name)?;
    refuse_overlap(&mut links, pool, existing.as_ref().map(|link| link.index))?;
    let joined = match &existing {
        Some(link) => is_uplink(namespace, link.peer, link.index)?,
        None => false,
    };
    if !joined {
        // One whose other end is elsewhere, or gone astray, is of no use.
        links.delete(&name)?;
        in_namespace(namespace, || Links::new().delete(UPLINK))??;
        links.create_veth(&name, UPLINK, namespace)?;
    }
    let veth = links
        .find(&name)?
        .ok_or_else(|| HostOpError::Vanished(name.clone()))?;
    // No address of its own making. Without IPv6 in the kernel there is nothing to switch off.
    let _ = set_sysctl(
        &Path::new("/proc/sys/net/ipv6/conf")
            .join(&name)
            .join("disable_ipv6"),
        "1",
    );
    links.ensure_address(Address {
        link: veth.index,
        address: pool.host(),
        prefix: 32,
    })?;
    if !veth.up {
        links.set_up(veth.index, true)?;
    }
    Ok(links.ensure_route(&Route {
        table: TABLE_MAIN,
        destination: pool.guests(),
        link: Some(veth.index),
        gateway: Some(pool.uplink()),
        source: Some(pool.host()),
    })?)
}

/// A route that goes through our own veth is no obstacle; any other within, or around, the pool is.
fn refuse_overlap(links: &mut Links, pool: Pool, own: Option<u32>) -> Result<(), HostOpError> {
    let obstacle = links.routes()?.into_iter().find(|route| {
        matches!(route.table, TABLE_MAIN | TABLE_LOCAL)
            && route.destination.prefix() > 0
            && route.destination.overlaps(&pool.network())
            && (own.is_none() || route.link != own)
    });
    let Some(obstacle) = obstacle else {
        return Ok(());
    };
    let mut route = format!("route {}", obstacle.destination);
    if let Some(gateway) = obstacle.gateway {
        route.push_str(&format!(" via {gateway}"));
    }
    let device = links
        .dump()?
        .into_iter()
        .find(|link| Some(link.index) == obstacle.link);
    if let Some(device) = device {
        route.push_str(&format!(" dev {}", device.name));
    }
    Err(HostOpError::RouteInTheWay {
        route,
        pool: pool.network(),
    })
}

/// Whether link `peer` of `namespace` is the namespace's uplink and the other end of our link `index`.
fn is_uplink(
    namespace: BorrowedFd<'_>,
    peer: Option<u32>,
    index: u32,
) -> Result<bool, HostOpError> {
    let uplink = in_namespace(namespace, || Links::new().find(UPLINK))??;
    Ok(uplink.is_some_and(|uplink| Some(uplink.index) == peer && uplink.peer == Some(index)))
}

/// Runs `work` in `namespace`, in a thread of its own that ends with it.
fn in_namespace<T: Send>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> T + Send,
) -> Result<T, HostOpError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("in-namespace".to_owned())
            .spawn_scoped(scope, move || {
                move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?;
                Ok::<T, Errno>(work())
            })
            .map_err(HostOpError::Enter)?;
        match thread.join() {
            Ok(result) => result.map_err(|errno| HostOpError::Enter(errno.into())),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
