//! A whole server on loopback, with clients and resolvers that misbehave.

#![expect(clippy::unwrap_used, reason = "all of this is a test")]

mod resolver;

use banger_core::addr::Pool;
use banger_core::name::VmName;
use banger_dns::{
    Audience, Config, Domain, Listener, Rate, Resolvers, Server, ServerHandle, Stats, Zone,
};
use resolver::Resolver;
use simple_dns::rdata::{A, RData};
use simple_dns::{CLASS, Name, Packet, PacketFlag, QCLASS, QTYPE, Question, RCODE, TYPE};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::time::timeout;

/// The pool of an instance whose guests are addresses of loopback.
const POOL: Pool = Pool::at(Ipv4Addr::new(127, 0, 0, 0));
const WITH_NAT: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const WITHOUT: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);
const ID: u16 = 4711;
/// Longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(20);

/// A server with a listener for guests and one for the host.
struct World {
    zone: Zone,
    server: ServerHandle,
    guests: SocketAddr,
    host: SocketAddr,
}

impl World {
    async fn new(config: Config) -> Self {
        let zone = Zone::new(POOL);
        zone.set(&VmName::new("calm-otter").unwrap(), WITH_NAT)
            .unwrap();
        zone.set(&VmName::new("brave-fox").unwrap(), WITHOUT)
            .unwrap();
        zone.set_nat(WITH_NAT, true).unwrap();
        let (guests, guests_at) = listener(Audience::Guests).await;
        let (host, host_at) = listener(Audience::Host).await;
        let server = Server::start(vec![guests, host], zone.clone(), config).unwrap();
        Self {
            zone,
            server,
            guests: guests_at,
            host: host_at,
        }
    }

    async fn with_resolvers(resolvers: &[&Resolver]) -> Self {
        Self::new(config(resolvers)).await
    }

    fn stats(&self) -> Stats {
        self.server.stats()
    }

    /// Asks as a guest over UDP.
    async fn ask(&self, client: Ipv4Addr, name: &str, kind: TYPE) -> Reply {
        ask_udp(client, self.guests, &query(name, kind, None)).await
    }
}

fn config(resolvers: &[&Resolver]) -> Config {
    Config {
        resolvers: Resolvers::Fixed(resolvers.iter().map(|one| one.address()).collect()),
        attempt_limit: Duration::from_secs(1),
        ..Config::default()
    }
}

/// UDP and TCP on one port.
async fn listener(audience: Audience) -> (Listener, SocketAddr) {
    loop {
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = udp.local_addr().unwrap();
        // Another program may have the same port for TCP.
        if let Ok(tcp) = TcpListener::bind(address).await {
            return (Listener { udp, tcp, audience }, address);
        }
    }
}

fn query(name: &str, kind: TYPE, edns: Option<u16>) -> Vec<u8> {
    let mut packet = Packet::new_query(ID);
    packet.set_flags(PacketFlag::RECURSION_DESIRED);
    let name = Name::new(name).unwrap();
    packet.questions.push(Question::new(
        name,
        QTYPE::TYPE(kind),
        QCLASS::CLASS(CLASS::IN),
        false,
    ));
    let mut bytes = packet.build_bytes_vec().unwrap();
    if let Some(size) = edns {
        bytes[11] = 1;
        bytes.extend([0, 0, 41]);
        bytes.extend(size.to_be_bytes());
        bytes.extend([0; 6]);
    }
    bytes
}

/// What a client got.
#[derive(Debug)]
struct Reply {
    code: RCODE,
    addresses: Vec<Ipv4Addr>,
    truncated: bool,
    /// Whether it says that names of the internet may be asked for.
    recursion: bool,
    bytes: Vec<u8>,
}

impl Reply {
    fn read(bytes: &[u8]) -> Self {
        let packet = Packet::parse(bytes).unwrap();
        assert_eq!(packet.id(), ID);
        assert!(packet.has_flags(PacketFlag::RESPONSE));
        let addresses = packet
            .answers
            .iter()
            .filter_map(|record| match record.rdata {
                RData::A(A { address }) => Some(Ipv4Addr::from_bits(address)),
                _ => None,
            });
        Self {
            code: packet.rcode(),
            addresses: addresses.collect(),
            truncated: packet.has_flags(PacketFlag::TRUNCATION),
            recursion: packet.has_flags(PacketFlag::RECURSION_AVAILABLE),
            bytes: bytes.to_vec(),
        }
    }

