//! The sockets for the DNS server: who reaches them, and how often.

#![expect(clippy::unwrap_used, reason = "a test fails where it fails")]

mod world;

use banger_host::op::{NamespaceAnswer, NamespaceOp};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;
use world::machine::{Machine, assert_alive, connect, echo};
use world::{POOL, World};

const PATIENCE: Duration = Duration::from_secs(20);

/// UDP and TCP for guests, and for the host if there are any.
fn sockets(world: &World) -> Vec<(UdpSocket, TcpListener)> {
    let (answer, descriptors) = world.keeper.request(NamespaceOp::DnsSockets).unwrap();
    let host = descriptors.len() == 4;
    assert_eq!(answer, NamespaceAnswer::DnsSockets { host });
    let mut descriptors = descriptors.into_iter();
    let mut pairs = Vec::new();
    while let (Some(udp), Some(tcp)) = (descriptors.next(), descriptors.next()) {
        let (udp, tcp) = (UdpSocket::from(udp), TcpListener::from(tcp));
        // As they come they do not wait; here it is simpler if they do.
        assert_eq!(
            udp.recv(&mut [0]).unwrap_err().kind(),
            std::io::ErrorKind::WouldBlock
        );
        udp.set_nonblocking(false).unwrap();
        udp.set_read_timeout(Some(PATIENCE)).unwrap();
        tcp.set_nonblocking(false).unwrap();
        pairs.push((udp, tcp));
    }
    pairs
}

fn ask(to: Ipv4Addr) -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.send_to(b"who?", (to, 53)).unwrap();
    socket
}

fn answer(server: &UdpSocket) {
    let mut question = [0; 64];
    let (length, from) = server.recv_from(&mut question).unwrap();
    assert_eq!(&question[..length], b"who?");
    server.send_to(b"me", from).unwrap();
}

fn is_answered(socket: &UdpSocket) {
    let mut answer = [0; 64];
    let length = socket.recv(&mut answer).unwrap();
    assert_eq!(&answer[..length], b"me");
}

#[test]
fn guests_and_host_ask_at_the_gateway_each_its_own_socket_and_nowhere_else() {
    let Some(world) =
        World::new("guests_and_host_ask_at_the_gateway_each_its_own_socket_and_nowhere_else")
    else {
        return;
    };
    assert_eq!(sockets(&world).len(), 1, "there is no veth yet");
    world.uplink(&[]);
    let mut pairs = sockets(&world);
    let (for_host, host_tcp) = pairs.pop().unwrap();
    let (for_guests, guests_tcp) = pairs.pop().unwrap();
    let machine = Machine::new(&world, 1);
    let question = machine.inside(|| ask(POOL.gateway()));
    answer(&for_guests);
    is_answered(&question);
    let question = ask(POOL.gateway());
    answer(&for_host);
    is_answered(&question);
    echo(guests_tcp);
    echo(host_tcp);
    assert_alive(&machine.connect((POOL.gateway(), 53)), true);
    assert_alive(&connect((POOL.gateway(), 53), PATIENCE).unwrap(), true);
    // Nor is any other port or address open.
    assert!(!machine.reaches((POOL.uplink(), 53)));
    assert!(!machine.reaches((POOL.gateway(), 54)));
    assert!(connect((POOL.gateway(), 54), Duration::from_millis(300)).is_err());
    // Each heard what was meant for it and nothing else.
    for socket in [&for_guests, &for_host] {
        socket.set_nonblocking(true).unwrap();
        socket.recv(&mut [0]).unwrap_err();
    }
}

#[test]
fn a_server_that_starts_again_gets_the_same_places() {
    let Some(world) = World::new("a_server_that_starts_again_gets_the_same_places") else {
        return;
    };
    let machine = Machine::new(&world, 1);
    for _ in 0..2 {
        let (udp, tcp) = sockets(&world).remove(0);
        let question = machine.inside(|| ask(POOL.gateway()));
        answer(&udp);
        is_answered(&question);
        // One connection that the server ends, so that its place is still marked as used.
        let client: TcpStream = machine.connect((POOL.gateway(), 53));
        drop(tcp.accept().unwrap());
        drop(client);
    }
}

#[test]
fn a_guest_that_asks_too_much_is_held_back_alone() {
    let Some(world) = World::new("a_guest_that_asks_too_much_is_held_back_alone") else {
        return;
    };
    let (udp, _tcp) = sockets(&world).remove(0);
    let [one, other] = [1, 2].map(|number| Machine::new(&world, number));
    one.inside(|| {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        // At once far more than a second's worth and the burst. What the cable loses was not dropped by a rule.
        for _ in 0..20_000 {
            let _ = socket.send_to(b"flood", (POOL.gateway(), 53));
        }
    });
    world::wait_for("the limit", || world.counters()["dns_dropped"] > 0);
    // The flood's beginning came through and fills the queue; the server works it off.
    std::thread::spawn(move || {
        let mut question = [0; 64];
        while let Ok((length, from)) = udp.recv_from(&mut question) {
            if &question[..length] == b"who?" {
                udp.send_to(b"me", from).unwrap();
            }
        }
    });
    world::wait_for("an answer for the other guest", || {
        let question = other.inside(|| ask(POOL.gateway()));
        question
            .set_read_timeout(Some(Duration::from_millis(300)))
            .unwrap();
        question.recv(&mut [0]).is_ok()
    });
}
