//! Names: the zone that follows the VMs, the file that holds it for other tools, and the server that answers.

use crate::record::VmRecord;
use crate::server::App;
use banger_api::daemon::Mode;
use banger_api::network::{DnsRecord, DnsStatus};
use banger_core::id::VmId;
use banger_core::name::VmName;
use banger_dns::{
    Audience, Config, Listener, Server, ServerHandle, Stats, Zone, records_json, replace_records,
};
use std::collections::{BTreeMap, HashMap};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::{Notify, mpsc};

/// How long the file of names rests after it was written.
const WRITE_PAUSE: Duration = Duration::from_millis(100);

/// All names, and who answers them.
#[derive(Debug)]
pub(crate) struct Names {
    zone: Zone,
    records_file: PathBuf,
    changed: Arc<Notify>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The name that the zone has for a VM.
    named: HashMap<VmId, VmName>,
    /// Those of the namespace, which come and go with it.
    servers: Vec<ServerHandle>,
    loopback: Option<ServerHandle>,
    guests: Option<SocketAddr>,
    host: Option<SocketAddr>,
}

impl Names {
    pub(crate) fn new(zone: Zone, records_file: PathBuf) -> Self {
        Self {
            zone,
            records_file,
            changed: Arc::default(),
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the zone to what the record says. A VM in the trash, or gone, has no name.
    pub(crate) fn follow(&self, record: &VmRecord, purged: bool) {
        let name = (!purged && record.trashed_at.is_none()).then(|| record.name.clone());
        let before = self.zone.changes();
        let mut state = self.state();
        let known = state.named.get(&record.id);
        if known != name.as_ref() {
            // One that was freed may be another VM's by now.
            let moved_on = |known: &VmName| {
                let mut others = state.named.iter().filter(|(id, _)| **id != record.id);
                others.any(|(_, name)| name == known)
            };
            if let Some(known) = known.filter(|known| !moved_on(known)) {
                self.zone.remove(known);
            }
            match name {
                Some(name) => {
                    if let Err(error) = self.zone.set(&name, record.address) {
                        tracing::warn!(vm = %record.id, %error, "a VM has no name");
                    }
                    state.named.insert(record.id, name);
                }
                None => {
                    state.named.remove(&record.id);
                }
            }
        }
        let nat = record.spec.nat && state.named.contains_key(&record.id);
        let told = self.zone.set_nat(record.address, nat).and_then(|()| {
            let private = nat && record.spec.nat_private;
            self.zone.set_private(record.address, private)
        });
        if let Err(error) = told {
            tracing::debug!(vm = %record.id, %error, "it is no guest of this pool");
        }
        if self.zone.changes() != before {
            self.changed.notify_one();
        }
    }

    /// Serves guests and host on sockets of the namespace, in place of earlier ones.
    fn serve(&self, sockets: Vec<OwnedFd>) {
        let mut sockets = sockets.into_iter();
        let mut listeners = Vec::new();
        for audience in [Audience::Guests, Audience::Host] {
            let (Some(udp), Some(tcp)) = (sockets.next(), sockets.next()) else {
                break;
            };
            match listener(udp.into(), tcp.into(), audience) {
                Ok(listener) => listeners.push(listener),
                Err(error) => tracing::warn!(%error, "a socket for the name server is of no use"),
            }
        }
        let mut state = self.state();
        state.servers.clear();
        for listener in listeners {
            let address = listener.udp.local_addr().ok();
            let audience = listener.audience;
            match Server::start(vec![listener], self.zone.clone(), Config::default()) {
                Ok(server) => {
                    state.servers.push(server);
                    match audience {
                        Audience::Guests => state.guests = address,
                        Audience::Host => state.host = address,
                    }
                }
                Err(error) => tracing::warn!(%error, "the name server does not start"),
            }
        }
    }

    /// Serves the host on its loopback, where it cannot reach into the namespace.
    fn serve_loopback(&self) -> std::io::Result<()> {
        // A number that is free for one protocol may be taken for the other.
        let mut tries = 8;
        let (udp, tcp, place) = loop {
            let udp = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
            let place = udp.local_addr()?;
            match std::net::TcpListener::bind(place) {
                Ok(tcp) => break (udp, tcp, place),
                Err(error) if tries == 0 => return Err(error),
                Err(_) => tries -= 1,
            }
        };
        udp.set_nonblocking(true)?;
        tcp.set_nonblocking(true)?;
        let listener = listener(udp, tcp, Audience::Host)?;
        let server = Server::start(vec![listener], self.zone.clone(), Config::default())
            .map_err(std::io::Error::other)?;
        let mut state = self.state();
        state.loopback = Some(server);
        state.host = Some(place);
        Ok(())
    }

    fn write_records(&self) {
        if let Err(error) = replace_records(&self.records_file, &records_json(&self.zone)) {
            tracing::warn!(
                error = banger_host::error_chain(&error),
                "names are not in their file"
            );
        }
    }
}

fn listener(
    udp: std::net::UdpSocket,
    tcp: std::net::TcpListener,
    audience: Audience,
) -> std::io::Result<Listener> {
    Ok(Listener {
        udp: UdpSocket::from_std(udp)?,
        tcp: TcpListener::from_std(tcp)?,
        audience,
    })
}

/// Serves whatever sockets the network hands over, and keeps the file of names, for as long as the daemon lives.
pub(crate) async fn keep_serving(app: App, mut sockets: mpsc::Receiver<Vec<OwnedFd>>) {
    let names = &app.world.names;
    if app.world.mode == Mode::Rootless
        && let Err(error) = names.serve_loopback()
    {
        tracing::warn!(%error, "the host has no name server");
    }
    names.write_records();
    loop {
        tokio::select! {
            handed = sockets.recv() => match handed {
                Some(handed) => names.serve(handed),
                None => return,
            },
            () = names.changed.notified() => {
                names.write_records();
                // A thousand VMs made at once are not written a thousand times.
                tokio::time::sleep(WRITE_PAUSE).await;
            }
        }
    }
}

/// The names and their server, on the wire.
pub(crate) async fn status(app: &App) -> DnsStatus {
    let names = &app.world.names;
    let now = app.world.network.now().await;
    let host_names = match now.ok().and_then(|now| now.host_names) {
        Some(told) => told,
        None if app.world.mode == Mode::Rootless => {
            "ask the server on the loopback, or use `banger vm ssh`: without root the host's resolver is not told"
                .to_owned()
        }
        None => "told when the first VM starts".to_owned(),
    };
    let state = names.state();
    let mut counters = BTreeMap::new();
    for server in state.servers.iter().chain(&state.loopback) {
        count(&mut counters, &server.stats());
    }
    let entries = names.zone.list().into_iter();
    DnsStatus {
        guests: state.guests,
        host: state.host,
        host_names,
        records_file: names.records_file.display().to_string(),
        records: entries
            .map(|entry| DnsRecord {
                name: format!("{}.vm", entry.name),
                address: entry.address,
            })
            .collect(),
        counters,
    }
}

fn count(counters: &mut BTreeMap<String, u64>, stats: &Stats) {
    for (name, value) in [
        ("queries", stats.queries),
        ("answered", stats.answered),
        ("refused", stats.refused),
        ("malformed", stats.malformed),
        ("failed", stats.failed),
        ("dropped", stats.dropped),
        ("forwarded", stats.forwarded),
        ("rebinding", stats.rebinding),
    ] {
        *counters.entry(name.to_owned()).or_default() += value;
    }
}