    #[track_caller]
    fn assert_address(&self, expected: &str) {
        assert_eq!(self.code, RCODE::NoError);
        assert_eq!(self.addresses, [expected.parse::<Ipv4Addr>().unwrap()]);
    }
}

async fn udp_client(client: Ipv4Addr, server: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind((client, 0)).await.unwrap();
    socket.connect(server).await.unwrap();
    socket
}

async fn ask_udp(client: Ipv4Addr, server: SocketAddr, message: &[u8]) -> Reply {
    let socket = udp_client(client, server).await;
    socket.send(message).await.unwrap();
    receive(&socket).await
}

async fn receive(socket: &UdpSocket) -> Reply {
    let mut buffer = [0; 65535];
    let received = timeout(LIMIT, socket.recv(&mut buffer)).await;
    Reply::read(&buffer[..received.unwrap().unwrap()])
}

async fn connect(client: Ipv4Addr, server: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((client, 0).into()).unwrap();
    socket.connect(server).await.unwrap()
}

async fn ask_tcp(stream: &mut TcpStream, message: &[u8]) -> Reply {
    let length = u16::try_from(message.len()).unwrap();
    stream.write_all(&length.to_be_bytes()).await.unwrap();
    stream.write_all(message).await.unwrap();
    let length = timeout(LIMIT, stream.read_u16()).await.unwrap().unwrap();
    let mut bytes = vec![0; usize::from(length)];
    stream.read_exact(&mut bytes).await.unwrap();
    Reply::read(&bytes)
}

#[tokio::test]
async fn names_of_vms_are_answered_to_guests_and_host_over_udp_and_tcp() {
    let world = World::with_resolvers(&[]).await;
    let message = query("Calm-Otter.vm", TYPE::A, None);
    for (client, server) in [
        (WITH_NAT, world.guests),
        (WITHOUT, world.guests),
        (Ipv4Addr::LOCALHOST, world.host),
    ] {
        ask_udp(client, server, &message)
            .await
            .assert_address("127.0.0.2");
        let mut stream = connect(client, server).await;
        for _ in 0..3 {
            ask_tcp(&mut stream, &message)
                .await
                .assert_address("127.0.0.2");
        }
    }
    assert_eq!(world.stats().answered, 12);
    assert_eq!(world.stats().queries, 12);
}

#[tokio::test]
async fn a_change_of_the_zone_is_seen_at_once() {
    let world = World::with_resolvers(&[]).await;
    let calm = VmName::new("calm-otter").unwrap();
    world
        .zone
        .rename(&calm, &VmName::new("new-name").unwrap())
        .unwrap();
    let old = world.ask(WITHOUT, "calm-otter.vm", TYPE::A).await;
    assert_eq!(old.code, RCODE::NameError);
    let new = world.ask(WITHOUT, "new-name.vm", TYPE::A).await;
    new.assert_address("127.0.0.2");
    let back = world
        .ask(WITHOUT, "2.0.0.127.in-addr.arpa", TYPE::PTR)
        .await;
    let packet = Packet::parse(&back.bytes).unwrap();
    assert!(
        matches!(&packet.answers[0].rdata, RData::PTR(ptr) if ptr.0.to_string() == "new-name.vm")
    );
    let v6 = world.ask(WITHOUT, "new-name.vm", TYPE::AAAA).await;
    assert_eq!((v6.code, v6.addresses.len()), (RCODE::NoError, 0));
}

#[tokio::test]
async fn names_of_the_internet_are_for_guests_with_nat_alone() {
    let resolver = Resolver::start().await;
    let world = World::with_resolvers(&[&resolver]).await;
    let message = query("good.example", TYPE::A, None);
    ask_udp(WITH_NAT, world.guests, &message)
        .await
        .assert_address("192.0.2.1");
    for (client, server) in [(WITHOUT, world.guests), (WITH_NAT, world.host)] {
        let reply = ask_udp(client, server, &message).await;
        assert_eq!(reply.code, RCODE::Refused);
        assert!(!reply.recursion);
    }
    assert_eq!(resolver.asked(), ["good.example"]);
    // NAT that is turned off counts for the next query.
    world.zone.set_nat(WITH_NAT, false).unwrap();
    let reply = ask_udp(WITH_NAT, world.guests, &message).await;
    assert_eq!(reply.code, RCODE::Refused);
    assert_eq!((world.stats().forwarded, world.stats().refused), (1, 3));
}

