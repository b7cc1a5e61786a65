//! The instance's namespace as the actor holds it.

use super::plan::{self, Place, Plans};
use super::{NetworkError, NetworkSetup};
use banger_api::daemon::Mode;
use banger_core::publish::Protocol;
use banger_host::net::keeper::{Keeper, KeeperError};
use banger_host::op::{NamespaceAnswer, NamespaceOp, PortState, Publication, PublicationState};
use banger_vmm::process;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// What a keeper of an earlier version says to an operation that it does not know.
const NOT_KNOWN: &str = "the request is not understood";

/// How long the end of a keeper is waited for that nobody needs any more.
const KEEPER_ENDS_WITHIN: Duration = Duration::from_secs(5);

/// A namespace with its keeper, and what is known to be in it.
pub(super) struct Namespace {
    pub(super) keeper: Arc<Keeper>,
    pub(super) keepalive: OwnedFd,
    pub(super) network: OwnedFd,
    pub(super) user: Option<OwnedFd>,
    /// Bridge, ruleset and veth are there.
    pub(super) prepared: bool,
    pub(super) nat: BTreeSet<Ipv4Addr>,
    /// Who of them reaches private networks, too.
    pub(super) private: BTreeSet<Ipv4Addr>,
    pub(super) joins: BTreeSet<(Ipv4Addr, Ipv4Addr)>,
    pub(super) published: BTreeMap<Place, Publication>,
}

impl Namespace {
    /// Takes hold of a keeper's namespace and reads what is in it.
    pub(super) fn open(keeper: Keeper) -> Result<Self, NetworkError> {
        let (_, keepalive) = keeper.request(NamespaceOp::Keepalive)?;
        let keepalive = keepalive.into_iter().next().ok_or(NetworkError::Answer)?;
        let (_, namespaces) = keeper.request(NamespaceOp::Namespaces)?;
        let mut namespaces = namespaces.into_iter();
        let network = namespaces.next().ok_or(NetworkError::Answer)?;
        let mut namespace = Self {
            keeper: Arc::new(keeper),
            keepalive,
            network,
            user: namespaces.next(),
            prepared: false,
            nat: BTreeSet::new(),
            private: BTreeSet::new(),
            joins: BTreeSet::new(),
            published: BTreeMap::new(),
        };
        namespace.look()?;
        Ok(namespace)
    }

    /// Whether its keeper still answers.
    pub(super) fn lives(&self) -> bool {
        self.keeper.request(NamespaceOp::Hello).is_ok()
    }

    /// Another keeper in this namespace, whose own is gone.
    pub(super) fn rejoin(&self, setup: &NetworkSetup) -> Result<Self, NetworkError> {
        let own = |fd: &OwnedFd| {
            PathBuf::from(format!(
                "/proc/{}/fd/{}",
                std::process::id(),
                fd.as_raw_fd()
            ))
        };
        let user = self.user.as_ref().map(own).unwrap_or_default();
        join(setup, &own(&self.network), &user)
    }

    fn request(&self, op: NamespaceOp) -> Result<NamespaceAnswer, KeeperError> {
        self.keeper.request(op).map(|(answer, _)| answer)
    }

    /// Measures what is in it. What a keeper of an earlier version does not know, it has not.
    pub(super) fn look(&mut self) -> Result<(), NetworkError> {
        self.nat = match self.known(NamespaceOp::ListNat)? {
            Some(NamespaceAnswer::Nat { addresses }) => addresses.into_iter().collect(),
            Some(_) => return Err(NetworkError::Answer),
            None => BTreeSet::new(),
        };
        self.private = match self.known(NamespaceOp::ListPrivate)? {
            Some(NamespaceAnswer::Nat { addresses }) => addresses.into_iter().collect(),
            Some(_) => return Err(NetworkError::Answer),
            None => BTreeSet::new(),
        };
        self.joins = match self.known(NamespaceOp::ListJoins)? {
            Some(NamespaceAnswer::Joins { joins }) => joins.into_iter().collect(),
            Some(_) => return Err(NetworkError::Answer),
            None => BTreeSet::new(),
        };
        self.published = self
            .publications()?
            .into_iter()
            .map(|state| (plan::place(&state.publication), state.publication))
            .collect();
        Ok(())
    }

