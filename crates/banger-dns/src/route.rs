//! Who is answered what.

use crate::config::Domain;
use crate::private::{Kept, Reach, embedded, kept, reach};
use crate::wire::Code;
use crate::wire::answer::Forbidden;
use crate::wire::name::Name;
use crate::wire::query::Question;
use crate::wire::reply::{Apex, Reply, Why};
use crate::zone::{Found, Zone};
use std::net::IpAddr;

/// Who asks on a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// The guests of this instance, and nobody else: the instance's names always, names of the internet with NAT.
    Guests,
    /// The host: the instance's names alone, since it has a resolver for all others.
    Host,
}

/// What is done about a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Route {
    Reply(Reply),
    /// One of the host's resolvers is asked.
    Upstream,
}

/// Decides about a question of `client`. Names within `private_domains` may be asked for even where they look as if
/// they belonged to one network only.
pub(crate) fn route(
    zone: &Zone,
    private_domains: &[Domain],
    audience: Audience,
    client: IpAddr,
    question: &Question,
) -> Route {
    if !question.is_plain() {
        return Route::Reply(Reply::because(Code::Refused, Why::Kind));
    }
    let has_nat = audience == Audience::Guests && zone.has_nat(client);
    if let Some(found) = zone.find(question) {
        return Route::Reply(reply_of(found, has_nat));
    }
    match audience {
        Audience::Host => Route::Reply(Reply::because(Code::Refused, Why::OnlyOwnNames)),
        Audience::Guests if !has_nat => Route::Reply(Reply::because(Code::Refused, Why::NoNat)),
        Audience::Guests if is_within(&question.name, private_domains) => Route::Upstream,
        Audience::Guests => kept(question).map_or(Route::Upstream, |kept| {
            Route::Reply(reply_of_kept(kept, zone.changes()))
        }),
    }
}

fn reply_of(found: Found, recursion: bool) -> Reply {
    Reply {
        authoritative: true,
        recursion,
        record: found.record,
        apex: Some(found.apex),
        ..Reply::code(if found.is_there {
            Code::NoError
        } else {
            Code::NoName
        })
    }
}

fn reply_of_kept(kept: Kept, serial: u32) -> Reply {
    let (code, labels) = match kept {
        Kept::NoName(labels) => (Code::NoName, Some(labels)),
        Kept::NoData(labels) => (Code::NoError, labels),
    };
    Reply {
        authoritative: labels.is_some(),
        recursion: true,
        apex: labels.map(|labels| Apex { labels, serial }),
        ..Reply::code(code)
    }
}

fn is_within(name: &Name, domains: &[Domain]) -> bool {
    domains.iter().any(|domain| domain.covers(name))
}

/// What the answer to one question must not hold, so that no public name leads a guest's programs to this host, to its
/// networks or to another guest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NoRebinding<'a> {
    zone: &'a Zone,
    /// The client reaches private networks, or the question is for a name that may be of one.
    may_be_private: bool,
}

impl<'a> NoRebinding<'a> {
    pub(crate) fn new(
        zone: &'a Zone,
        private_domains: &[Domain],
        client: IpAddr,
        question: &Question,
    ) -> Self {
        Self {
            zone,
            may_be_private: zone.reaches_private(client)
                || is_within(&question.name, private_domains),
        }
    }
}