#[tokio::test]
async fn the_instances_names_never_reach_a_resolver() {
    let resolver = Resolver::start().await;
    let world = World::with_resolvers(&[&resolver]).await;
    for name in [
        "nobody.vm",
        "a.b.vm",
        "vm",
        "9.9.0.127.in-addr.arpa",
        "1.1.168.192.in-addr.arpa",
        "printer.local",
    ] {
        for kind in [TYPE::A, TYPE::AAAA, TYPE::PTR, TYPE::TXT] {
            let reply = world.ask(WITH_NAT, name, kind).await;
            assert!(reply.addresses.is_empty());
        }
    }
    assert!(resolver.asked().is_empty());
}

#[tokio::test]
async fn answers_with_other_ids_and_from_others_do_not_count() {
    let resolver = Resolver::start().await;
    let world = World::with_resolvers(&[&resolver]).await;
    for name in [
        "wrong-id.example",
        "wrong-question.example",
        "spoofed.example",
        "garbage.example",
    ] {
        let reply = world.ask(WITH_NAT, name, TYPE::A).await;
        reply.assert_address("192.0.2.1");
    }
}

#[tokio::test]
async fn every_question_has_an_id_and_a_port_of_its_own() {
    let resolver = Resolver::start().await;
    let world = World::with_resolvers(&[&resolver]).await;
    for _ in 0..50 {
        world.ask(WITH_NAT, "good.example", TYPE::A).await;
    }
    let (mut ids, mut ports) = resolver.ids_and_ports();
    for numbers in [&mut ids, &mut ports] {
        assert_eq!(numbers.len(), 50);
        numbers.sort_unstable();
        numbers.dedup();
        // A few may meet by chance.
        assert!(numbers.len() > 40, "{numbers:?}");
    }
}

#[tokio::test]
async fn public_names_that_lead_into_private_networks_are_refused() {
    let resolver = Resolver::start().await;
    let world = World::with_resolvers(&[&resolver]).await;
    for name in [
        "private.example",
        "mixed.example",
        "guest.example",
        "alias.example",
    ] {
        let reply = world.ask(WITH_NAT, name, TYPE::A).await;
        assert_eq!(
            (reply.code, reply.addresses.len()),
            (RCODE::Refused, 0),
            "{name}"
        );
        let mut stream = connect(WITH_NAT, world.guests).await;
        let reply = ask_tcp(&mut stream, &query(name, TYPE::A, None)).await;
        assert_eq!(
            (reply.code, reply.addresses.len()),
            (RCODE::Refused, 0),
            "{name}"
        );
    }
    assert_eq!(world.stats().rebinding, 8);
}

#[tokio::test]
async fn domains_that_are_known_to_be_private_are_let_through_but_never_to_a_guest() {
    let resolver = Resolver::start().await;
    let world = World::new(Config {
        private_domains: vec!["example".parse::<Domain>().unwrap()],
        ..config(&[&resolver])
    })
    .await;
    let reply = world.ask(WITH_NAT, "private.example", TYPE::A).await;
    reply.assert_address("10.0.0.1");
    let reply = world.ask(WITH_NAT, "guest.example", TYPE::A).await;
    assert_eq!(reply.code, RCODE::Refused);
}

