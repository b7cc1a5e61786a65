//! What is done with one message, wherever it came from.

use crate::config::Config;
use crate::limit::{Limiter, Slot, Slots};
use crate::resolvers::Current;
use crate::route::{Audience, Route, route};
use crate::stats::{Counters, Stats, count};
use crate::wire::query::{Query, Rejection};
use crate::wire::reply::{Reply, Why, write_bare};
use crate::wire::{Code, UDP_MOST};
use crate::zone::Zone;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How a message came, and how its reply goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Udp,
    Tcp,
}

/// What to do about a message.
#[derive(Debug)]
pub(crate) enum Step {
    /// Nothing.
    Drop,
    /// Send the reply that was written.
    Reply,
    /// Ask a resolver, and send what comes of it.
    Forward(Box<Pending>),
}

/// A question for a resolver.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) client: IpAddr,
    /// One of the places of those that wait; so they are never more than those.
    _slot: Slot,
    pub(crate) transport: Transport,
    pub(crate) query: Query,
    /// The client's message up to the end of its question.
    pub(crate) asked: Vec<u8>,
}

impl Pending {
    /// The longest reply that the client takes, in bytes.
    pub(crate) fn limit(&self) -> usize {
        limit(&self.query, self.transport)
    }
}

fn limit(query: &Query, transport: Transport) -> usize {
    match transport {
        Transport::Udp => query.udp_limit(),
        Transport::Tcp => usize::from(u16::MAX),
    }
}

/// All that the tasks of a server share.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) zone: Zone,
    pub(crate) config: Config,
    pub(crate) resolvers: Current,
    pub(crate) counters: Counters,
    pub(crate) waiting: Arc<Slots>,
    pub(crate) connections: Arc<Slots>,
    limiter: Mutex<Limiter>,
    started: Instant,
}

impl Service {
    pub(crate) fn new(zone: Zone, config: Config, own: Vec<SocketAddr>) -> Self {
        Self {
            zone,
            resolvers: Current::new(config.resolvers.clone(), own),
            counters: Counters::default(),
            waiting: Slots::new(config.in_flight, config.in_flight_per_client),
            connections: Slots::new(config.connections, config.connections_per_client),
            limiter: Mutex::new(Limiter::new(config.rate)),
            started: Instant::now(),
            config,
        }
    }

    /// The time since it was made.
    pub(crate) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Whether `client` gets any reply on a listener for `audience`.
    pub(crate) fn serves(&self, audience: Audience, client: IpAddr) -> bool {
        audience == Audience::Host || self.zone.is_guest(client)
    }

    /// Decides about a message of `client` that came `now`; a reply is written over `out`.
    pub(crate) fn take(
        &self,
        message: &[u8],
        client: IpAddr,
        audience: Audience,
        transport: Transport,
        now: Duration,
        out: &mut Vec<u8>,
    ) -> Step {
        count(&self.counters.queries);
        if !self.serves(audience, client) || !self.limiter().allows(client, now) {
            count(&self.counters.dropped);
            return Step::Drop;
        }
        let (query, reply) = match Query::read(message) {
            Ok(query) if query.has_unknown_edns() => (query, Reply::code(Code::BadVersion)),
            Ok(query) => {
                let domains = &self.config.private_domains;
                match route(&self.zone, domains, audience, client, &query.question) {
                    Route::Reply(reply) => (query, reply),
                    Route::Upstream => match self.waiting.take(client) {
                        Some(slot) => {
                            return Step::Forward(Box::new(Pending {
                                client,
                                _slot: slot,
                                transport,
                                query,
                                asked: message[..query.question.end].to_vec(),
                            }));
                        }
                        None => (query, Reply::recursive(Code::ServerFailure, Why::Busy)),
                    },
                }
            }
            Err(Rejection::Bare { id, flags, code }) => {
                write_bare(id, flags, code, out);
                self.counters.replied(code);
                return Step::Reply;
            }
            Err(Rejection::Drop) => {
                count(&self.counters.dropped);
                return Step::Drop;
            }
        };
        reply.write(message, &query, limit(&query, transport), out);
        self.counters.replied(reply.code);
        Step::Reply
    }

    pub(crate) fn stats(&self) -> Stats {
        let resolvers = self.resolvers.at(self.now());
        self.counters.stats(self.waiting.taken(), resolvers)
    }

