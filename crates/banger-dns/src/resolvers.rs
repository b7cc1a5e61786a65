//! The resolvers of the host, as its `resolv.conf` names them.

use crate::config::Resolvers;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

const PORT: u16 = 53;
/// As many as the C library asks.
const MOST_RESOLVERS: usize = 3;
/// The most of the file that is read, in bytes.
const MOST_BYTES: u64 = 64 * 1024;
/// How often the file is looked at, at most.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The resolvers cannot be found out.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the host's resolvers from `{}`", .path.display())]
pub struct ResolversError {
    path: PathBuf,
    source: std::io::Error,
}

/// The resolvers that the file at `path` names, in its order. Without the file, or a name server in it, that is the
/// one on this host, as for every other program.
///
/// # Errors
///
/// The file is there and cannot be read.
pub fn host_resolvers(path: &Path) -> Result<Vec<SocketAddr>, ResolversError> {
    let text = match File::open(path).and_then(read_bounded) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        Err(source) => {
            return Err(ResolversError {
                path: path.to_owned(),
                source,
            });
        }
    };
    Ok(parse(&text, interface_index))
}

fn read_bounded(file: File) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    file.take(MOST_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The number of a network interface by its name.
fn interface_index(name: &str) -> Option<u32> {
    if name.is_empty() || name.contains('/') || name.starts_with('.') {
        return None;
    }
    let index = std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).ok()?;
    index.trim().parse().ok()
}

fn parse(text: &str, interface_index: impl Fn(&str) -> Option<u32>) -> Vec<SocketAddr> {
    let mut resolvers: Vec<SocketAddr> = text
        .lines()
        .filter_map(|line| line.strip_prefix("nameserver"))
        .filter(|rest| rest.starts_with([' ', '\t']))
        .filter_map(|rest| rest.split_ascii_whitespace().next())
        .filter_map(|address| socket_address(address, &interface_index))
        .take(MOST_RESOLVERS)
        .collect();
    if resolvers.is_empty() {
        resolvers.push((Ipv4Addr::LOCALHOST, PORT).into());
    }
    resolvers
}

fn socket_address(text: &str, interface_index: impl Fn(&str) -> Option<u32>) -> Option<SocketAddr> {
    let Some((address, scope)) = text.split_once('%') else {
        let address: IpAddr = text.parse().ok()?;
        return Some((address, PORT).into());
    };
    let address: Ipv6Addr = address.parse().ok()?;
    let scope = scope.parse().ok().or_else(|| interface_index(scope))?;
    Some(SocketAddrV6::new(address, PORT, 0, scope).into())
}

/// Who is to be asked now.
#[derive(Debug)]
pub(crate) struct Current {
    /// Read again when it changes.
    path: Option<PathBuf>,
    /// Sockets of this server, which must not be asked: they would ask again.
    own: Vec<SocketAddr>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    looked_at: Option<Duration>,
    stamp: Option<Stamp>,
    resolvers: Arc<[SocketAddr]>,
    /// The one that answered last.
    preferred: usize,
}

/// What differs when a file was changed or replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        Some(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

impl Current {
    pub(crate) fn new(resolvers: Resolvers, own: Vec<SocketAddr>) -> Self {
        let (path, fixed) = match resolvers {
            Resolvers::File(path) => (Some(path), Vec::new()),
            Resolvers::Fixed(fixed) => (None, fixed),
        };
        Self {
            path,
            state: Mutex::new(State {
                looked_at: None,
                stamp: None,
                resolvers: without(&fixed, &own),
                preferred: 0,
            }),
            own,
        }
    }

    /// The resolvers, the one that answered last first. `now` counts from any moment that stays the same. It looks at
    /// the file, if there is one and it was not looked at just before.
    pub(crate) fn at(&self, now: Duration) -> Vec<SocketAddr> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = &self.path
            && state.looked_at.is_none_or(|at| now >= at + LOOK_EVERY)
        {
            self.look(path, &mut state);
            state.looked_at = Some(now);
        }
        let mut resolvers = state.resolvers.to_vec();
        let preferred = state.preferred.min(resolvers.len());
        resolvers.rotate_left(preferred);
        resolvers
    }

    fn look(&self, path: &Path, state: &mut State) {
        let stamp = Stamp::of(path);
        if state.looked_at.is_some() && stamp == state.stamp {
            return;
        }
        match host_resolvers(path) {
            Ok(resolvers) => {
                state.resolvers = without(&resolvers, &self.own);
                state.preferred = 0;
                tracing::info!(resolvers = ?state.resolvers, "resolvers of the host");
            }
            // Those that were known may still be right.
            Err(error) => {
                let source = &error.source;
                tracing::warn!(%error, %source, "keeping to the resolvers that are known");
            }
        }
        state.stamp = stamp;
    }

    /// Remembers who answered, so that the next question does not wait for one who does not.
    pub(crate) fn answered(&self, resolver: SocketAddr) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = state.resolvers.iter().position(|one| *one == resolver) {
            state.preferred = index;
        }
    }
}

fn without(resolvers: &[SocketAddr], own: &[SocketAddr]) -> Arc<[SocketAddr]> {
    resolvers
        .iter()
        .filter(|resolver| !own.iter().any(|own| is_same(**resolver, *own)))
        .copied()
        .collect()
}