#[tokio::test]
async fn a_guest_that_reaches_private_networks_finds_them_by_name_from_the_next_query_on() {
    let resolver = Resolver::start().await;
    let world = World::with_resolvers(&[&resolver]).await;
    world.zone.set_private(WITH_NAT, true).unwrap();
    let reply = world.ask(WITH_NAT, "private.example", TYPE::A).await;
    reply.assert_address("10.0.0.1");
    for (client, name) in [(WITH_NAT, "guest.example"), (WITHOUT, "private.example")] {
        let reply = world.ask(client, name, TYPE::A).await;
        assert_eq!(reply.code, RCODE::Refused);
    }
    world
        .zone
        .set_host_addresses([Ipv4Addr::new(10, 0, 0, 1)].into());
    let reply = world.ask(WITH_NAT, "private.example", TYPE::A).await;
    assert_eq!(reply.code, RCODE::Refused);
    world.zone.set_host_addresses([].into());
    world.zone.set_private(WITH_NAT, false).unwrap();
    let reply = world.ask(WITH_NAT, "private.example", TYPE::A).await;
    assert_eq!(reply.code, RCODE::Refused);
}

#[tokio::test]
async fn private_glue_is_cut_off_an_answer() {
    let resolver = Resolver::start().await;
    let world = World::with_resolvers(&[&resolver]).await;
    for edns in [None, Some(1232)] {
        let message = query("glue.example", TYPE::A, edns);
        let reply = ask_udp(WITH_NAT, world.guests, &message).await;
        reply.assert_address("192.0.2.1");
        let packet = Packet::parse(&reply.bytes).unwrap();
        assert!(packet.additional_records.is_empty());
        assert_eq!(packet.opt().is_some(), edns.is_some());
    }
}

#[tokio::test]
async fn a_truncated_answer_sends_the_client_to_tcp() {
    let resolver = Resolver::start().await;
    let world = World::with_resolvers(&[&resolver]).await;
    let reply = world.ask(WITH_NAT, "truncated.example", TYPE::A).await;
    assert!(reply.truncated && reply.addresses.is_empty());
    let mut stream = connect(WITH_NAT, world.guests).await;
    let message = query("truncated.example", TYPE::A, None);
    let reply = ask_tcp(&mut stream, &message).await;
    assert_eq!(reply.addresses.len(), 100);
    assert!(!reply.truncated);
}

#[tokio::test]
async fn no_answer_is_longer_than_asked_for_whatever_the_resolver_sends() {
    let resolver = Resolver::start().await;
    let world = World::with_resolvers(&[&resolver]).await;
    // The resolver does not keep to the size that it was asked for.
    for (edns, limit) in [(None, 512), (Some(600), 600), (Some(4096), 1232)] {
        let message = query("big.example", TYPE::A, edns);
        let reply = ask_udp(WITH_NAT, world.guests, &message).await;
        assert!(reply.bytes.len() <= limit);
        assert!(reply.truncated);
    }
}

#[tokio::test]
async fn another_resolver_is_asked_where_one_cannot_help() {
    let resolver = Resolver::start().await;
    let deaf = Resolver::deaf().await;
    let failing = Resolver::failing().await;
    let gone = Resolver::gone().await;
    for first in [&deaf, &failing, &gone] {
        let world = World::with_resolvers(&[first, &resolver]).await;
        let reply = world.ask(WITH_NAT, "good.example", TYPE::A).await;
        reply.assert_address("192.0.2.1");
        // From now on the one that helps comes first.
        assert_eq!(world.stats().resolvers[0], resolver.address());
        let mut stream = connect(WITH_NAT, world.guests).await;
        let reply = ask_tcp(&mut stream, &query("good.example", TYPE::A, None)).await;
        reply.assert_address("192.0.2.1");
    }
}

#[tokio::test]
async fn without_any_help_the_client_is_told_so() {
    let deaf = Resolver::deaf().await;
    for resolvers in [&[&deaf][..], &[]] {
        let world = World::with_resolvers(resolvers).await;
        let reply = world.ask(WITH_NAT, "good.example", TYPE::A).await;
        assert_eq!(reply.code, RCODE::ServerFailure);
        assert!(reply.recursion);
        assert_eq!(world.stats().failed, 1);
        assert_eq!(world.stats().waiting, 0);
    }
}