impl Forbidden for NoRebinding<'_> {
    fn address(&self, address: IpAddr) -> bool {
        let inner = match address {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(address) => embedded(address),
        };
        if inner.is_some_and(|inner| self.zone.pool().network().contains(inner)) {
            return true;
        }
        match reach(address) {
            Reach::Internet => false,
            Reach::Network => {
                !self.may_be_private || inner.is_some_and(|inner| self.zone.is_host(inner))
            }
            Reach::Link => true,
        }
    }

    fn alias(&self, target: &Name) -> bool {
        self.zone.owns(target) || target.label(0) == Some(b"localhost")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::query;
    use crate::wire::kind;
    use banger_core::addr::Pool;
    use banger_core::name::VmName;
    use std::net::Ipv4Addr;

    const WITH_NAT: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 2);
    const WITHOUT: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 3);

    fn zone() -> Zone {
        let zone = Zone::new(Pool::at(Ipv4Addr::new(172, 16, 0, 0)));
        let name = VmName::new("calm-otter").unwrap();
        zone.set(&name, WITH_NAT).unwrap();
        zone.set_nat(WITH_NAT, true).unwrap();
        zone
    }

    fn domains() -> Vec<Domain> {
        ["corp.example", "lan", "10.in-addr.arpa"]
            .iter()
            .map(|text| text.parse().unwrap())
            .collect()
    }

    fn routed(audience: Audience, client: Ipv4Addr, name: &str, kind: u16) -> Route {
        let message = query(name, kind).bytes();
        let question = Question::read(&message).unwrap();
        route(&zone(), &domains(), audience, client.into(), &question)
    }

    fn code(route: &Route) -> Option<Code> {
        match route {
            Route::Reply(reply) => Some(reply.code),
            Route::Upstream => None,
        }
    }

    /// Everyone who asks.
    const ALL: [(Audience, Ipv4Addr); 3] = [
        (Audience::Guests, WITH_NAT),
        (Audience::Guests, WITHOUT),
        (Audience::Host, Ipv4Addr::new(172, 16, 15, 254)),
    ];

    #[test]
    fn everyone_may_ask_for_the_names_of_the_instance() {
        for (audience, client) in ALL {
            for (name, kind, expected) in [
                ("calm-otter.vm", kind::A, Code::NoError),
                ("calm-otter.vm", kind::AAAA, Code::NoError),
                ("nobody.vm", kind::A, Code::NoName),
                ("2.0.16.172.in-addr.arpa", kind::PTR, Code::NoError),
                ("9.0.16.172.in-addr.arpa", kind::PTR, Code::NoName),
            ] {
                let route = routed(audience, client, name, kind);
                assert_eq!(code(&route), Some(expected), "{name}");
                assert!(matches!(route, Route::Reply(reply) if reply.authoritative));
            }
        }
    }

    #[test]
    fn only_guests_with_nat_may_ask_for_names_of_the_internet() {
        for name in [
            "example.com",
            "a.b.c.example.org",
            "8.8.8.8.in-addr.arpa",
            "com",
        ] {
            let kind = if name == "com" { kind::NS } else { kind::A };
            assert_eq!(
                routed(Audience::Guests, WITH_NAT, name, kind),
                Route::Upstream
            );
            assert_eq!(
                routed(Audience::Guests, WITHOUT, name, kind),
                Route::Reply(Reply::because(Code::Refused, Why::NoNat))
            );
            for client in [WITH_NAT, WITHOUT, Ipv4Addr::LOCALHOST] {
                assert_eq!(
                    routed(Audience::Host, client, name, kind),
                    Route::Reply(Reply::because(Code::Refused, Why::OnlyOwnNames))
                );
            }
        }
    }

    #[test]
    fn the_instances_names_and_private_ones_never_go_upstream() {
        for name in [
            "vm",
            "nobody.vm",
            "x.y.z.vm",
            "255.15.16.172.in-addr.arpa",
            "x.0.16.172.in-addr.arpa",
            "16.172.in-addr.arpa",
            "1.1.168.192.in-addr.arpa",
            "printer.local",
            "printer",
        ] {
            for kind in [kind::A, kind::AAAA] {
                let route = routed(Audience::Guests, WITH_NAT, name, kind);
                assert_ne!(route, Route::Upstream, "{name}");
            }
        }
    }

    #[test]
    fn domains_that_may_be_private_do() {
        for name in [
            "wiki.corp.example",
            "nas.lan",
            "lan",
            "1.0.0.10.in-addr.arpa",
        ] {
            let route = routed(Audience::Guests, WITH_NAT, name, kind::A);
            assert_eq!(route, Route::Upstream, "{name}");
        }
        let pool = routed(Audience::Guests, WITH_NAT, "1.0.16.172.in-addr.arpa", 12);
        assert_eq!(code(&pool), Some(Code::NoName));
    }

    #[test]
    fn transfers_are_refused_to_all_even_of_the_instances_zone() {
        for (audience, client) in ALL {
            for kind in [251, 252, 255] {
                assert_eq!(
                    code(&routed(audience, client, "vm", kind)),
                    Some(Code::Refused)
                );
            }
        }
    }

    #[test]
    fn recursion_is_offered_to_those_who_get_it() {
        for (audience, client) in ALL {
            let Route::Reply(reply) = routed(audience, client, "calm-otter.vm", kind::A) else {
                panic!("asked upstream");
            };
            assert_eq!(reply.recursion, client == WITH_NAT);
        }
    }

    #[track_caller]
    fn assert_forbidden_to(
        zone: &Zone,
        client: Ipv4Addr,
        name: &str,
        address: &str,
        expected: bool,
    ) {
        let message = query(name, kind::A).bytes();
        let question = Question::read(&message).unwrap();
        let rules = NoRebinding::new(zone, &domains(), client.into(), &question);
        let address = address.parse().unwrap();
        assert_eq!(rules.address(address), expected, "{name} {address}");
    }

    #[track_caller]
    fn assert_forbidden(name: &str, address: &str, expected: bool) {
        assert_forbidden_to(&zone(), WITH_NAT, name, address, expected);
    }

    #[test]
    fn a_public_name_leads_to_public_addresses_alone() {
        for private in [
            "10.0.0.1",
            "127.0.0.1",
            "172.16.0.2",
            "fd00::1",
            "169.254.169.254",
        ] {
            assert_forbidden("evil.example", private, true);
        }
        assert_forbidden("good.example", "192.0.2.1", false);
        assert_forbidden("good.example", "2001:db8::1", false);
    }

    #[test]
    fn a_private_domain_still_never_leads_to_this_host_or_a_guest() {
        assert_forbidden("wiki.corp.example", "10.0.0.1", false);
        assert_forbidden("wiki.corp.example", "fd00::1", false);
        for near in [
            "127.0.0.1",
            "::1",
            "172.16.0.2",
            "::ffff:172.16.0.2",
            "169.254.169.254",
        ] {
            assert_forbidden("wiki.corp.example", near, true);
        }
    }

    #[test]
    fn a_guest_that_reaches_private_networks_is_told_their_names_and_no_others() {
        let zone = zone();
        zone.set_private(WITH_NAT, true).unwrap();
        zone.set_private(WITHOUT, true).unwrap();
        zone.set_host_addresses([Ipv4Addr::new(192, 168, 1, 5)].into());
        let to = |client, address, expected| {
            assert_forbidden_to(&zone, client, "intranet.corp", address, expected);
        };
        for private in ["10.0.0.1", "192.168.1.6", "100.64.0.1", "fd00::1"] {
            to(WITH_NAT, private, false);
            // Its switch counts with NAT alone.
            to(WITHOUT, private, true);
        }
        for never in [
            "127.0.0.1",
            "::1",
            "0.0.0.0",
            "169.254.169.254",
            // Another cloud has its metadata there.
            "192.0.0.192",
            // The host's own, plain and mapped, and a guest.
            "192.168.1.5",
            "::ffff:192.168.1.5",
            "172.16.0.3",
            "172.16.15.254",
        ] {
            to(WITH_NAT, never, true);
        }
        zone.set_private(WITH_NAT, false).unwrap();
        to(WITH_NAT, "10.0.0.1", true);
    }

    #[test]
    fn no_public_name_is_another_name_for_a_vm() {
        let message = query("evil.example", kind::A).bytes();
        let zone = zone();
        let rules = NoRebinding::new(
            &zone,
            &[],
            WITH_NAT.into(),
            &Question::read(&message).unwrap(),
        );
        for (target, expected) in [
            ("calm-otter.vm", true),
            ("2.0.16.172.in-addr.arpa", true),
            ("localhost", true),
            ("www.example.net", false),
        ] {
            assert_eq!(rules.alias(&Name::parse(target).unwrap()), expected);
        }
    }
}
