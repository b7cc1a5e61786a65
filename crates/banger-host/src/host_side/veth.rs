//! The veth between the host and an instance's namespace.

use super::tag::Tag;
use crate::crash::step;
use crate::net::host::HostOpError;
use crate::net::links::{Address, HALF, Link, Links, Route, TABLE_MAIN};
use crate::net::namespace::set_sysctl;
use crate::net::needed::needed;
use crate::op::UPLINK;
use banger_core::addr::{Ipv4Net, Pool};
use rustix::fd::BorrowedFd;
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::net::Ipv4Addr;
use std::path::Path;

/// The group of a veth of ours that was made but does not carry its tag yet: `bngr`.
const UNFINISHED: u32 = 0x626e_6772;
const KIND: &str = "veth";

/// The host's end of the veth of `tag`, if it is there.
///
/// # Errors
/// Something with its name is not ours.
pub(super) fn find(links: &mut Links, tag: Tag) -> Result<Option<Link>, HostOpError> {
    let name = tag.instance.veth_name();
    let Some(link) = links.find(&name)? else {
        return Ok(None);
    };
    let says = link.alias.as_deref().and_then(Tag::parse);
    let unfinished = link.alias.is_none() && link.group == UNFINISHED;
    if link.kind.as_deref() == Some(KIND) && (says == Some(tag) || unfinished) {
        return Ok(Some(link));
    }
    Err(HostOpError::Foreign {
        what: "link",
        name,
        tag: tag.to_string(),
    })
}

/// Refuses a pool that guests must not have.
///
/// # Errors
/// It is no /20 of a private network.
pub(super) fn check_pool(pool: Pool) -> Result<(), HostOpError> {
    let network = pool.network();
    let private = [
        Ipv4Net::new(Ipv4Addr::new(10, 0, 0, 0), 8),
        Ipv4Net::new(Ipv4Addr::new(100, 64, 0, 0), 10),
        Ipv4Net::new(Ipv4Addr::new(172, 16, 0, 0), 12),
        Ipv4Net::new(Ipv4Addr::new(192, 168, 0, 0), 16),
    ];
    let inside = private.iter().any(|whole| whole.contains(network.base()));
    if network.prefix() == Pool::PREFIX && inside {
        Ok(())
    } else {
        Err(HostOpError::BadPool(network))
    }
}

/// A route that goes through our own veth is no obstacle; any other within, or around, the pool is, whatever table
/// it is in: VPNs have their own. So is whom the host reaches there by its default route.
///
/// # Errors
/// There is one.
pub(super) fn refuse_overlap(
    links: &mut Links,
    pool: Pool,
    own: Option<u32>,
) -> Result<(), HostOpError> {
    let obstacle = links.routes()?.into_iter().find(|route| {
        route.destination.prefix() > HALF
            && route.destination.overlaps(&pool.network())
            && (own.is_none() || route.link != own)
    });
    let Some(obstacle) = obstacle else {
        return refuse_needed(links, pool, own);
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

fn refuse_needed(links: &mut Links, pool: Pool, own: Option<u32>) -> Result<(), HostOpError> {
    let mut needed = needed(links)?.into_iter();
    match needed.find(|needed| needed.is_in(pool, own)) {
        Some(needed) => Err(HostOpError::AddressInTheWay {
            what: needed.what,
            address: needed.address,
            pool: pool.network(),
        }),
        None => Ok(()),
    }
}

/// Makes the veth, if it is not there, and gives the host's end its tag and address; it is left down.
///
/// # Errors
/// The kernel refuses.
pub(super) fn ensure(
    links: &mut Links,
    tag: Tag,
    pool: Pool,
    namespace: BorrowedFd<'_>,
) -> Result<Link, HostOpError> {
    let name = tag.instance.veth_name();
    let existing = find(links, tag)?;
    let joined = match &existing {
        Some(link) => is_uplink(namespace, link.peer, link.index)?,
        None => false,
    };
    if !joined {
        // One whose other end is elsewhere, or gone astray, is of no use.
        if existing.is_some() {
            links.delete(&name)?;
        }
        in_namespace(namespace, || Links::new().delete(UPLINK))??;
        step("make-veth", || {
            links.create_veth(&name, UNFINISHED, UPLINK, namespace)
        })?;
    }
    let vanished = || HostOpError::Vanished(name.clone());
    let veth = links.find(&name)?.ok_or_else(vanished)?;
    let words = tag.to_string();
    if veth.alias.as_ref() != Some(&words) {
        step("tag-veth", || links.set_alias(veth.index, &words))?;
    }
    // No address of its own making. Without IPv6 in the kernel there is nothing to switch off.
    let _ = set_sysctl(
        &Path::new("/proc/sys/net/ipv6/conf")
            .join(&name)
            .join("disable_ipv6"),
        "1",
    );
    let address = Address {
        link: veth.index,
        address: pool.host(),
        prefix: 32,
    };
    step("address", || links.ensure_address(address))?;
    Ok(veth)
}

/// Enables the host's end, and routes the guests' network through it.
///
/// # Errors
/// The kernel refuses.
pub(super) fn enable(links: &mut Links, veth: &Link, pool: Pool) -> Result<(), HostOpError> {
    if !veth.up {
        step("enable-veth", || links.set_up(veth.index, true))?;
    }
    let route = Route {
        table: TABLE_MAIN,
        destination: pool.guests(),
        link: Some(veth.index),
        gateway: Some(pool.uplink()),
        source: Some(pool.host()),
    };
    Ok(step("route", || links.ensure_route(&route))?)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_20_of_a_private_network_is_a_pool() {
        for good in [
            [172, 16, 0, 0],
            [172, 31, 240, 0],
            [10, 9, 16, 0],
            [192, 168, 0, 0],
        ] {
            assert!(check_pool(Pool::at(good.into())).is_ok());
        }
        for bad in [
            [172, 32, 0, 0],
            [8, 8, 0, 0],
            [127, 0, 0, 0],
            [224, 0, 0, 0],
            [198, 18, 0, 0],
        ] {
            assert!(check_pool(Pool::at(bad.into())).is_err());
        }
        for bad in ["10.0.0.0/8", "172.16.0.0/21", "0.0.0.0/0", "172.16.0.0/12"] {
            let pool: Pool = serde_json::from_str(&format!("\"{bad}\"")).unwrap();
            assert!(check_pool(pool).is_err(), "{bad}");
        }
    }
}
