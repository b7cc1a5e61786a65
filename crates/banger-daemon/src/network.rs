//! The network actor: the one owner of the instance's namespace. VM actors hold leases of ports.
//!
//! The namespace is made when the first port is asked for, and is found again after a restart of the daemon through
//! its keeper's socket. It ends with the last holder of the keeper's pipe.

use banger_api::daemon::Mode;
use banger_core::addr::Pool;
use banger_core::id::InstanceId;
use banger_host::net::host;
use banger_host::net::keeper::{Keeper, KeeperError};
use banger_host::op::{HostOp, NamespaceAnswer, NamespaceOp, Port, PortState};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

const QUEUE: usize = 256;

/// Why the network did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    #[error("the instance's network namespace cannot be used")]
    Keeper(#[from] KeeperError),
    #[error("the host's end of the network cannot be set up")]
    Host(#[from] host::HostOpError),
    #[error("a descriptor of the network namespace cannot be copied")]
    Descriptor(#[source] std::io::Error),
    #[error("the keeper of the network namespace answered something else")]
    Answer,
    #[error("the network's actor has ended")]
    Closed,
}

/// What a VM needs to live on the network: descriptors for its shim.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) keepalive: OwnedFd,
    pub(crate) network_namespace: OwnedFd,
    pub(crate) user_namespace: Option<OwnedFd>,
}

/// What the actor must know.
#[derive(Debug, Clone)]
pub(crate) struct NetworkSetup {
    pub(crate) instance: InstanceId,
    pub(crate) pool: Pool,
    pub(crate) mode: Mode,
    pub(crate) keeper_program: PathBuf,
    pub(crate) keeper_socket: PathBuf,
}

type Reply<T> = oneshot::Sender<Result<T, NetworkError>>;

enum Ask {
    Lease(Port, Reply<Lease>),
    Release(String, Reply<()>),
    List(Reply<Vec<PortState>>),
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
        // Its work is system calls on netlink and a local socket: a thread of its own, not the async runtime's.
        std::thread::spawn(move || {
            let mut actor = Actor {
                setup,
                namespace: None,
            };
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

    /// Makes a port and everything below it.
    pub(crate) async fn lease(&self, port: Port) -> Result<Lease, NetworkError> {
        self.ask(|reply| Ask::Lease(port, reply)).await
    }

    /// Removes a port; no error if it is gone, or the whole namespace with it.
    pub(crate) async fn release(&self, tap: String) -> Result<(), NetworkError> {
        self.ask(|reply| Ask::Release(tap, reply)).await
    }

    /// All ports; none if there is no namespace.
    pub(crate) async fn list(&self) -> Result<Vec<PortState>, NetworkError> {
        self.ask(Ask::List).await
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

    /// Lets go of the namespace: without VMs it ends, and the veth with it.
    pub(crate) async fn close(&self) -> Result<(), NetworkError> {
        self.ask(Ask::Close).await
    }
}

struct Namespace {
    keeper: Arc<Keeper>,
    keepalive: OwnedFd,
    network: OwnedFd,
    user: Option<OwnedFd>,
    /// Bridge, ruleset and veth are there.
    prepared: bool,
}

struct Actor {
    setup: NetworkSetup,
    namespace: Option<Namespace>,
}

impl Actor {
    fn handle(&mut self, ask: Ask) {
        // A caller that went away no longer wants the answer.
        match ask {
            Ask::Lease(port, reply) => drop(reply.send(self.lease(port))),
            Ask::Release(tap, reply) => drop(reply.send(self.release(tap))),
            Ask::List(reply) => drop(reply.send(self.list())),
            Ask::Keeper(reply) => {
                let keeper = self.ensure().map(|namespace| Arc::clone(&namespace.keeper));
                drop(reply.send(keeper));
            }
            Ask::Close(reply) => drop(reply.send(self.close())),
        }
    }

    /// Finds a namespace that an earlier daemon left to its VMs, if there is one.
    fn adopt(&mut self) -> Result<(), NetworkError> {
        if self.namespace.is_some() {
            return Ok(());
        }
        match Keeper::connect(&self.setup.keeper_socket) {
            Ok(keeper) => {
                self.namespace = Some(open(keeper)?);
                Ok(())
            }
            Err(KeeperError::Unreachable { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The namespace, made if need be.
    fn ensure(&mut self) -> Result<&mut Namespace, NetworkError> {
        if self
            .namespace
            .as_ref()
            .is_some_and(|namespace| namespace.keeper.request(NamespaceOp::Hello).is_err())
        {
            tracing::warn!("the keeper of the network namespace is gone");
            self.namespace = None;
        }
        self.adopt()?;
        let user_namespace = self.setup.mode == Mode::Rootless;
        let namespace = match self.namespace.take() {
            Some(namespace) => namespace,
            None => {
                let keeper = Keeper::spawn(
                    &self.setup.keeper_program,
                    &self.setup.keeper_socket,
                    user_namespace,
                )?;
                open(keeper)?
            }
        };
        Ok(self.namespace.insert(namespace))
    }

    fn lease(&mut self, port: Port) -> Result<Lease, NetworkError> {
        let setup = self.setup.clone();
        let namespace = self.ensure()?;
        if !namespace.prepared {
            namespace
                .keeper
                .request(NamespaceOp::EnsureBase { pool: setup.pool })?;
            if setup.mode == Mode::Root {
                let attach = HostOp::AttachVeth {
                    instance: setup.instance,
                    pool: setup.pool,
                };
                host::perform(&attach, Some(namespace.network.as_fd()))?;
                namespace
                    .keeper
                    .request(NamespaceOp::EnsureUplink { pool: setup.pool })?;
            }
            namespace.prepared = true;
        }
        namespace.keeper.request(NamespaceOp::EnsurePort(port))?;
        let copy = |fd: &OwnedFd| fd.try_clone().map_err(NetworkError::Descriptor);
        Ok(Lease {
            keepalive: copy(&namespace.keepalive)?,
            network_namespace: copy(&namespace.network)?,
            user_namespace: namespace.user.as_ref().map(copy).transpose()?,
        })
    }

    fn release(&mut self, tap: String) -> Result<(), NetworkError> {
        self.adopt()?;
        let Some(namespace) = &self.namespace else {
            return Ok(());
        };
        match namespace.keeper.request(NamespaceOp::RemovePort { tap }) {
            Ok(_) => Ok(()),
            // Without its keeper and without a VM the namespace is gone, and the port with it.
            Err(KeeperError::Unreachable { .. }) => {
                self.namespace = None;
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn list(&mut self) -> Result<Vec<PortState>, NetworkError> {
        self.adopt()?;
        let Some(namespace) = &self.namespace else {
            return Ok(Vec::new());
        };
        match namespace.keeper.request(NamespaceOp::ListPorts)? {
            (NamespaceAnswer::Ports { ports }, _) => Ok(ports),
            _ => Err(NetworkError::Answer),
        }
    }

    fn close(&mut self) -> Result<(), NetworkError> {
        let Some(namespace) = self.namespace.take() else {
            return Ok(());
        };
        let ports = namespace.keeper.request(NamespaceOp::ListPorts);
        let unused =
            matches!(ports, Ok((NamespaceAnswer::Ports { ref ports }, _)) if ports.is_empty());
        if unused && self.setup.mode == Mode::Root {
            host::perform(
                &HostOp::DetachVeth {
                    instance: self.setup.instance,
                },
                None,
            )?;
        }
        let Namespace {
            keeper,
            keepalive,
            network,
            user,
            ..
        } = namespace;
        drop((keepalive, network, user));
        if unused {
            wait_gone(&keeper);
        }
        Ok(())
    }
}

/// Waits until the keeper no longer answers, for at most two seconds.
fn wait_gone(keeper: &Keeper) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(2);
    while std::time::Instant::now() < deadline && keeper.request(NamespaceOp::Hello).is_ok() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

fn open(keeper: Keeper) -> Result<Namespace, NetworkError> {
    let (_, keepalive) = keeper.request(NamespaceOp::Keepalive)?;
    let keepalive = keepalive.into_iter().next().ok_or(NetworkError::Answer)?;
    let (_, namespaces) = keeper.request(NamespaceOp::Namespaces)?;
    let mut namespaces = namespaces.into_iter();
    let network = namespaces.next().ok_or(NetworkError::Answer)?;
    Ok(Namespace {
        keeper: Arc::new(keeper),
        keepalive,
        network,
        user: namespaces.next(),
        prepared: false,
    })
}