#[tokio::test]
async fn one_client_cannot_take_all_places_at_the_resolvers() {
    let deaf = Resolver::deaf().await;
    let world = World::new(Config {
        attempt_limit: LIMIT,
        in_flight: 6,
        in_flight_per_client: 4,
        ..config(&[&deaf])
    })
    .await;
    let socket = udp_client(WITH_NAT, world.guests).await;
    let message = query("good.example", TYPE::A, None);
    for _ in 0..9 {
        socket.send(&message).await.unwrap();
    }
    for _ in 0..5 {
        assert_eq!(receive(&socket).await.code, RCODE::ServerFailure);
    }
    assert_eq!(world.stats().waiting, 4);
    // The instance's own names are answered meanwhile.
    let reply = world.ask(WITH_NAT, "calm-otter.vm", TYPE::A).await;
    reply.assert_address("127.0.0.2");
}

#[tokio::test]
async fn a_slow_answer_delays_no_other() {
    let resolver = Resolver::start().await;
    let world = World::with_resolvers(&[&resolver]).await;
    let slow = udp_client(WITH_NAT, world.guests).await;
    slow.send(&query("slow.example", TYPE::A, None))
        .await
        .unwrap();
    resolver.wait_until_asked("slow.example").await;
    let reply = world.ask(WITH_NAT, "good.example", TYPE::A).await;
    reply.assert_address("192.0.2.1");
    let mut nothing = [0; 512];
    assert!(slow.try_recv(&mut nothing).is_err());
    resolver.release();
    receive(&slow).await.assert_address("192.0.2.1");
}

#[tokio::test]
async fn too_many_queries_get_no_reply() {
    let world = World::new(Config {
        rate: Rate {
            per_second: 1,
            burst: 2,
        },
        ..config(&[])
    })
    .await;
    let mut stream = connect(WITH_NAT, world.guests).await;
    let message = query("calm-otter.vm", TYPE::A, None);
    for _ in 0..2 {
        ask_tcp(&mut stream, &message)
            .await
            .assert_address("127.0.0.2");
    }
    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
    stream.write_all(&length).await.unwrap();
    stream.write_all(&message).await.unwrap();
    let end = timeout(LIMIT, stream.read(&mut [0; 9])).await.unwrap();
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    assert_eq!(world.stats().dropped, 1);
    // Others are not concerned.
    let reply = world.ask(WITHOUT, "calm-otter.vm", TYPE::A).await;
    reply.assert_address("127.0.0.2");
}

#[tokio::test]
async fn connections_are_bounded_per_client_and_slow_ones_are_ended() {
    let world = World::new(Config {
        connections_per_client: 2,
        connection_limit: Duration::from_millis(200),
        ..config(&[])
    })
    .await;
    let mut connections = Vec::new();
    for _ in 0..3 {
        connections.push(connect(WITH_NAT, world.guests).await);
    }
    // The third is closed at once; the others, which say half a query and no more, in the end.
    for mut connection in connections.into_iter().rev() {
        let _ = connection.write_all(&[0, 30, 1]).await;
        let end = timeout(LIMIT, connection.read(&mut [0; 9])).await.unwrap();
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    }
    let mut again = connect(WITH_NAT, world.guests).await;
    let message = query("calm-otter.vm", TYPE::A, None);
    ask_tcp(&mut again, &message)
        .await
        .assert_address("127.0.0.2");
}

#[tokio::test]
async fn noise_harms_nothing() {
    let world = World::with_resolvers(&[]).await;
    let socket = udp_client(WITH_NAT, world.guests).await;
    let good = query("calm-otter.vm", TYPE::A, Some(1232));
    for length in 0..good.len() {
        socket.send(&good[..length]).await.unwrap();
    }
    socket.send(&[0xff; 9000]).await.unwrap();
    let mut connection = connect(WITH_NAT, world.guests).await;
    connection.write_all(&[0xff; 3000]).await.unwrap();
    let reply = world.ask(WITH_NAT, "calm-otter.vm", TYPE::A).await;
    reply.assert_address("127.0.0.2");
}

#[tokio::test]
async fn a_stopped_server_has_closed_its_sockets() {
    let deaf = Resolver::deaf().await;
    let world = World::with_resolvers(&[&deaf]).await;
    let socket = udp_client(WITH_NAT, world.guests).await;
    socket
        .send(&query("good.example", TYPE::A, None))
        .await
        .unwrap();
    let _connection = connect(WITH_NAT, world.guests).await;
    world.server.stop().await;
    UdpSocket::bind(world.guests).await.unwrap();
    assert!(TcpStream::connect(world.guests).await.is_err());
}
