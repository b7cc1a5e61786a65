//! What passes between guests, namespace and host, frame by frame, with TAP descriptors that play the guests.

#![expect(clippy::unwrap_used, reason = "a test fails where it fails")]

mod world;

use banger_core::id::InstanceId;
use banger_host::host_side::{Caller, Host};
use banger_host::net::host;
use banger_host::op::{HostOp, NamespaceOp, Port};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use std::net::Ipv4Addr;
use world::{HEADER_BYTES, POOL, World, guest, link_names, run, wait_for};

const BRIDGE_MAC: [u8; 6] = [0x02, 0x62, 0x61, 0x6e, 0x67, 0x72];
const TCP: u8 = 6;
const ROOT: Caller = Caller { uid: 0 };

fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let bytes = parts.concat();
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).unwrap()).to_be_bytes()
}

fn ethernet(to: [u8; 6], from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

/// An IPv4 packet with a TCP segment of these ports, numbers and flags.
fn segment(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), numbers: (u32, u32), flags: u8) -> Vec<u8> {
    let mut tcp = Vec::new();
    tcp.extend(from.1.to_be_bytes());
    tcp.extend(to.1.to_be_bytes());
    tcp.extend(numbers.0.to_be_bytes());
    tcp.extend(numbers.1.to_be_bytes());
    tcp.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    let (from, to) = (from.0.octets(), to.0.octets());
    let sum = checksum(&[&from, &to, &[0, TCP, 0, 20], &tcp]);
    tcp[16..18].copy_from_slice(&sum);
    let mut ip = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, TCP, 0, 0];
    ip.extend(from);
    ip.extend(to);
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum);
    ip.extend(tcp);
    ip
}

fn syn(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    segment((from, 4000), (to, 22), (1, 0), 0x02)
}

fn arp(from_mac: [u8; 6], from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    [
        &[0, 1, 8, 0, 6, 4, 0, 1][..],
        &from_mac,
        &from.octets(),
        &[0; 6],
        &to.octets(),
    ]
    .concat()
}

fn send(tap: &OwnedFd, frame: &[u8]) {
    let bytes = [&[0; HEADER_BYTES], frame].concat();
    assert_eq!(rustix::io::write(tap, &bytes).unwrap(), bytes.len());
}

/// The next frame that reaches the guest; nothing after half a minute.
fn receive(tap: &OwnedFd) -> Option<Vec<u8>> {
    let limit = Timespec {
        tv_sec: 30,
        tv_nsec: 0,
    };
    if poll(&mut [PollFd::new(tap, PollFlags::IN)], Some(&limit)).unwrap() == 0 {
        return None;
    }
    let mut bytes = vec![0; 4096];
    let length = rustix::io::read(tap, &mut bytes).unwrap();
    Some(bytes[HEADER_BYTES..length].to_vec())
}

/// An address and a port.
type End = (Ipv4Addr, u16);

/// The two ends and the sequence number of a frame's TCP segment.
fn tcp_of(frame: &[u8]) -> Option<(End, End, u32)> {
    if frame[12..14] != [8, 0] || frame[23] != TCP {
        return None;
    }
    let address = |at: usize| Ipv4Addr::new(frame[at], frame[at + 1], frame[at + 2], frame[at + 3]);
    let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    let number = u32::from_be_bytes(frame[38..42].try_into().unwrap());
    Some(((address(26), port(34)), (address(30), port(36)), number))
}

/// Takes the guest's next connection and answers as an open port does.
fn accept(tap: &OwnedFd, port: &Port) -> Ipv4Addr {
    let frame = receive(tap).expect("a connection reaches the guest");
    assert_eq!(
        frame[..6],
        port.mac.0,
        "nobody was asked who has the address"
    );
    let (from, to, number) = tcp_of(&frame).expect("it is TCP");
    assert_eq!(to.0, port.address);
    let answer = segment(to, from, (77, number.wrapping_add(1)), 0x12);
    send(tap, &ethernet(BRIDGE_MAC, port.mac.0, 0x0800, &answer));
    from.0
}