    pub(super) fn known(&self, op: NamespaceOp) -> Result<Option<NamespaceAnswer>, NetworkError> {
        match self.request(op) {
            Ok(answer) => Ok(Some(answer)),
            Err(KeeperError::Refused { why, .. }) if why.contains(NOT_KNOWN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn publications(&self) -> Result<Vec<PublicationState>, NetworkError> {
        match self.known(NamespaceOp::ListPublished)? {
            Some(NamespaceAnswer::Published { publications }) => Ok(publications),
            Some(_) => Err(NetworkError::Answer),
            None => Ok(Vec::new()),
        }
    }

    pub(super) fn ports(&self) -> Result<Vec<PortState>, NetworkError> {
        match self.request(NamespaceOp::ListPorts)? {
            NamespaceAnswer::Ports { ports } => Ok(ports),
            _ => Err(NetworkError::Answer),
        }
    }

    /// The links that all guests share, where they are enabled.
    pub(super) fn links(&self) -> Result<BTreeSet<String>, NetworkError> {
        match self.known(NamespaceOp::ListLinks)? {
            Some(NamespaceAnswer::Links { links }) => Ok(links.into_iter().collect()),
            Some(_) => Err(NetworkError::Answer),
            None => Ok(BTreeSet::new()),
        }
    }

    /// Lets a guest out, or no longer. Nothing is asked if it is so already.
    pub(super) fn set_nat(&mut self, address: Ipv4Addr, on: bool) -> Result<(), NetworkError> {
        if self.nat.contains(&address) == on {
            return Ok(());
        }
        self.request(NamespaceOp::SetNat { address, on })?;
        if on {
            self.nat.insert(address);
        } else {
            self.nat.remove(&address);
        }
        Ok(())
    }

    /// As [`Namespace::set_nat`], for private networks.
    pub(super) fn set_private(&mut self, address: Ipv4Addr, on: bool) -> Result<(), NetworkError> {
        if self.private.contains(&address) == on {
            return Ok(());
        }
        self.request(NamespaceOp::SetPrivate { address, on })?;
        if on {
            self.private.insert(address);
        } else {
            self.private.remove(&address);
        }
        Ok(())
    }

    /// Closes the host's own addresses to all guests.
    pub(super) fn close_host(&self, addresses: &BTreeSet<Ipv4Addr>) -> Result<(), NetworkError> {
        let addresses = addresses.iter().copied().collect();
        self.known(NamespaceOp::SetHostAddresses { addresses })?;
        Ok(())
    }

    /// Makes `joins` all that there are.
    pub(super) fn set_joins(
        &mut self,
        joins: BTreeSet<(Ipv4Addr, Ipv4Addr)>,
    ) -> Result<(), NetworkError> {
        let changes = self.joins.symmetric_difference(&joins);
        for &(one, other) in changes {
            let on = joins.contains(&(one, other));
            self.request(NamespaceOp::SetJoin { one, other, on })?;
        }
        self.joins = joins;
        Ok(())
    }

    /// Listens on the host and leads the port into the guest. Nothing is done if it is so already. What leads to
    /// another guest there is closed, unless that one lives.
    pub(super) fn publish(
        &mut self,
        publication: &Publication,
        live: &Plans,
    ) -> Result<(), NetworkError> {
        let place = plan::place(publication);
        match self.published.get(&place) {
            Some(found) if found == publication => return Ok(()),
            Some(found) if plan::holds(live, found, &publication.tap) => {
                return Err(NetworkError::Taken {
                    protocol: publication.protocol,
                    listen: publication.listen,
                    guest: found.guest,
                });
            }
            Some(_) => self.unpublish(place)?,
            None => {}
        }
        let listener = listen(place).map_err(|source| NetworkError::Listen {
            protocol: publication.protocol,
            listen: publication.listen,
            source,
        })?;
        let op = NamespaceOp::Publish(publication.clone());
        self.keeper.request_with(op, &[listener.as_fd()])?;
        self.published.insert(place, publication.clone());
        Ok(())
    }

    pub(super) fn unpublish(&mut self, place: Place) -> Result<(), NetworkError> {
        let (protocol, listen) = place;
        self.request(NamespaceOp::Unpublish { protocol, listen })?;
        self.published.remove(&place);
        Ok(())
    }

    /// Forgets what went with a port.
    pub(super) fn forget(&mut self, tap: &str, address: Ipv4Addr) {
        self.published
            .retain(|_, publication| publication.tap != tap);
        self.nat.remove(&address);
        self.private.remove(&address);
        self.joins
            .retain(|&(one, other)| one != address && other != address);
    }
}

fn listen((protocol, listen): Place) -> std::io::Result<OwnedFd> {
    Ok(match protocol {
        Protocol::Tcp => TcpListener::bind(listen)?.into(),
        Protocol::Udp => UdpSocket::bind(listen)?.into(),
    })
}

/// Starts a keeper in new namespaces.
pub(super) fn make(
    program: &Path,
    socket: &Path,
    user_namespace: bool,
) -> Result<Namespace, NetworkError> {
    Namespace::open(Keeper::spawn(program, socket, user_namespace)?)
}

/// Starts a keeper in a namespace that has lost its own. `network` and `user` are files like `/proc/PID/ns/net`.
pub(super) fn join(
    setup: &NetworkSetup,
    network: &Path,
    user: &Path,
) -> Result<Namespace, NetworkError> {
    let user = (setup.mode != Mode::Root).then_some(user);
    let keeper = Keeper::join(&setup.keeper_program, &setup.keeper_socket, network, user)?;
    Namespace::open(keeper)
}

/// Lets the namespace go, and waits until its keeper has ended and with it, where nobody else holds it, the namespace.
/// A process of ours that is about to end may still hold it: then the keeper ends a moment later by itself.
pub(super) fn let_go(namespace: Namespace) {
    let keeper = namespace.keeper.request(NamespaceOp::Hello);
    let ended = match keeper {
        Ok((NamespaceAnswer::Hello { pid, .. }, _)) => process::open(pid).ok(),
        _ => None,
    };
    drop(namespace);
    if let Some(ended) = ended
        && !matches!(process::wait_any(&[ended], KEEPER_ENDS_WITHIN), Ok(true))
    {
        tracing::warn!("the namespace's keeper has not ended yet");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    #[test]
    fn a_place_that_is_taken_is_an_error_that_says_so() {
        let taken = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let place = (Protocol::Tcp, taken.local_addr().unwrap());
        assert_eq!(
            listen(place).unwrap_err().kind(),
            std::io::ErrorKind::AddrInUse
        );
    }
}
