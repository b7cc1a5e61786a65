//! The network: one actor owns the instance's namespace and what it has on the host. The plan of a VM's start gets
//! descriptors for its shim.
//!
//! ```text
//!   VM actors --PortPlan--> actor --NamespaceOp--> keeper (in the namespace)
//!                             |----HostOp--------> host side (in process, or banger-helper)
//!                             +----sockets-------> names (the DNS server)
//! ```
//!
//! The namespace is made when the first port is asked for, and is found again after a restart of the daemon through
//! its keeper's socket. It ends with the last holder of the keeper's pipe.

mod actor;
mod error;
mod host_watch;
mod namespace;
mod plan;
mod repair;
pub(crate) mod status;
mod way_out;

pub(crate) use actor::ROUTED as HOST_NAMES_ROUTED;
pub(crate) use error::{NetworkError, network_error};
pub(crate) use plan::{Part, PortPlan};
pub(crate) use repair::Repaired;

use actor::Actor;
use banger_api::daemon::Mode;
use banger_api::network::WayOut;
use banger_core::addr::Pool;
use banger_core::id::{InstanceId, VmId};
use banger_core::publish::Protocol;
use banger_dns::Zone;
use banger_host::host_side::HostSide;
use banger_host::net::keeper::Keeper;
use banger_host::op::{Dropped, NamespaceOp, OwnedObject, PortState, PublicationState};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

const QUEUE: usize = 256;

/// What a VM needs to live on the network: descriptors for its shim.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) keepalive: OwnedFd,
    pub(crate) network_namespace: OwnedFd,
    pub(crate) user_namespace: Option<OwnedFd>,
    /// What the VM should have and has not: a port that cannot be published, a way out that is closed. It runs all
    /// the same.
    pub(crate) problems: Vec<NetworkError>,
}

/// What the actor must know.
#[derive(Debug)]
pub(crate) struct NetworkSetup {
    pub(crate) instance: InstanceId,
    pub(crate) pool: Pool,
    pub(crate) mode: Mode,
    /// Who does what needs root; nobody in rootless mode.
    pub(crate) host: Option<Arc<HostSide>>,
    pub(crate) keeper_program: PathBuf,
    pub(crate) keeper_socket: PathBuf,
    pub(crate) pasta: PathBuf,
    /// Takes sockets of a name server for guests and host.
    pub(crate) names: mpsc::Sender<Vec<OwnedFd>>,
    /// No name in it leads a guest to the host's own addresses.
    pub(crate) zone: Zone,
}

/// What is there of the network now.
#[derive(Debug, Default)]
pub(crate) struct Now {
    /// The keeper's process.
    pub(crate) keeper: Option<i32>,
    pub(crate) ports: Vec<PortState>,
    pub(crate) nat: Vec<Ipv4Addr>,
    pub(crate) private: Vec<Ipv4Addr>,
    pub(crate) published: Vec<PublicationState>,
    pub(crate) dropped: BTreeMap<String, Dropped>,
    pub(crate) repairs: u64,
    pub(crate) way_out: Option<WayOut>,
    /// Whether, and how, the host's own programs find names below `.vm`.
    pub(crate) host_names: Option<String>,
    /// What the caller has on the host side.
    pub(crate) owned: Vec<OwnedObject>,
    /// Ports that could not be opened.
    pub(crate) problems: Vec<PortProblem>,
}

/// A published port that could not be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PortProblem {
    pub(crate) vm: VmId,
    pub(crate) protocol: Protocol,
    pub(crate) listen: SocketAddr,
    /// The causes, joined.
    pub(crate) why: String,
    pub(crate) hints: Vec<String>,
}

type Reply<T> = oneshot::Sender<Result<T, NetworkError>>;

enum Ask {
    Lease(PortPlan, Reply<Lease>),
    Apply(PortPlan, BTreeSet<Part>, Reply<()>),
    TakeOver(PortPlan, Option<i32>, Reply<()>),
    Release(String, Reply<()>),
    Now(Reply<Now>),
    Repair(Reply<Repaired>),
    Sweep(Reply<()>),
    Settle(Reply<()>),
    HostAddresses(BTreeSet<Ipv4Addr>),
    KeeperEnded,
    Keeper(Reply<Arc<Keeper>>),
    Close(Reply<()>),
}

