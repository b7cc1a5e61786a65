//! Ports of the test's host that lead into guests.

#![expect(clippy::unwrap_used, reason = "a test fails where it fails")]

mod world;

use banger_host::op::{NamespaceAnswer, NamespaceOp, Protocol, Publication, PublicationState};
use rustix::fd::AsFd;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;
use world::machine::{Machine, answers, assert_alive};
use world::{World, run, wait_for};

const PATIENCE: Duration = Duration::from_secs(20);

fn publication(protocol: Protocol, listen: SocketAddr, machine: &Machine) -> Publication {
    Publication {
        protocol,
        listen,
        tap: machine.port.tap.clone(),
        guest: SocketAddrV4::new(machine.address(), 80),
    }
}

/// A port of loopback that leads to port 80 of the guest. The daemon's own copy of the socket is closed.
fn publish_tcp(world: &World, machine: &Machine) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let listen = listener.local_addr().unwrap();
    let op = NamespaceOp::Publish(publication(Protocol::Tcp, listen, machine));
    world.keeper.request_with(op, &[listener.as_fd()]).unwrap();
    listen
}

fn publish_udp(world: &World, machine: &Machine) -> SocketAddr {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let listen = socket.local_addr().unwrap();
    let op = NamespaceOp::Publish(publication(Protocol::Udp, listen, machine));
    world.keeper.request_with(op, &[socket.as_fd()]).unwrap();
    listen
}

fn published(world: &World) -> Vec<PublicationState> {
    match world.keeper.request(NamespaceOp::ListPublished).unwrap().0 {
        NamespaceAnswer::Published { publications } => publications,
        other => panic!("{other:?}"),
    }
}

fn caller() -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn heard(socket: &UdpSocket) -> (String, SocketAddr) {
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    (
        String::from_utf8_lossy(&buffer[..length]).into_owned(),
        from,
    )
}

#[test]
fn what_is_said_to_a_published_port_reaches_the_guest_and_comes_back_to_the_last_byte() {
    let Some(world) = World::new(
        "what_is_said_to_a_published_port_reaches_the_guest_and_comes_back_to_the_last_byte",
    ) else {
        return;
    };
    run("ip", &["link", "set", "lo", "up"]);
    let machine = Machine::new(&world, 1);
    machine.serve(80);
    let listen = publish_tcp(&world, &machine);
    let said: Vec<u8> = (0..3_000_000_u32)
        .map(|n| n.to_le_bytes()[n as usize % 3])
        .collect();
    let mut stream = TcpStream::connect(listen).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut writer = stream.try_clone().unwrap();
    let mut answer = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            writer.write_all(&said).unwrap();
            // The guest hears the end, and may go on speaking.
            writer.shutdown(Shutdown::Write).unwrap();
        });
        stream.read_to_end(&mut answer).unwrap();
    });
    assert!(answer == said, "{} of {} bytes", answer.len(), said.len());
    wait_for("the end of the connection", || {
        published(&world)[0].connections == 0
    });
    let state = &published(&world)[0];
    assert_eq!((state.served, state.failed), (1, 0));
}

#[test]
fn udp_senders_are_kept_apart_and_each_gets_its_own_answer() {
    let Some(world) = World::new("udp_senders_are_kept_apart_and_each_gets_its_own_answer") else {
        return;
    };
    run("ip", &["link", "set", "lo", "up"]);
    let machine = Machine::new(&world, 1);
    let guest = machine.udp(80);
    guest.set_read_timeout(Some(PATIENCE)).unwrap();
    let listen = publish_udp(&world, &machine);
    let [one, other] = [caller(), caller()];
    one.send_to(b"one", listen).unwrap();
    let (said, first) = heard(&guest);
    assert_eq!(said, "one");
    other.send_to(b"other", listen).unwrap();
    let (said, second) = heard(&guest);
    assert_eq!(said, "other");
    assert_ne!(first, second);
    guest.send_to(b"to other", second).unwrap();
    guest.send_to(b"to one", first).unwrap();
    assert_eq!(heard(&one), ("to one".to_owned(), listen));
    assert_eq!(heard(&other), ("to other".to_owned(), listen));
    assert_eq!(published(&world)[0].connections, 2);
    // More senders than there is room for: the latest are served.
    let many: Vec<UdpSocket> = (0..300).map(|_| caller()).collect();
    for one in &many {
        one.send_to(b"many", listen).unwrap();
        let (_, from) = heard(&guest);
        guest.send_to(b"answer", from).unwrap();
        assert_eq!(heard(one).0, "answer");
    }
    wait_for("the bound", || published(&world)[0].connections == 256);
}

