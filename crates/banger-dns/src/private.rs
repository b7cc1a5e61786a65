//! Addresses and names that belong to one machine or one network, and so to no public name and to no public server.

use crate::wire::kind;
use crate::wire::name::Name;
use crate::wire::query::Question;
use banger_core::addr::Ipv4Net;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const fn net(a: u8, b: u8, c: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new(Ipv4Addr::new(a, b, c, 0), prefix)
}

/// How far an address reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// The internet.
    Internet,
    /// A network of somebody's own.
    Network,
    /// This host, whoever is on the same link, or a network that no guest is ever let into.
    Link,
}

/// The networks that do not reach the internet: this host, private, carrier's, link-local and test networks,
/// multicast and beyond.
const NETWORKS: [(Ipv4Net, Reach); 11] = [
    (net(0, 0, 0, 8), Reach::Link),
    (net(10, 0, 0, 8), Reach::Network),
    (net(100, 64, 0, 10), Reach::Network),
    (net(127, 0, 0, 8), Reach::Link),
    (net(169, 254, 0, 16), Reach::Link),
    (net(172, 16, 0, 12), Reach::Network),
    (net(192, 0, 0, 24), Reach::Link),
    (net(192, 168, 0, 16), Reach::Network),
    (net(198, 18, 0, 15), Reach::Link),
    (net(224, 0, 0, 4), Reach::Link),
    (net(240, 0, 0, 4), Reach::Link),
];

/// How far packets to `address` reach.
pub(crate) fn reach(address: IpAddr) -> Reach {
    match address {
        IpAddr::V4(address) => NETWORKS
            .iter()
            .find(|(network, _)| network.contains(address))
            .map_or(Reach::Internet, |(_, reach)| *reach),
        IpAddr::V6(address) => match embedded(address) {
            Some(inner) => reach(inner.into()),
            None => reach_v6(address.segments()),
        },
    }
}

fn reach_v6(segments: [u16; 8]) -> Reach {
    match segments {
        // Unspecified, loopback, and what once embedded IPv4.
        [0, 0, 0, 0, 0, 0, ..] => Reach::Link,
        // Link-local, and the site-local that it replaced; multicast.
        [0xfe80..=0xfeff | 0xff00.., ..] => Reach::Link,
        // Unique local, and translation of a network's own.
        [0xfc00..=0xfdff, ..] | [0x64, 0xff9b, 1, ..] => Reach::Network,
        _ => Reach::Internet,
    }
}

/// The IPv4 address that packets to `address` may end up at: mapped, translated (RFC 6052), or tunnelled (6to4).
pub(crate) fn embedded(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let join = |high: u16, low: u16| Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low));
    match address.segments() {
        [0, 0, 0, 0, 0, 0xffff, high, low]
        | [0x64, 0xff9b, 0, 0, 0, 0, high, low]
        | [0x2002, high, low, ..] => Some(join(high, low)),
        _ => None,
    }
}

/// What is said of a name that no other server is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    /// There is no such name; the zone has this many labels.
    NoName(usize),
    /// There is such a name, without a record of that kind; the zone has this many labels, if there is one.
    NoData(Option<usize>),
}

/// Top-level names that mean something on one machine or one network only (RFC 6761, RFC 6762, RFC 7686). The host's
/// own resolver would look for some of them in the networks around it.
const TOP_LEVELS: [&[u8]; 5] = [b"local", b"localhost", b"invalid", b"test", b"onion"];

/// What to say of a question that must not leave this machine. `None` if it may.
pub(crate) fn kept(question: &Question) -> Option<Kept> {
    let name = &question.name;
    let top = name.label(0)?;
    if TOP_LEVELS.contains(&top) {
        return Some(match name.labels() {
            1 => Kept::NoData(Some(1)),
            _ => Kept::NoName(1),
        });
    }
    // Hosts without a domain are hosts of the network around; what is above domains has no address.
    if name.labels() == 1 && matches!(question.kind, kind::A | kind::AAAA) {
        return Some(Kept::NoData(None));
    }
    match (top, name.label(1)) {
        (b"arpa", Some(b"in-addr")) => kept_reverse(name),
        (b"arpa", Some(b"ip6")) => kept_reverse_v6(name),
        _ => None,
    }
}

/// The octets that a name below `in-addr.arpa` stands for, the first one first, and how many they are. Labels to the
/// left of them may be anything.
pub(crate) fn octets(name: &Name) -> ([u8; 4], usize) {
    let mut octets = [0; 4];
    for (index, octet) in octets.iter_mut().enumerate() {
        match name.label(2 + index).and_then(octet_of) {
            Some(found) => *octet = found,
            None => return (octets, index),
        }
    }
    (octets, 4)
}

fn octet_of(label: &[u8]) -> Option<u8> {
    let is_padded = label != b"0" && label.first() == Some(&b'0');
    if is_padded || !label.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(label).ok()?.parse().ok()
}

