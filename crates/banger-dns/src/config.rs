//! What can be set.

use crate::wire::name::Name;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// How a server works. The defaults are good for an instance; each bound is there so that no guest can take what
/// others need.
#[derive(Debug, Clone)]
pub struct Config {
    /// Who is asked for names of the internet.
    pub resolvers: Resolvers,
    /// Domains whose names may have private addresses and may look as if they belonged to one network only. Never
    /// the addresses of this host and of guests.
    pub private_domains: Vec<Domain>,
    /// How long one resolver may take, before the next one is asked.
    pub attempt_limit: Duration,
    /// How many questions wait for resolvers at once.
    pub in_flight: usize,
    /// How many of them one client may have.
    pub in_flight_per_client: usize,
    /// How many TCP connections are open at once.
    pub connections: usize,
    /// How many of them one client may have.
    pub connections_per_client: usize,
    /// How long a TCP connection may take for its next query, and for taking an answer.
    pub connection_limit: Duration,
    /// How much one client may ask.
    pub rate: Rate,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            resolvers: Resolvers::File(PathBuf::from("/etc/resolv.conf")),
            private_domains: Vec::new(),
            attempt_limit: Duration::from_millis(2500),
            in_flight: 256,
            in_flight_per_client: 32,
            connections: 128,
            connections_per_client: 8,
            connection_limit: Duration::from_secs(10),
            rate: Rate {
                per_second: 1000,
                burst: 2000,
            },
        }
    }
}

/// Who is asked for names of the internet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resolvers {
    /// The name servers of a file like `/etc/resolv.conf`, which is read again when it changes.
    File(PathBuf),
    /// These, the first one first.
    Fixed(Vec<SocketAddr>),
}

/// How many queries of one client are answered; others are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Queries per second over time; 0 counts as 1.
    pub per_second: u32,
    /// Queries at once, after a pause.
    pub burst: u32,
}

/// A domain, and all that is below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Domain(Name);

/// The text is no domain such as `corp.example`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not a domain such as corp.example", .0.escape_debug())]
pub struct DomainError(String);

impl Domain {
    pub(crate) fn covers(&self, name: &Name) -> bool {
        name.is_within(&self.0)
    }
}

impl std::str::FromStr for Domain {
    type Err = DomainError;
    fn from_str(text: &str) -> Result<Self, DomainError> {
        match Name::parse(text) {
            Some(name) if !text.contains(|c: char| c.is_whitespace() || c.is_control()) => {
                Ok(Self(name))
            }
            _ => Err(DomainError(text.to_owned())),
        }
    }
}

impl std::fmt::Display for Domain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_covers_itself_and_what_is_below() {
        let domain: Domain = "Corp.Example".parse().unwrap();
        assert!(domain.covers(&Name::parse("corp.example.").unwrap()));
        assert!(domain.covers(&Name::parse("a.b.corp.example").unwrap()));
        assert!(!domain.covers(&Name::parse("mycorp.example").unwrap()));
    }

    #[test]
    fn what_is_no_domain_is_said_without_its_control_characters() {
        for bad in ["", ".", "a..b", "a b", "a\u{1b}[2J"] {
            let error = bad.parse::<Domain>().unwrap_err().to_string();
            assert!(!error.contains('\u{1b}'), "{error:?}");
        }
    }
}