#[test]
fn a_guest_sends_as_itself_or_not_at_all() {
    let Some(world) = World::new("a_guest_sends_as_itself_or_not_at_all") else {
        return;
    };
    let (one, two) = (guest(1), guest(2));
    let tap = world.attach(&one);
    let _other = world.attach(&two);
    let gateway = POOL.gateway();
    let broadcast = [0xff; 6];
    let own = one.mac.0;
    let tagged = [&[0, 5, 8, 0][..], &syn(one.address, gateway)].concat();
    let forged = [
        (
            "MAC",
            ethernet(BRIDGE_MAC, two.mac.0, 0x0800, &syn(one.address, gateway)),
        ),
        (
            "address",
            ethernet(BRIDGE_MAC, own, 0x0800, &syn(two.address, gateway)),
        ),
        (
            "no address yet",
            ethernet(broadcast, own, 0x0800, &syn(Ipv4Addr::UNSPECIFIED, gateway)),
        ),
        (
            "ARP sender's MAC",
            ethernet(
                broadcast,
                own,
                0x0806,
                &arp(two.mac.0, one.address, gateway),
            ),
        ),
        (
            "ARP sender's address",
            ethernet(broadcast, own, 0x0806, &arp(own, two.address, gateway)),
        ),
        (
            "ARP probe",
            ethernet(
                broadcast,
                own,
                0x0806,
                &arp(own, Ipv4Addr::UNSPECIFIED, gateway),
            ),
        ),
        (
            "ARP in a foreign frame",
            ethernet(
                broadcast,
                two.mac.0,
                0x0806,
                &arp(own, one.address, gateway),
            ),
        ),
        (
            "IPv6",
            ethernet([0x33, 0x33, 0, 0, 0, 2], own, 0x86dd, &[0x60; 60]),
        ),
        ("VLAN", ethernet(BRIDGE_MAC, own, 0x8100, &tagged)),
        (
            "unknown protocol",
            ethernet(broadcast, own, 0x88cc, &[0; 50]),
        ),
    ];
    for (number, (what, frame)) in forged.iter().enumerate() {
        send(&tap, frame);
        wait_for(what, || {
            world.dropped("bridge", "sender_dropped") == number as u64 + 1
        });
    }
    // As itself it gets an answer of the gateway to ARP, and nothing to TCP.
    send(
        &tap,
        &ethernet(broadcast, own, 0x0806, &arp(own, one.address, gateway)),
    );
    let answer = receive(&tap).expect("the gateway answers ARP");
    assert_eq!(
        (&answer[12..14], &answer[22..28]),
        (&[8, 6][..], &BRIDGE_MAC[..])
    );
    send(
        &tap,
        &ethernet(BRIDGE_MAC, own, 0x0800, &syn(one.address, gateway)),
    );
    wait_for("the drop at the gateway", || {
        world.dropped("inet", "input_dropped") == 1
    });
    // Nor to the veth's addresses, or through them.
    send(
        &tap,
        &ethernet(BRIDGE_MAC, own, 0x0800, &syn(one.address, POOL.uplink())),
    );
    send(
        &tap,
        &ethernet(BRIDGE_MAC, own, 0x0800, &syn(one.address, gateway)),
    );
    wait_for("the third drop", || {
        world.dropped("inet", "input_dropped") + world.dropped("inet", "forward_dropped") >= 2
    });
    assert_eq!(
        world.dropped("bridge", "sender_dropped"),
        forged.len() as u64
    );
}

