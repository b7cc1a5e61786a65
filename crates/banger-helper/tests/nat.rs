//! Who reaches the internet, the host and whom, with guests that have a network stack of their own. The test's host
//! plays the internet too: it has public addresses.

#![expect(clippy::unwrap_used, reason = "a test fails where it fails")]

mod world;

use banger_host::net::conntrack;
use banger_host::op::{NamespaceAnswer, NamespaceOp};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use world::machine::{Machine, assert_alive, echo};
use world::{POOL, World, run, wait_for};

const SERVER: Ipv4Addr = Ipv4Addr::new(8, 8, 4, 4);
const HOST: Ipv4Addr = Ipv4Addr::new(9, 9, 9, 9);
/// One address of each kind that no guest reaches.
const CLOSED: [Ipv4Addr; 8] = [
    Ipv4Addr::new(10, 1, 2, 3),
    Ipv4Addr::new(100, 64, 0, 1),
    Ipv4Addr::new(169, 254, 169, 254),
    Ipv4Addr::new(172, 20, 0, 1),
    Ipv4Addr::new(192, 168, 1, 1),
    Ipv4Addr::new(198, 18, 0, 1),
    Ipv4Addr::new(203, 0, 113, 1),
    POOL.host(),
];

/// A server on every address of the host, and a port of it.
fn server() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    echo(listener);
    port
}

#[test]
fn nat_is_off_until_it_is_on_and_ends_what_is_open_when_it_goes_off() {
    let Some(world) =
        World::new("nat_is_off_until_it_is_on_and_ends_what_is_open_when_it_goes_off")
    else {
        return;
    };
    world.uplink(&[SERVER]);
    let machine = Machine::new(&world, 1);
    let other = Machine::new(&world, 2);
    let to = (SERVER, server());
    assert!(!machine.reaches(to));
    wait_for("what was dropped", || world.counters()["nat_dropped"] >= 1);

    world.set_nat(machine.address(), true);
    world.set_nat(machine.address(), true);
    let connection = machine.connect(to);
    assert_alive(&connection, true);
    assert!(!other.reaches(to), "one guest's NAT is not another's");
    let list = || match world.keeper.request(NamespaceOp::ListNat).unwrap().0 {
        NamespaceAnswer::Nat { addresses } => addresses,
        other => panic!("{other:?}"),
    };
    assert_eq!(list(), [machine.address()]);
    let tracked = || {
        let mut found = false;
        let look = |from, to| {
            found |= (from, to) == (machine.address(), SERVER);
            false
        };
        world.inside(|| conntrack::drop_matching(look)).unwrap();
        found
    };
    assert!(tracked());

    world.set_nat(machine.address(), false);
    assert!(!tracked(), "its connections are forgotten");
    assert_alive(&connection, false);
    assert!(!machine.reaches(to));
    assert!(list().is_empty());
    world.set_nat(machine.address(), true);
    assert_alive(&machine.connect(to), true);

    // A port that goes takes its NAT along.
    let tap = machine.port.tap.clone();
    world.ask(NamespaceOp::RemovePort { tap });
    assert!(list().is_empty());
}

