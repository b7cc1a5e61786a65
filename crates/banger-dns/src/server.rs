//! The tasks that serve.

use crate::config::Config;
use crate::forward::{forward, framed};
use crate::limit::Slot;
use crate::route::Audience;
use crate::service::{MOST_QUERY, Service, Step, Transport};
use crate::stats::{Stats, count};
use crate::zone::Zone;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// The most datagrams that are taken before others get their turn.
const BATCH: usize = 64;
/// How long no connection is taken after one could not be: descriptors may be short.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// One address that is served.
#[derive(Debug)]
pub struct Listener {
    /// Bound to one address, not to all of them: replies leave from where they are sent.
    pub udp: UdpSocket,
    /// Bound to the same.
    pub tcp: TcpListener,
    /// Who asks there.
    pub audience: Audience,
}

/// The server cannot be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot tell the address of a DNS socket")]
pub struct StartError {
    #[source]
    source: io::Error,
}

/// The DNS server.
#[derive(Debug)]
pub struct Server;

impl Server {
    /// Serves `zone` on all `listeners`, in tasks of the runtime that this is called from.
    ///
    /// # Errors
    ///
    /// A socket is none.
    pub fn start(
        listeners: Vec<Listener>,
        zone: Zone,
        config: Config,
    ) -> Result<ServerHandle, StartError> {
        let failed = |source| StartError { source };
        let own = listeners
            .iter()
            .map(|listener| listener.udp.local_addr())
            .collect::<Result<_, _>>()
            .map_err(failed)?;
        let service = Arc::new(Service::new(zone, config, own));
        let mut tasks = JoinSet::new();
        for Listener { udp, tcp, audience } in listeners {
            tasks.spawn(serve_udp(Arc::new(udp), audience, service.clone()));
            tasks.spawn(serve_tcp(tcp, audience, service.clone()));
        }
        Ok(ServerHandle { tasks, service })
    }
}

/// A server that runs; dropping it ends it, and closes its sockets soon after.
#[derive(Debug)]
pub struct ServerHandle {
    tasks: JoinSet<()>,
    service: Arc<Service>,
}

impl ServerHandle {
    /// What it did so far.
    pub fn stats(&self) -> Stats {
        self.service.stats()
    }

    /// Ends it. Its sockets are closed when this returns.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

async fn serve_udp(socket: Arc<UdpSocket>, audience: Audience, service: Arc<Service>) {
    let mut buffer = vec![0; MOST_QUERY];
    let mut out = Vec::with_capacity(MOST_QUERY);
    // Ends with this task.
    let mut forwards = JoinSet::new();
    loop {
        tokio::select! {
            ready = socket.readable() => {
                if ready.is_err() {
                    return;
                }
            }
            Some(_) = forwards.join_next() => {}
        }
        for _ in 0..BATCH {
            let (length, peer) = match socket.try_recv_from(&mut buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // Of one datagram, if of anything; the next one is another matter.
                Err(_) => continue,
            };
            let client = peer.ip();
            let message = &buffer[..length];
            let now = service.now();
            match service.take(message, client, audience, Transport::Udp, now, &mut out) {
                Step::Drop => {}
                Step::Reply => {
                    // Where the kernel has no room for it, it is lost, like any datagram.
                    let _ = socket.try_send_to(&out, peer);
                }
                Step::Forward(pending) => {
                    let (socket, service) = (socket.clone(), service.clone());
                    forwards.spawn(async move {
                        let message = forward(&service, &pending).await;
                        let _ = socket.send_to(&message, peer).await;
                    });
                }
            }
        }
        while forwards.try_join_next().is_some() {}
    }
}

async fn serve_tcp(listener: TcpListener, audience: Audience, service: Arc<Service>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    let client = peer.ip();
                    let slot = service.connections.take(client);
                    match slot.filter(|_| service.serves(audience, client)) {
                        Some(slot) => {
                            let service = service.clone();
                            connections.spawn(async move {
                                // Whatever goes wrong with a connection ends that connection.
                                let _ = serve_connection(stream, client, audience, &service, slot).await;
                            });
                        }
                        None => count(&service.counters.dropped),
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "cannot take a DNS connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Answers one query after the other, until the client closes the connection, is too slow or asks for too much.
async fn serve_connection(
    mut stream: TcpStream,
    client: IpAddr,
    audience: Audience,
    service: &Service,
    _slot: Slot,
) -> io::Result<()> {
    let limit = service.config.connection_limit;
    let mut buffer = vec![0; MOST_QUERY];
    let mut out = Vec::new();
    loop {
        let length = timeout(limit, read_frame(&mut stream, &mut buffer)).await??;
        let message = &buffer[..length];
        let now = service.now();
        match service.take(message, client, audience, Transport::Tcp, now, &mut out) {
            Step::Drop => return Ok(()),
            Step::Reply => {}
            Step::Forward(pending) => out = forward(service, &pending).await,
        }
        timeout(limit, stream.write_all(&framed(&out))).await??;
    }
}

/// Reads one message, and gives its length. An error if it is longer than the buffer.
async fn read_frame(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    let length = usize::from(stream.read_u16().await?);
    let Some(part) = buffer.get_mut(..length) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    stream.read_exact(part).await?;
    Ok(length)
}
