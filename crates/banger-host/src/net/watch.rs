//! Hears of changes that anybody makes to the network of the namespace that the calling thread is in: the packet
//! filter's rules, links, routes, and which devices forward.

use super::resolver_starts::ResolverStarts;
use crate::exec::timespec;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use std::io;
use std::time::{Duration, Instant};

/// The groups of changes, as bits: group 7 of the packet filter; links, IPv4 routes and IPv4 settings.
const RULESET: u32 = 1 << 6;
const LINKS: u32 = 1;
const ROUTES: u32 = 1 << 6;
const SETTINGS: u32 = 1 << 23;
/// A burst of changes is over when nothing came for so long, or is told of after so long at the latest.
const QUIET: Duration = Duration::from_millis(20);
const LONGEST_BURST: Duration = Duration::from_millis(200);

/// What has changed since the last time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Changes {
    /// Rules, sets or tables of the packet filter.
    pub ruleset: bool,
    /// Links, routes, or a device's forwarding.
    pub network: bool,
    /// The host's resolver has started.
    pub resolver: bool,
}

/// How a wait for changes ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waited {
    /// Somebody changed something.
    Changed(Changes),
    /// The time limit was over.
    TimedOut,
    /// What was waited for besides can be read, or is hung up.
    Ended,
}

/// What hears of changes. Ours are among them: whoever listens measures before it changes anything.
#[derive(Debug)]
pub struct Watch {
    ruleset: OwnedFd,
    network: OwnedFd,
    resolver: Option<ResolverStarts>,
}

impl Watch {
    /// Listens from now on.
    ///
    /// # Errors
    /// The namespace is not ruled by this process (to hear of rules takes `CAP_NET_ADMIN` in it).
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            ruleset: listen(Some(netlink::NETFILTER), RULESET)?,
            network: listen(None, LINKS | ROUTES | SETTINGS)?,
            resolver: None,
        })
    }

    /// Hears of starts of the host's resolver, too.
    #[must_use]
    pub fn with_resolver(self, resolver: Option<ResolverStarts>) -> Self {
        Self { resolver, ..self }
    }

    /// Waits for changes, and for the end of their burst.
    ///
    /// # Errors
    /// The kernel refuses to wait.
    pub fn wait(
        &self,
        limit: Option<Duration>,
        until: Option<BorrowedFd<'_>>,
    ) -> io::Result<Waited> {
        let mut changes = Changes::default();
        let deadline = limit.map(|limit| Instant::now() + limit);
        let mut burst_ends: Option<Instant> = None;
        loop {
            let left = match burst_ends {
                Some(end) => Some(QUIET.min(end.saturating_duration_since(Instant::now()))),
                None => deadline.map(|end| end.saturating_duration_since(Instant::now())),
            };
            let mut fds = vec![
                PollFd::new(&self.ruleset, PollFlags::IN),
                PollFd::new(&self.network, PollFlags::IN),
            ];
            fds.extend(until.iter().map(|until| PollFd::new(until, PollFlags::IN)));
            let resolver_at = fds.len();
            let resolver = self.resolver.as_ref();
            fds.extend(resolver.map(|resolver| PollFd::new(resolver, PollFlags::IN)));
            let ready = match poll(&mut fds, left.map(timespec).as_ref()) {
                Ok(ready) => ready,
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            let [ruleset, network] = [&fds[0], &fds[1]].map(|fd| !fd.revents().is_empty());
            let hears = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
            if until.is_some() && hears(2) {
                return Ok(Waited::Ended);
            }
            if ready == 0 {
                return Ok(match burst_ends {
                    Some(_) => Waited::Changed(changes),
                    None => Waited::TimedOut,
                });
            }
            if let Some(resolver) = resolver.filter(|_| hears(resolver_at)) {
                changes.resolver |= resolver.drain()?;
            }
            if !ruleset && !network && !changes.resolver {
                continue;
            }
            if ruleset {
                changes.ruleset = true;
                drain(&self.ruleset)?;
            }
            if network {
                changes.network = true;
                drain(&self.network)?;
            }
            let end = *burst_ends.get_or_insert_with(|| Instant::now() + LONGEST_BURST);
            if Instant::now() >= end {
                return Ok(Waited::Changed(changes));
            }
        }
    }
}

/// Joins groups of a netlink protocol; that of links and routes is the one without a number.
pub(super) fn listen(protocol: Option<rustix::net::Protocol>, groups: u32) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        protocol,
    )?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, groups))?;
    Ok(socket)
}

/// Takes all that is there. That something was lost for want of room says enough as well.
pub(super) fn drain(socket: impl AsFd) -> io::Result<()> {
    let mut buffer = [0; 8192];
    loop {
        match rustix::net::recv(socket.as_fd(), &mut buffer[..], RecvFlags::TRUNC) {
            Err(Errno::WOULDBLOCK) => return Ok(()),
            Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