/// A handle to the network's actor.
#[derive(Debug, Clone)]
pub(crate) struct Network {
    inbox: mpsc::Sender<Ask>,
}

impl Network {
    /// Starts the actor.
    pub(crate) fn start(setup: NetworkSetup) -> Self {
        let (inbox, mut asks) = mpsc::channel(QUEUE);
        // Its work is system calls on netlink and local sockets: a thread of its own, not the async runtime's.
        let own = inbox.downgrade();
        std::thread::spawn(move || {
            let mut actor = Actor::new(setup, own);
            while let Some(ask) = asks.blocking_recv() {
                actor.handle(ask);
            }
        });
        Self { inbox }
    }

    async fn ask<T>(&self, ask: impl FnOnce(Reply<T>) -> Ask) -> Result<T, NetworkError> {
        let (reply, answer) = oneshot::channel();
        self.inbox
            .send(ask(reply))
            .await
            .map_err(|_| NetworkError::Closed)?;
        answer.await.map_err(|_| NetworkError::Closed)?
    }

    /// Makes a VM's port and everything below it, and all that its plan says.
    pub(crate) async fn lease(&self, plan: PortPlan) -> Result<Lease, NetworkError> {
        self.ask(|reply| Ask::Lease(plan, reply)).await
    }

    /// Brings a live VM's network to its plan. Only problems with the `named` parts are errors, and after an error the
    /// network is as the plan before said.
    pub(crate) async fn apply(
        &self,
        plan: PortPlan,
        named: BTreeSet<Part>,
    ) -> Result<(), NetworkError> {
        self.ask(|reply| Ask::Apply(plan, named, reply)).await
    }

    /// As [`Network::apply`], for a VM that an earlier daemon left: if the namespace has lost its keeper, it is that of
    /// its `shim`, where that is known. All problems count, and the plan stays.
    pub(crate) async fn take_over(
        &self,
        plan: PortPlan,
        shim: Option<i32>,
    ) -> Result<(), NetworkError> {
        self.ask(|reply| Ask::TakeOver(plan, shim, reply)).await
    }

    /// Removes a port and all that goes with it; no error if it is gone, or the whole namespace with it.
    pub(crate) async fn release(&self, tap: String) -> Result<(), NetworkError> {
        self.ask(|reply| Ask::Release(tap, reply)).await
    }

    /// What is there; nothing if there is no namespace.
    pub(crate) async fn now(&self) -> Result<Now, NetworkError> {
        self.ask(Ask::Now).await
    }

    /// Measures everything and puts right what differs from the plans. Answers what it did, and what it could not do.
    pub(crate) async fn repair(&self) -> Result<Repaired, NetworkError> {
        self.ask(Ask::Repair).await
    }

    /// Removes what the instance has on the host's side, if nobody lives on its network and no namespace is there.
    pub(crate) async fn sweep(&self) -> Result<(), NetworkError> {
        self.ask(Ask::Sweep).await
    }

    /// All VMs that live have been found: what is on the host for none of them goes.
    pub(crate) async fn settle(&self) -> Result<(), NetworkError> {
        self.ask(Ask::Settle).await
    }

    /// Connects to a guest's TCP port from inside the namespace.
    pub(crate) async fn connect(
        &self,
        address: Ipv4Addr,
        port: u16,
        timeout_ms: u32,
    ) -> Result<OwnedFd, NetworkError> {
        let keeper = self.ask(Ask::Keeper).await?;
        // The guest may take long to answer, so this waits outside the actor.
        let connected = tokio::task::spawn_blocking(move || {
            let (_, descriptors) = keeper.request(NamespaceOp::Connect {
                address,
                port,
                timeout_ms,
            })?;
            descriptors.into_iter().next().ok_or(NetworkError::Answer)
        });
        connected.await.map_err(|_| NetworkError::Closed)?
    }

    /// Lets go of the namespace: without VMs it ends, and all that is on the host with it.
    pub(crate) async fn close(&self) -> Result<(), NetworkError> {
        self.ask(Ask::Close).await
    }
}