    fn limiter(&self) -> std::sync::MutexGuard<'_, Limiter> {
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The longest query that is read, in bytes: nobody needs more for one question.
pub(crate) const MOST_QUERY: usize = 2 * UDP_MOST;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Rate;
    use crate::testing::query;
    use crate::wire::kind;
    use banger_core::addr::Pool;
    use banger_core::name::VmName;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    const GUEST: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 2);

    fn service(config: Config) -> Service {
        let zone = Zone::new(Pool::at(Ipv4Addr::new(172, 16, 0, 0)));
        zone.set(&VmName::new("calm-otter").unwrap(), GUEST)
            .unwrap();
        zone.set_nat(GUEST, true).unwrap();
        Service::new(zone, config, Vec::new())
    }

    fn unlimited() -> Config {
        Config {
            rate: Rate {
                per_second: u32::MAX,
                burst: u32::MAX,
            },
            ..Config::default()
        }
    }

    fn take(service: &Service, message: &[u8], client: Ipv4Addr, audience: Audience) -> Step {
        let mut out = Vec::new();
        let transport = Transport::Udp;
        service.take(
            message,
            client.into(),
            audience,
            transport,
            Duration::ZERO,
            &mut out,
        )
    }

    #[test]
    fn strangers_get_no_reply_on_the_guests_listener() {
        let service = service(Config::default());
        let message = query("calm-otter.vm", kind::A).bytes();
        for stranger in [Ipv4Addr::new(172, 16, 8, 1), Ipv4Addr::new(192, 0, 2, 1)] {
            let step = take(&service, &message, stranger, Audience::Guests);
            assert!(matches!(step, Step::Drop));
        }
        assert_eq!(service.counters.stats(0, Vec::new()).dropped, 2);
        let step = take(&service, &message, GUEST, Audience::Guests);
        assert!(matches!(step, Step::Reply));
    }

    #[test]
    fn beyond_its_rate_a_client_gets_no_reply() {
        let rate = Rate {
            per_second: 1,
            burst: 3,
        };
        let service = service(Config {
            rate,
            ..Config::default()
        });
        let message = query("calm-otter.vm", kind::A).bytes();
        for _ in 0..10 {
            take(&service, &message, GUEST, Audience::Guests);
        }
        let stats = service.counters.stats(0, Vec::new());
        assert_eq!((stats.queries, stats.answered, stats.dropped), (10, 3, 7));
    }

    #[test]
    fn what_is_asked_upstream_is_the_question_and_nothing_else() {
        let service = service(Config::default());
        let message = query("Example.com", kind::A).edns(4096).bytes();
        match take(&service, &message, GUEST, Audience::Guests) {
            Step::Forward(pending) => {
                assert_eq!(pending.asked, message[..pending.query.question.end]);
                assert_eq!(pending.limit(), 1232);
            }
            other => panic!("{other:?}"),
        }
    }

    /// Bytes that look like a query at first: deeper code sees them.
    fn nearly_query() -> impl Strategy<Value = Vec<u8>> {
        let names = prop_oneof![
            Just("calm-otter.vm".to_owned()),
            Just("2.0.16.172.in-addr.arpa".to_owned()),
            "[a-z0-9._-]{1,80}",
            "([a-z]{0,63}\\.){0,6}vm",
            "([0-9]{1,3}\\.){0,6}in-addr\\.arpa",
        ];
        let names = names.prop_filter("labels are short", |name: &String| {
            name.split('.').all(|label| label.len() < 64)
        });
        let edits = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
        (
            names,
            any::<u16>(),
            any::<Option<u16>>(),
            edits,
            any::<bool>(),
        )
            .prop_map(|(name, kind, edns, edits, cut)| {
                let asked = query(&name, kind);
                let mut bytes = edns.map_or(asked.clone(), |size| asked.edns(size)).bytes();
                for (at, value) in &edits {
                    let at = at.index(bytes.len());
                    bytes[at] = *value;
                }
                if cut && let Some((at, _)) = edits.first() {
                    bytes.truncate(at.index(bytes.len()));
                }
                bytes
            })
    }

    fn check(message: &[u8]) {
        let service = service(unlimited());
        for audience in [Audience::Guests, Audience::Host] {
            for transport in [Transport::Udp, Transport::Tcp] {
                let mut out = Vec::new();
                let step = service.take(
                    message,
                    GUEST.into(),
                    audience,
                    transport,
                    Duration::ZERO,
                    &mut out,
                );
                if matches!(step, Step::Reply) {
                    assert_eq!(out[..2], message[..2], "its id");
                    assert_ne!(out[2] & 0x80, 0, "a reply");
                    assert!(out.len() <= 512, "{}", out.len());
                    let udp_limit = Query::read(message).map_or(12, |query| query.udp_limit());
                    assert!(out.len() <= udp_limit.max(12) || transport == Transport::Tcp);
                }
                if let Step::Forward(pending) = step {
                    assert_eq!(audience, Audience::Guests);
                    assert!(!service.zone.owns(&pending.query.question.name));
                }
            }
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(message in prop::collection::vec(any::<u8>(), 0..600)) {
            check(&message);
        }

        #[test]
        fn no_nearly_right_query_makes_it_panic(message in nearly_query()) {
            check(&message);
        }
    }
}