#[test]
fn with_nat_on_a_guest_reaches_the_public_internet_and_nothing_else() {
    let Some(world) =
        World::new("with_nat_on_a_guest_reaches_the_public_internet_and_nothing_else")
    else {
        return;
    };
    world.uplink(&[SERVER, HOST]);
    for address in CLOSED.iter().filter(|address| **address != POOL.host()) {
        run(
            "ip",
            &["address", "add", &format!("{address}/32"), "dev", "lo"],
        );
    }
    let machine = Machine::new(&world, 1);
    let port = server();
    world.set_nat(machine.address(), true);
    let connection = machine.connect((HOST, port));
    // The host's own addresses, as they become known; also for what is open.
    let addresses = vec![HOST];
    world.ask(NamespaceOp::SetHostAddresses { addresses });
    assert_alive(&connection, false);
    assert!(!machine.reaches((HOST, port)));
    wait_for("what was dropped", || world.counters()["host_dropped"] >= 2);
    for address in CLOSED {
        let before = world.counters()["closed_dropped"];
        assert!(!machine.reaches((address, port)), "{address}");
        wait_for(&address.to_string(), || {
            world.counters()["closed_dropped"] > before
        });
    }
    // Nor anything in the namespace: the gateway, or the uplink's address.
    for address in [POOL.gateway(), POOL.uplink()] {
        assert!(!machine.reaches((address, port)), "{address}");
    }
    assert_alive(&machine.connect((SERVER, port)), true);
    // The host reaches the guest, which cannot answer as anybody else.
    machine.serve(22);
    assert_alive(
        &world::machine::connect((machine.address(), 22), std::time::Duration::from_secs(20))
            .unwrap(),
        true,
    );
    let before = world.counters()["sender_dropped"];
    machine.run("ip", &["address", "add", "172.31.240.77/21", "dev", "eth0"]);
    machine.inside(|| {
        let socket = std::net::UdpSocket::bind(("172.31.240.77", 0)).unwrap();
        socket.send_to(b"forged", (SERVER, port)).unwrap();
    });
    wait_for("the drop", || world.counters()["sender_dropped"] > before);
    // IPv6 is not spoken at all.
    let before = world.counters()["sender_dropped"];
    machine.inside(|| {
        // Without IPv6 in the kernel the guest cannot even try.
        if std::fs::write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "0").is_ok() {
            run(
                "ip",
                &["-6", "address", "add", "fd00::2/64", "dev", "eth0", "nodad"],
            );
            let socket = std::net::UdpSocket::bind("[::]:0").unwrap();
            socket.send_to(b"six", "[fd00::1]:9").unwrap();
            wait_for("the drop", || world.counters()["sender_dropped"] > before);
        }
    });
}

#[test]
fn only_guests_that_are_joined_reach_each_other() {
    let Some(world) = World::new("only_guests_that_are_joined_reach_each_other") else {
        return;
    };
    let [one, two, three] = [1, 2, 3].map(|number| Machine::new(&world, number));
    for machine in [&one, &two, &three] {
        machine.serve(80);
    }
    let join = |a: &Machine, b: &Machine, on| {
        world.ask(NamespaceOp::SetJoin {
            one: a.address(),
            other: b.address(),
            on,
        });
    };
    let list = || match world.keeper.request(NamespaceOp::ListJoins).unwrap().0 {
        NamespaceAnswer::Joins { joins } => joins,
        other => panic!("{other:?}"),
    };
    assert!(!one.reaches((two.address(), 80)));
    join(&two, &one, true);
    assert_eq!(list(), [(one.address(), two.address())]);
    let forth = one.connect((two.address(), 80));
    let back = two.connect((one.address(), 80));
    assert_alive(&forth, true);
    assert_alive(&back, true);
    // Nobody else, and not by way of a neighbour.
    for (from, to) in [(&one, &three), (&three, &one), (&three, &two)] {
        assert!(!from.reaches((to.address(), 80)));
    }
    // One who knows the gateway's MAC gets no further.
    let before = world.counters()["unjoined_dropped"];
    let (to, gateway) = (three.address().to_string(), POOL.gateway().to_string());
    one.run("ip", &["route", "add", &to, "via", &gateway]);
    assert!(!one.reaches((three.address(), 80)));
    wait_for("what was dropped", || {
        world.counters()["unjoined_dropped"] > before
    });
    // Off again: also for what is open.
    join(&one, &two, false);
    assert_alive(&forth, false);
    assert_alive(&back, false);
    assert!(!one.reaches((two.address(), 80)));
    assert!(list().is_empty());
    join(&one, &two, true);
    let tap = two.port.tap.clone();
    world.ask(NamespaceOp::RemovePort { tap });
    assert!(list().is_empty(), "a port that goes takes its joins along");
}

