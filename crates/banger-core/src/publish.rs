//! Ports of the host that lead into a guest.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::str::FromStr;

/// A transport protocol.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    Serialize,
    Deserialize,
    JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A port of the host that leads into a guest. Protocol and place on the host name it.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(deny_unknown_fields)]
pub struct PublishedPort {
    /// TCP or UDP.
    #[serde(default)]
    pub protocol: Protocol,
    /// Where the host listens, as `127.0.0.1:8080`.
    #[schemars(with = "String")]
    pub listen: SocketAddr,
    /// The guest's port.
    #[schemars(with = "u16")]
    pub guest_port: NonZeroU16,
}

/// The text does not say which port leads where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not a published port; write [ADDRESS:]HOST:GUEST[/udp], such as 8080:80", .0.escape_debug())]
pub struct PublishedPortError(String);

impl PublishedPort {
    /// Whether both would listen at the same place, or at one that covers the other's (`0.0.0.0`).
    pub fn collides(&self, other: &Self) -> bool {
        let (ours, theirs) = (self.listen.ip(), other.listen.ip());
        self.protocol == other.protocol
            && self.listen.port() == other.listen.port()
            && (ours == theirs || ours.is_unspecified() || theirs.is_unspecified())
    }
}

impl std::fmt::Display for PublishedPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}/{}", self.listen, self.guest_port, self.protocol)
    }
}

impl FromStr for PublishedPort {
    type Err = PublishedPortError;

    fn from_str(text: &str) -> Result<Self, PublishedPortError> {
        let read = || {
            let (place, protocol) = match text.rsplit_once('/') {
                None | Some((_, "tcp")) => {
                    (text.strip_suffix("/tcp").unwrap_or(text), Protocol::Tcp)
                }
                Some((place, "udp")) => (place, Protocol::Udp),
                Some(_) => return None,
            };
            let (host, guest) = place.rsplit_once(':')?;
            let (address, host) = match host.rsplit_once(':') {
                Some((address, host)) => {
                    let address = address.trim_start_matches('[').trim_end_matches(']');
                    (address.parse::<IpAddr>().ok()?, host)
                }
                None => (IpAddr::V4(Ipv4Addr::LOCALHOST), host),
            };
            let host: NonZeroU16 = host.parse().ok()?;
            Some(Self {
                protocol,
                listen: SocketAddr::new(address, host.get()),
                guest_port: guest.parse().ok()?,
            })
        };
        read().ok_or_else(|| PublishedPortError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn port(text: &str) -> PublishedPort {
        text.parse().unwrap()
    }

    #[test]
    fn a_port_without_an_address_is_bound_to_the_loopback() {
        assert_eq!(port("8080:80").to_string(), "127.0.0.1:8080:80/tcp");
        assert_eq!(
            port("0.0.0.0:53:5353/udp").to_string(),
            "0.0.0.0:53:5353/udp"
        );
        assert_eq!(port("[::1]:8080:80/tcp").to_string(), "[::1]:8080:80/tcp");
    }

    #[test]
    fn what_names_no_two_ports_is_refused() {
        for text in [
            "",
            "80",
            "0:80",
            "80:0",
            "80:65536",
            "x:1:2",
            "1:2/sctp",
            "1.2.3:4:5",
            ":80",
            "80:",
        ] {
            assert!(text.parse::<PublishedPort>().is_err(), "{text}");
        }
    }

    #[test]
    fn ports_collide_where_one_place_covers_the_other() {
        assert!(port("8080:80").collides(&port("8080:81")));
        assert!(port("8080:80").collides(&port("0.0.0.0:8080:81")));
        assert!(!port("8080:80").collides(&port("127.0.0.2:8080:80")));
        assert!(!port("8080:80").collides(&port("8080:80/udp")));
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(address: [u8; 4], host in 1u16.., guest in 1u16.., udp: bool) {
            let published = PublishedPort {
                protocol: if udp { Protocol::Udp } else { Protocol::Tcp },
                listen: SocketAddr::new(IpAddr::V4(address.into()), host),
                guest_port: NonZeroU16::new(guest).unwrap(),
            };
            prop_assert_eq!(port(&published.to_string()), published);
        }

        #[test]
        fn no_text_makes_it_panic(text: String) {
            let _ = text.parse::<PublishedPort>();
        }
    }
}
