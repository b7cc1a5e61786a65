//! Ports of the host that lead into guests.
//!
//! The host's socket is bound outside and handed in; what it hears is carried to the guest from inside the namespace,
//! so it needs neither a route nor a rule on the host. Each publication is one thread that waits for events. What it
//! holds is bounded, and a guest that does not answer costs a place for ten seconds.

mod tcp;
mod udp;

use crate::op::{Protocol, Publication, PublicationState};
use rustix::fd::OwnedFd;
use rustix::net::SocketType;
use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// A port could not be published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The socket that must come with it did not come.
    #[error("no socket came with {protocol} {listen}")]
    NoSocket {
        /// TCP or UDP.
        protocol: Protocol,
        /// Where.
        listen: SocketAddr,
    },
    /// It is not the socket it is said to be.
    #[error("the socket that came is not one that hears {protocol} at {listen}")]
    WrongSocket {
        /// TCP or UDP.
        protocol: Protocol,
        /// Where.
        listen: SocketAddr,
    },
    /// There is no room for more.
    #[error("cannot serve {protocol} {listen}")]
    Start {
        /// TCP or UDP.
        protocol: Protocol,
        /// Where.
        listen: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What has passed through a publication.
#[derive(Debug, Default)]
struct Figures {
    connections: AtomicU32,
    served: AtomicU64,
    failed: AtomicU64,
}

impl Figures {
    fn began(&self, connections: usize) {
        self.served.fetch_add(1, Ordering::Relaxed);
        self.now(connections);
    }

    fn failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    fn now(&self, connections: usize) {
        let connections = u32::try_from(connections).unwrap_or(u32::MAX);
        self.connections.store(connections, Ordering::Relaxed);
    }
}

/// One that is served.
#[derive(Debug)]
struct Served {
    publication: Publication,
    figures: Arc<Figures>,
    /// The thread ends with it.
    stop: io::PipeWriter,
    thread: JoinHandle<()>,
}

impl Served {
    /// Closes all its sockets before it returns.
    fn end(self) {
        drop(self.stop);
        let _ = self.thread.join();
    }
}

type Key = (Protocol, SocketAddr);

/// All that are served.
#[derive(Debug, Default)]
pub(crate) struct Publications {
    served: Mutex<BTreeMap<Key, Served>>,
}

impl Publications {
    fn served(&self) -> MutexGuard<'_, BTreeMap<Key, Served>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves `publication` with the one socket of `descriptors`, in place of another with the same protocol and place.
    pub(crate) fn publish(
        &self,
        publication: &Publication,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), PublishError> {
        let Publication {
            protocol, listen, ..
        } = *publication;
        let key = (protocol, listen);
        let mut descriptors = descriptors.into_iter();
        let (Some(socket), None) = (descriptors.next(), descriptors.next()) else {
            return Err(PublishError::NoSocket { protocol, listen });
        };
        if !hears(&socket, protocol, listen) {
            return Err(PublishError::WrongSocket { protocol, listen });
        }
        let mut served = self.served();
        if let Some(there) = served.remove(&key) {
            if there.publication == *publication {
                served.insert(key, there);
                return Ok(());
            }
            there.end();
        }
        let failed = |source| PublishError::Start {
            protocol,
            listen,
            source,
        };
        let started = serve(publication, socket).map_err(failed)?;
        served.insert(key, started);
        Ok(())
    }

    /// Ends one; says whether it was there.
    pub(crate) fn unpublish(&self, protocol: Protocol, listen: SocketAddr) -> bool {
        let mut served = self.served();
        let there = served.remove(&(protocol, listen));
        there.map(Served::end).is_some()
    }

    /// Ends all of a TAP.
    pub(crate) fn end_of(&self, tap: &str) {
        let mut served = self.served();
        for (_, ended) in served.extract_if(.., |_, one| one.publication.tap == tap) {
            ended.end();
        }
    }

    /// All, by protocol and place.
    pub(crate) fn list(&self) -> Vec<PublicationState> {
        let served = self.served();
        let state = |one: &Served| PublicationState {
            publication: one.publication.clone(),
            connections: one.figures.connections.load(Ordering::Relaxed),
            served: one.figures.served.load(Ordering::Relaxed),
            failed: one.figures.failed.load(Ordering::Relaxed),
        };
        served.values().map(state).collect()
    }
}

/// Whether `socket` is what was promised.
fn hears(socket: &OwnedFd, protocol: Protocol, listen: SocketAddr) -> bool {
    let kind = match protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let listening = || rustix::net::sockopt::socket_acceptconn(socket) == Ok(true);
    let place = rustix::net::getsockname(socket).map(SocketAddr::try_from);
    rustix::net::sockopt::socket_type(socket) == Ok(kind)
        && place == Ok(Ok(listen))
        && (protocol == Protocol::Udp || listening())
}

fn serve(publication: &Publication, socket: OwnedFd) -> io::Result<Served> {
    let (stopped, stop) = io::pipe()?;
    let figures = Arc::new(Figures::default());
    let counted = Arc::clone(&figures);
    let guest = publication.guest;
    rustix::io::ioctl_fionbio(&socket, true)?;
    let thread = std::thread::Builder::new().name(format!("published {}", publication.protocol));
    let thread = match publication.protocol {
        Protocol::Tcp => {
            let listener = TcpListener::from(socket);
            thread.spawn(move || tcp::Forwarder::new(listener, guest, counted).run(&stopped))
        }
        Protocol::Udp => {
            let socket = UdpSocket::from(socket);
            thread.spawn(move || udp::Forwarder::new(socket, guest, counted).run(&stopped))
        }
    }?;
    Ok(Served {
        publication: publication.clone(),
        figures,
        stop,
        thread,
    })
}