/// The empty zones of RFC 6303: nobody out there knows a name for a private address.
fn kept_reverse(name: &Name) -> Option<Kept> {
    let (octets, count) = octets(name);
    let zone = match (count, octets) {
        (1.., [0 | 10 | 127, ..]) => 1,
        (2.., [192, 168, ..] | [169, 254, ..] | [172, 16..=31, ..] | [100, 64..=127, ..]) => 2,
        _ => return None,
    };
    Some(if count < 4 && name.labels() == 2 + count {
        Kept::NoData(Some(2 + zone))
    } else {
        Kept::NoName(2 + zone)
    })
}

/// The same for unique local and link-local addresses.
fn kept_reverse_v6(name: &Name) -> Option<Kept> {
    let nibble = |index: usize| name.label(2 + index);
    let zone = match (nibble(0)?, nibble(1)?, nibble(2)) {
        (b"f", b"c" | b"d", _) => 2,
        (b"f", b"e", Some(b"8" | b"9" | b"a" | b"b")) => 3,
        _ => return None,
    };
    // Whether anything is below a name is not looked at, so never deny what could be above something.
    Some(if name.labels() < 2 + 32 {
        Kept::NoData(Some(2 + zone))
    } else {
        Kept::NoName(2 + zone)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::query;

    #[track_caller]
    fn assert_reach(expected: Reach, addresses: &[&str]) {
        for address in addresses {
            assert_eq!(reach(address.parse().unwrap()), expected, "{address}");
        }
    }

    #[test]
    fn private_networks_are_told_from_the_internet() {
        let private = [
            "10.255.255.255",
            "100.64.0.1",
            "100.127.255.255",
            "172.16.0.1",
            "172.31.255.254",
            "192.168.1.1",
            "::ffff:192.168.0.1",
            "64:ff9b::10.0.0.1",
            "64:ff9b:1::1",
            "2002:a00:1::",
            "fc00::1",
            "fdff::1",
        ];
        assert_reach(Reach::Network, &private);
    }

    #[test]
    fn this_host_its_links_and_what_is_never_opened_are_nearer_still() {
        let near = [
            "0.0.0.0",
            "127.0.0.53",
            "169.254.169.254",
            "192.0.0.192",
            "198.19.0.1",
            "224.0.0.251",
            "255.255.255.255",
            "::",
            "::1",
            "::7f00:1",
            "::ffff:127.0.0.1",
            "2002:7f00:1::",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::fb",
        ];
        assert_reach(Reach::Link, &near);
    }

    #[test]
    fn public_addresses_are_public() {
        let public = [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "128.0.0.1",
            "172.15.255.255",
            "172.32.0.0",
            "192.167.255.255",
            "198.17.255.255",
            "223.255.255.255",
            "2606:4700::1111",
            "::ffff:1.1.1.1",
            "64:ff9b::1.1.1.1",
            "2002:101:101::",
        ];
        assert_reach(Reach::Internet, &public);
    }

    #[track_caller]
    fn assert_kept(name: &str, expected: Option<Kept>) {
        let message = query(name, kind::A).bytes();
        let question = Question::read(&message).unwrap();
        assert_eq!(kept(&question), expected, "{name}");
    }

    #[test]
    fn names_of_this_network_are_kept() {
        assert_kept("printer.local", Some(Kept::NoName(1)));
        assert_kept("local", Some(Kept::NoData(Some(1))));
        assert_kept("a.b.onion", Some(Kept::NoName(1)));
        assert_kept("printer", Some(Kept::NoData(None)));
        assert_kept("example.com", None);
        assert_kept("locals.com", None);
        assert_kept(".", None);
        let message = query("com", kind::NS).bytes();
        assert_eq!(kept(&Question::read(&message).unwrap()), None);
    }

    #[test]
    fn nobody_else_is_asked_who_has_a_private_address() {
        assert_kept("1.0.168.192.in-addr.arpa", Some(Kept::NoName(4)));
        assert_kept("168.192.in-addr.arpa", Some(Kept::NoData(Some(4))));
        assert_kept("0.168.192.in-addr.arpa", Some(Kept::NoData(Some(4))));
        assert_kept("lb._dns-sd._udp.0.10.in-addr.arpa", Some(Kept::NoName(3)));
        assert_kept("1.0.16.172.in-addr.arpa", Some(Kept::NoName(4)));
        assert_kept("192.in-addr.arpa", None);
        assert_kept("32.172.in-addr.arpa", None);
        assert_kept("8.8.8.8.in-addr.arpa", None);
        // Not how the octet is written, so not that address.
        assert_kept("010.in-addr.arpa", None);
        assert_kept("d.f.ip6.arpa", Some(Kept::NoData(Some(4))));
        assert_kept("0.8.e.f.ip6.arpa", Some(Kept::NoData(Some(5))));
        assert_kept("e.f.ip6.arpa", None);
        assert_kept("1.0.0.2.ip6.arpa", None);
        let whole = format!("{}0.8.e.f.ip6.arpa", "0.".repeat(28));
        assert_kept(&whole, Some(Kept::NoName(5)));
    }
}