#[test]
fn a_publication_ends_when_told_and_with_its_port_and_its_place_is_free_again() {
    let Some(world) =
        World::new("a_publication_ends_when_told_and_with_its_port_and_its_place_is_free_again")
    else {
        return;
    };
    run("ip", &["link", "set", "lo", "up"]);
    let [machine, other] = [1, 2].map(|number| Machine::new(&world, number));
    for machine in [&machine, &other] {
        machine.serve(80);
    }
    let first = publish_tcp(&world, &machine);
    let second = publish_tcp(&world, &machine);
    let udp = publish_udp(&world, &machine);
    let kept = publish_tcp(&world, &other);
    assert_eq!(published(&world).len(), 4);
    let open = TcpStream::connect(first).unwrap();
    assert_alive(&open, true);
    let end = NamespaceOp::Unpublish {
        protocol: Protocol::Tcp,
        listen: first,
    };
    world.ask(end.clone());
    world.ask(end);
    assert!(!answers(&open, PATIENCE), "what is open ends");
    assert_eq!(
        TcpStream::connect(first).unwrap_err().kind(),
        ErrorKind::ConnectionRefused
    );
    let tap = machine.port.tap.clone();
    world.ask(NamespaceOp::RemovePort { tap });
    TcpStream::connect(second).unwrap_err();
    // Free at once, without any leave for it.
    UdpSocket::bind(udp).unwrap();
    let left = published(&world);
    assert_eq!(left.len(), 1);
    assert_eq!(
        left[0].publication,
        publication(Protocol::Tcp, kept, &other)
    );
    assert_alive(&TcpStream::connect(kept).unwrap(), true);
    // With the keeper the last one goes.
    drop(world.hold);
    wait_for("the keeper's end", || TcpStream::connect(kept).is_err());
}

#[test]
fn the_same_publication_twice_is_one_and_another_target_takes_its_place() {
    let Some(world) =
        World::new("the_same_publication_twice_is_one_and_another_target_takes_its_place")
    else {
        return;
    };
    run("ip", &["link", "set", "lo", "up"]);
    let [machine, other] = [1, 2].map(|number| Machine::new(&world, number));
    machine.serve(80);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let listen = listener.local_addr().unwrap();
    let publish = |publication: &Publication| {
        let op = NamespaceOp::Publish(publication.clone());
        world.keeper.request_with(op, &[listener.as_fd()])
    };
    let wanted = publication(Protocol::Tcp, listen, &machine);
    publish(&wanted).unwrap();
    let open = TcpStream::connect(listen).unwrap();
    assert_alive(&open, true);
    publish(&wanted).unwrap();
    assert_alive(&open, true);
    let moved = publication(Protocol::Tcp, listen, &other);
    publish(&moved).unwrap();
    assert_eq!(published(&world).len(), 1);
    assert_eq!(published(&world)[0].publication, moved);
    assert!(!answers(&open, PATIENCE));

    // What does not fit is refused, and changes nothing.
    let refusal = |publication: &Publication| publish(publication).unwrap_err().to_string();
    let mut wrong = wanted.clone();
    wrong.protocol = Protocol::Udp;
    assert!(refusal(&wrong).contains("is not one that hears udp"));
    let mut wrong = wanted.clone();
    wrong.listen.set_port(1);
    assert!(refusal(&wrong).contains("is not one that hears tcp at 127.0.0.1:1"));
    let mut wrong = wanted.clone();
    wrong.guest.set_ip(other.address());
    assert!(refusal(&wrong).contains("is not the TAP of a running VM with the address"));
    let nothing = world.keeper.request(NamespaceOp::Publish(wanted));
    assert!(
        nothing
            .unwrap_err()
            .to_string()
            .contains("no socket came with")
    );
    assert_eq!(published(&world)[0].publication, moved);
}

#[test]
fn a_guest_that_refuses_or_does_not_answer_costs_nothing_lasting() {
    let Some(world) = World::new("a_guest_that_refuses_or_does_not_answer_costs_nothing_lasting")
    else {
        return;
    };
    run("ip", &["link", "set", "lo", "up"]);
    let machine = Machine::new(&world, 1);
    let listen = publish_tcp(&world, &machine);
    let mut refused = TcpStream::connect(listen).unwrap();
    refused.set_read_timeout(Some(PATIENCE)).unwrap();
    let broken = refused.read(&mut [0]).unwrap_err();
    assert_eq!(broken.kind(), ErrorKind::ConnectionReset);
    assert_eq!(published(&world)[0].failed, 1);
    // Nobody is there at all: as many as there is room for wait, and give up.
    machine.run("ip", &["link", "set", "eth0", "down"]);
    let callers: Vec<TcpStream> = (0..300)
        .map(|_| TcpStream::connect(listen).unwrap())
        .collect();
    wait_for("the bound", || published(&world)[0].connections == 256);
    drop(callers);
    wait_for("the first to give up", || published(&world)[0].failed > 256);
    machine.run("ip", &["link", "set", "eth0", "up"]);
    machine.serve(80);
    wait_for("a place", || {
        TcpStream::connect(listen).is_ok_and(|stream| answers(&stream, PATIENCE))
    });
}