/// Whether a datagram to `resolver` comes to the socket bound to `own`.
fn is_same(resolver: SocketAddr, own: SocketAddr) -> bool {
    resolver.port() == own.port()
        && (resolver.ip() == own.ip() || own.ip().is_unspecified() && resolver.ip().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Vec<String> {
        parse(text, |name| (name == "eth0").then_some(7))
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn the_stub_of_systemd_resolved_is_a_resolver() {
        let text = "# This is /run/systemd/resolve/stub-resolv.conf managed by man:systemd-resolved(8).\n\
                    # nameserver 192.0.2.9\n\nnameserver 127.0.0.53\noptions edns0 trust-ad\nsearch lan\n";
        assert_eq!(parsed(text), ["127.0.0.53:53"]);
    }

    #[test]
    fn the_order_of_the_file_stays_and_search_lines_do_not_matter() {
        let text = "search corp.example nameserver\ndomain x\nnameserver 192.0.2.1\n\
                    options timeout:1\nnameserver\t2001:db8::1\n";
        assert_eq!(parsed(text), ["192.0.2.1:53", "[2001:db8::1]:53"]);
    }

    #[test]
    fn link_local_servers_have_their_interface() {
        let text = "nameserver fe80::1%eth0\nnameserver fe80::2%3\nnameserver fe80::3%gone\n";
        assert_eq!(parsed(text), ["[fe80::1%7]:53", "[fe80::2%3]:53"]);
    }

    #[test]
    fn comments_and_what_is_no_address_are_left_out() {
        let text = ";nameserver 192.0.2.1\n#nameserver 192.0.2.2\n nameserver 192.0.2.3\n\
                    nameserver192.0.2.4\nnameserver\nnameserver  \nnameserver ns.example.com\n\
                    nameserver 192.0.2.5 # the router\nnameserver 192.0.2.6;x\n";
        assert_eq!(parsed(text), ["192.0.2.5:53"]);
    }

    #[test]
    fn lines_may_end_as_on_other_systems() {
        assert_eq!(parsed("nameserver 192.0.2.1\r\n"), ["192.0.2.1:53"]);
    }

    #[test]
    fn no_more_are_asked_than_other_programs_ask() {
        let text = "nameserver 192.0.2.1\n".repeat(9);
        assert_eq!(parsed(&text).len(), 3);
    }

    #[test]
    fn without_a_server_it_is_this_host() {
        assert_eq!(parsed("search lan\n"), ["127.0.0.1:53"]);
        let folder = tempfile::tempdir().unwrap();
        let missing = host_resolvers(&folder.path().join("resolv.conf")).unwrap();
        assert_eq!(missing, [(Ipv4Addr::LOCALHOST, 53).into()]);
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = host_resolvers(folder.path()).unwrap_err();
        assert!(error.to_string().contains(folder.path().to_str().unwrap()));
    }

    #[test]
    fn the_index_of_an_interface_comes_from_the_kernel() {
        assert_eq!(interface_index("lo"), Some(1));
        assert_eq!(interface_index("../../etc/passwd"), None);
        assert_eq!(interface_index(""), None);
    }

    #[test]
    fn a_changed_file_is_read_again_but_not_looked_at_all_the_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resolv.conf");
        let write = |text: &str| {
            // Replaced by a rename, as resolvconf and its kin do it.
            let new = folder.path().join("new");
            std::fs::write(&new, text).unwrap();
            std::fs::rename(&new, &path).unwrap();
        };
        write("nameserver 192.0.2.1\n");
        let current = Current::new(Resolvers::File(path.clone()), Vec::new());
        let at = |millis| {
            let resolvers = current.at(Duration::from_millis(millis));
            resolvers.iter().map(|one| one.ip().to_string()).collect()
        };
        let first: Vec<String> = at(0);
        assert_eq!(first, ["192.0.2.1"]);
        write("nameserver 192.0.2.2\n");
        assert_eq!(at(999), ["192.0.2.1"]);
        assert_eq!(at(1000), ["192.0.2.2"]);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(at(2000), ["127.0.0.1"]);
        std::fs::create_dir(&path).unwrap();
        assert_eq!(at(3000), ["127.0.0.1"]);
    }

    #[test]
    fn this_server_is_never_its_own_resolver() {
        let own = vec!["127.0.0.1:53".parse().unwrap(), "[::]:53".parse().unwrap()];
        let fixed = [
            "127.0.0.1:53",
            "127.0.0.53:53",
            "192.0.2.1:53",
            "127.0.0.1:54",
        ]
        .iter()
        .map(|text| text.parse().unwrap())
        .collect();
        let left = Current::new(Resolvers::Fixed(fixed), own).at(Duration::ZERO);
        let left: Vec<String> = left.iter().map(ToString::to_string).collect();
        assert_eq!(left, ["192.0.2.1:53", "127.0.0.1:54"]);
    }

    #[test]
    fn who_answered_last_is_asked_first() {
        let fixed: Vec<SocketAddr> = ["192.0.2.1:53", "192.0.2.2:53", "192.0.2.3:53"]
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        let current = Current::new(Resolvers::Fixed(fixed.clone()), Vec::new());
        current.answered(fixed[1]);
        assert_eq!(current.at(Duration::ZERO), [fixed[1], fixed[2], fixed[0]]);
        current.answered("198.51.100.1:53".parse().unwrap());
        assert_eq!(current.at(Duration::ZERO)[0], fixed[1]);
    }
}