#[test]
fn private_networks_are_open_to_whom_they_were_opened_and_the_host_and_metadata_to_nobody() {
    let Some(world) = World::new(
        "private_networks_are_open_to_whom_they_were_opened_and_the_host_and_metadata_to_nobody",
    ) else {
        return;
    };
    const PRIVATE: [Ipv4Addr; 4] = [
        Ipv4Addr::new(10, 1, 2, 3),
        Ipv4Addr::new(100, 64, 0, 1),
        Ipv4Addr::new(172, 20, 0, 1),
        Ipv4Addr::new(192, 168, 1, 1),
    ];
    const OWN: Ipv4Addr = Ipv4Addr::new(192, 168, 7, 7);
    world.uplink(&[SERVER, OWN]);
    for address in CLOSED.iter().filter(|address| **address != POOL.host()) {
        run(
            "ip",
            &["address", "add", &format!("{address}/32"), "dev", "lo"],
        );
    }
    world.ask(NamespaceOp::SetHostAddresses {
        addresses: vec![OWN],
    });
    let [one, two] = [1, 2].map(|number| Machine::new(&world, number));
    let port = server();
    let private = |on| {
        world.ask(NamespaceOp::SetPrivate {
            address: one.address(),
            on,
        });
    };
    // Not without NAT.
    private(true);
    assert!(!one.reaches((PRIVATE[0], port)));
    world.set_nat(one.address(), true);
    world.set_nat(two.address(), true);
    let connections = PRIVATE.map(|address| one.connect((address, port)));
    let public = one.connect((SERVER, port));
    for connection in connections.iter().chain([&public]) {
        assert_alive(connection, true);
    }
    for address in CLOSED.iter().filter(|address| !PRIVATE.contains(address)) {
        assert!(!one.reaches((*address, port)), "{address}");
    }
    // The host, the addresses of guests that are not there, and the gateway.
    let [a, b, c, _] = POOL.gateway().octets();
    for address in [
        OWN,
        Ipv4Addr::new(a, b, c, 99),
        POOL.gateway(),
        POOL.uplink(),
    ] {
        assert!(!one.reaches((address, port)), "{address}");
    }
    two.serve(80);
    assert!(!one.reaches((two.address(), 80)), "another guest");
    assert!(!two.reaches((PRIVATE[0], port)), "what another was given");
    let list = || match world.keeper.request(NamespaceOp::ListPrivate).unwrap().0 {
        NamespaceAnswer::Nat { addresses } => addresses,
        other => panic!("{other:?}"),
    };
    assert_eq!(list(), [one.address()]);

    // Off again: also for what is open, and not for the internet.
    private(false);
    for connection in &connections {
        assert_alive(connection, false);
    }
    assert!(!one.reaches((PRIVATE[0], port)));
    assert_alive(&public, true);
    private(true);
    let tap = one.port.tap.clone();
    world.ask(NamespaceOp::RemovePort { tap });
    assert!(list().is_empty(), "a port that goes takes it along");
}

/// One datagram from each of `count` ports of the guest.
fn speak(machine: &Machine, to: (Ipv4Addr, u16), count: usize) {
    machine.inside(|| {
        for _ in 0..count {
            let socket = UdpSocket::bind((machine.address(), 0)).unwrap();
            // The other side may have said already that nobody is there.
            let _ = socket.send_to(b"hello", to);
        }
    });
}

#[test]
fn one_guest_does_not_fill_the_table_of_connections() {
    const LIMIT: u64 = 8192;
    let Some(world) = World::new("one_guest_does_not_fill_the_table_of_connections") else {
        return;
    };
    world.uplink(&[SERVER]);
    let [one, two] = [1, 2].map(|number| Machine::new(&world, number));
    for machine in [&one, &two] {
        machine.serve(80);
        world.set_nat(machine.address(), true);
    }
    world.ask(NamespaceOp::SetJoin {
        one: one.address(),
        other: two.address(),
        on: true,
    });
    let setting = |name: &str| format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
    let tracked = || -> u64 {
        let count = world.inside(|| std::fs::read_to_string(setting("count")).unwrap());
        count.trim().parse().unwrap()
    };
    let crowd = || world.counters()["crowd_dropped"];
    // However slow this machine is, none is forgotten meanwhile.
    for name in ["udp_timeout", "udp_timeout_stream"] {
        world.inside(|| std::fs::write(setting(name), "600").unwrap());
    }
    let open = one.connect((two.address(), 80));
    let before = tracked();
    wait_for("a full count", || {
        speak(&one, (two.address(), 9), 300);
        crowd() > 0
    });
    let full = tracked();
    // The first was counted, too.
    assert!(
        (before..before + LIMIT).contains(&(full - 1)),
        "{before} {full}"
    );
    assert!(full > LIMIT / 2, "{full}");
    let (dropped, to) = (crowd(), (SERVER, server()));
    assert!(!one.reaches(to), "nor does it open any other");
    wait_for("what was dropped", || crowd() > dropped);
    assert!(tracked() <= full + 20, "{full} {}", tracked());
    // What it has goes on, and so does everybody else.
    assert_alive(&open, true);
    assert_alive(&two.connect(to), true);
    assert_alive(&two.connect((one.address(), 80)), true);
}

