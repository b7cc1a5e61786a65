//! The host's own network: what its routes cover, and what root's operations on it could not do.

use super::links::{HALF, Links, NetlinkError};
use super::needed::needed;
use super::nft::NftError;
use crate::exec::ExecError;
use crate::host_side::{HelperError, LedgerError};
use banger_core::addr::Ipv4Net;
use banger_core::id::InstanceId;
use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;

/// What a host operation could not do.
#[derive(Debug, thiserror::Error)]
pub enum HostOpError {
    /// The kernel refused a request about the network.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The instance's table could not be loaded into the host's packet filter.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// The records of what belongs to whom could not be read or written.
    #[error("cannot read or write the records in `/run/banger`")]
    Ledger(#[from] LedgerError),
    /// systemd-resolved could not be told.
    #[error("cannot tell systemd-resolved of the names below `.vm`")]
    Resolved(#[source] ExecError),
    /// The helper could not be reached, or did not do it.
    #[error(transparent)]
    Helper(#[from] HelperError),
    /// A setting of the kernel could not be read or changed.
    #[error("cannot use the setting `{}`", path.display())]
    Setting {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody else's route covers a part of the pool.
    #[error("the host's {route} overlaps the guests' network {pool}; choose another pool")]
    RouteInTheWay {
        /// The route, as `route 172.16.0.0/12 via 10.0.0.1 dev eth0`.
        route: String,
        /// The pool.
        pool: Ipv4Net,
    },
    /// The host reaches somebody by an address of the pool.
    #[error("the host's {what} {address} lies in the guests' network {pool}; choose another pool")]
    AddressInTheWay {
        /// What it is to the host: a gateway, a name server.
        what: &'static str,
        /// The address.
        address: Ipv4Addr,
        /// The pool.
        pool: Ipv4Net,
    },
    /// Not a network that guests may have.
    #[error("{0} cannot be a pool: it must be a /20 of a private network, such as 172.16.16.0/20")]
    BadPool(Ipv4Net),
    /// The instance's veth has other addresses.
    #[error("instance {instance} has the pool {attached}, not {asked}")]
    OtherPool {
        /// The instance.
        instance: InstanceId,
        /// What it was attached with.
        attached: Ipv4Net,
        /// What is asked for now.
        asked: Ipv4Net,
    },
    /// The name server is none of the instance's addresses.
    #[error("{dns} is not an address of the instance's pool {pool}")]
    BadNameServer {
        /// The address.
        dns: Ipv4Addr,
        /// The pool.
        pool: Ipv4Net,
    },
    /// The veth is needed first.
    #[error("the veth of instance {0} is not attached")]
    NotAttached(InstanceId),
    /// One user may not have so many.
    #[error("uid {uid} has {limit} instances attached already, which is the limit")]
    TooManyInstances {
        /// The user.
        uid: u32,
        /// The limit.
        limit: usize,
    },
    /// Made by somebody else.
    #[error("{what} `{name}` is not ours: it does not say `{tag}`")]
    Foreign {
        /// What it is.
        what: &'static str,
        /// Its name.
        name: String,
        /// What it should say.
        tag: String,
    },
    /// The device of a default route has a name that no rule can carry.
    #[error("the device name `{}` cannot be put into a rule", .0.escape_debug())]
    OddName(String),
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
    /// The descriptor is something else.
    #[error("the descriptor is no network namespace but `{}`", .0.escape_debug())]
    NotANamespace(String),
    /// The namespace belongs to another user, or is the host's.
    #[error(
        "the network namespace `{word}` is not one that uid {uid} made (its owner is uid {owner})"
    )]
    ForeignNamespace {
        /// The kernel's word for it.
        word: String,
        /// Whose it is.
        owner: u32,
        /// Who gave it.
        uid: u32,
    },
    /// A snapshot could not be made, found or removed.
    #[error(transparent)]
    Snapshot(#[from] crate::storage::ops::SnapshotError),
    /// Changes that others make are not heard of any more.
    #[error("cannot hear of changes of the host's network")]
    Watch(#[source] io::Error),
    /// The namespace could not be entered.
    #[error("cannot enter the instance's network namespace")]
    Enter(#[source] io::Error),
    /// The veth vanished while it was set up.
    #[error("link `{0}` vanished while it was set up")]
    Vanished(String),
}

/// Every IPv4 network that this host has a route to or an address of (routes to everywhere are left out), and its
/// gateways, neighbours and name servers, for the choice of a pool.
///
/// # Errors
/// The kernel's tables cannot be read.
pub fn host_routes() -> Result<Vec<Ipv4Net>, HostOpError> {
    let mut links = Links::new();
    let routes = links.routes()?.into_iter().map(|route| route.destination);
    let mut networks: Vec<Ipv4Net> = routes.filter(|network| network.prefix() > HALF).collect();
    for address in links.addresses()? {
        networks.push(Ipv4Net::new(address.address, address.prefix));
    }
    let needed = needed(&mut links)?.into_iter();
    networks.extend(needed.map(|needed| Ipv4Net::new(needed.address, 32)));
    networks.sort_unstable_by_key(|network| (network.base(), network.prefix()));
    networks.dedup();
    Ok(networks)
}