#[test]
fn guests_do_not_reach_each_other_but_the_namespace_reaches_them() {
    let Some(world) = World::new("guests_do_not_reach_each_other_but_the_namespace_reaches_them")
    else {
        return;
    };
    let (one, two) = (guest(1), guest(2));
    let sender = world.attach(&one);
    let receiver = world.attach(&two);
    for to in [two.mac.0, [0xff; 6]] {
        send(
            &sender,
            &ethernet(to, one.mac.0, 0x0800, &syn(one.address, two.address)),
        );
        send(
            &sender,
            &ethernet(
                to,
                one.mac.0,
                0x0806,
                &arp(one.mac.0, one.address, two.address),
            ),
        );
    }
    let connect = NamespaceOp::Connect {
        address: two.address,
        port: 22,
        timeout_ms: 20_000,
    };
    std::thread::scope(|scope| {
        let connection = scope.spawn(|| world.keeper.request(connect));
        // The very first frame that comes is the keeper's: none of the other guest's came through.
        assert_eq!(accept(&receiver, &two), POOL.gateway());
        let (_, sockets) = connection.join().unwrap().unwrap();
        assert_eq!(sockets.len(), 1);
    });
}

#[test]
fn the_host_reaches_guests_over_the_veth_and_has_nothing_left_afterwards() {
    let Some(world) =
        World::new("the_host_reaches_guests_over_the_veth_and_has_nothing_left_afterwards")
    else {
        return;
    };
    let instance: InstanceId = "0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a".parse().unwrap();
    let namespace = world.namespace();
    let descriptors = [namespace.as_fd()];
    let machine = Host::with_folder(world.directory.path().join("host"));
    let attach = HostOp::AttachVeth {
        instance,
        pool: POOL,
    };
    let detach = HostOp::DetachVeth { instance };
    run("ip", &["link", "set", "lo", "up"]);
    let state = || {
        link_names()
            + &run("ip", &["-o", "address"])
            // The kernel notices in its own time that the link has come up.
            + &run("ip", &["route", "show", "table", "all"]).replace("linkdown ", "")
    };
    let before = state();
    machine.perform(ROOT, &attach, &descriptors).unwrap();
    let uplink = NamespaceOp::EnsureUplink { pool: POOL };
    world.keeper.request(uplink.clone()).unwrap();
    let attached = state();
    assert_ne!(attached, before);
    machine.perform(ROOT, &attach, &descriptors).unwrap();
    world.keeper.request(uplink).unwrap();
    assert_eq!(state(), attached, "attaching twice changes nothing");

    let port = guest(1);
    let tap = world.attach(&port);
    std::thread::scope(|scope| {
        let (address, port_number) = (port.address, 22);
        // A new thread is in this thread's network.
        let client = scope.spawn(move || {
            banger_host::net::connect::connect(
                std::net::SocketAddrV4::new(address, port_number),
                std::time::Duration::from_secs(20),
            )
        });
        assert_eq!(accept(&tap, &port), POOL.host());
        client.join().unwrap().unwrap();
    });
    // The guest cannot open a connection to the host.
    send(
        &tap,
        &ethernet(
            BRIDGE_MAC,
            port.mac.0,
            0x0800,
            &syn(port.address, POOL.host()),
        ),
    );
    wait_for("the drop", || world.dropped("inet", "closed_dropped") >= 1);

    machine.perform(ROOT, &detach, &[]).unwrap();
    machine.perform(ROOT, &detach, &[]).unwrap();
    assert_eq!(state(), before);
}

#[test]
fn somebody_elses_route_is_never_shadowed() {
    let Some(world) = World::new("somebody_elses_route_is_never_shadowed") else {
        return;
    };
    let namespace = world.namespace();
    run("ip", &["link", "set", "lo", "up"]);
    run("ip", &["route", "add", "172.31.247.0/24", "dev", "lo"]);
    let before = link_names();
    let attach = HostOp::AttachVeth {
        instance: "0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a".parse().unwrap(),
        pool: POOL,
    };
    let machine = Host::with_folder(world.directory.path().join("host"));
    let error = machine
        .perform(ROOT, &attach, &[namespace.as_fd()])
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("route 172.31.247.0/24 dev lo overlaps"),
        "{error}"
    );
    assert_eq!(link_names(), before);
    let routes = host::host_routes().unwrap();
    assert!(
        routes
            .iter()
            .any(|route| route.to_string() == "172.31.247.0/24")
    );
    assert!(routes.iter().all(|route| route.prefix() > 0));
}