#[test]
fn one_guest_opens_connections_to_the_internet_at_a_bounded_pace() {
    let Some(world) = World::new("one_guest_opens_connections_to_the_internet_at_a_bounded_pace")
    else {
        return;
    };
    world.uplink(&[SERVER]);
    let [one, two] = [1, 2].map(|number| Machine::new(&world, number));
    world.set_nat(one.address(), true);
    world.set_nat(two.address(), true);
    let to = (SERVER, server());
    let open = one.connect(to);
    speak(&one, to, 3000);
    assert_eq!(
        world.counters()["crowd_dropped"],
        0,
        "a crowd of a moment passes"
    );
    wait_for("the first drop", || {
        speak(&one, to, 300);
        world.counters()["crowd_dropped"] > 0
    });
    assert_alive(&open, true);
    assert_alive(&two.connect(to), true);
    // It is let in again.
    wait_for("its turn", || one.reaches(to));
}

#[test]
fn a_stream_that_nobody_answers_is_one_connection_however_much_it_sends() {
    let name = "a_stream_that_nobody_answers_is_one_connection_however_much_it_sends";
    let Some(world) = World::new(name) else {
        return;
    };
    world.uplink(&[SERVER]);
    let one = Machine::new(&world, 1);
    world.set_nat(one.address(), true);
    one.inside(|| {
        let socket = UdpSocket::bind((one.address(), 0)).unwrap();
        for _ in 0..10_000 {
            socket.send_to(b"hello", (SERVER, 9)).unwrap();
        }
    });
    assert_eq!(world.counters()["crowd_dropped"], 0);
}

#[test]
fn who_has_no_port_gets_neither_nat_nor_a_join() {
    let Some(world) = World::new("who_has_no_port_gets_neither_nat_nor_a_join") else {
        return;
    };
    let (one, other) = (world::guest(1), world::guest(2));
    world.ensure_port(&one);
    let refusal = |op| world.keeper.request(op).unwrap_err().to_string();
    for address in [other.address, POOL.gateway(), SERVER] {
        let said = refusal(NamespaceOp::SetNat { address, on: true });
        let expected = format!("no running VM has the address {address}");
        assert!(said.contains(&expected), "{said}");
        world.set_nat(address, false);
    }
    let join = |one, other| NamespaceOp::SetJoin {
        one,
        other,
        on: true,
    };
    assert!(refusal(join(one.address, other.address)).contains("no running VM has the address"));
    assert!(refusal(join(one.address, one.address)).contains("cannot be joined to itself"));
}

#[test]
fn the_first_guests_nat_costs_as_many_requests_as_the_last() {
    let Some(world) = World::new("the_first_guests_nat_costs_as_many_requests_as_the_last") else {
        return;
    };
    // One transaction each: the number of the ruleset's generation tells.
    let generation = || world.inside(|| banger_host::net::nft::Rules::new().generation().unwrap());
    let step = |number| {
        let address = world::guest(number).address;
        world.ensure_port(&world::guest(number));
        let before = generation();
        world.set_nat(address, true);
        generation() - before
    };
    let steps: Vec<u32> = (1..=40).map(step).collect();
    assert!(steps.iter().all(|step| *step == 1), "{steps:?}");
}
