//! Somebody empties the packet filter inside the namespace.

#![expect(clippy::unwrap_used, reason = "a test fails where it fails")]

mod world;

use banger_host::net::nft::Rules;
use banger_host::net::routing;
use banger_host::op::{NamespaceAnswer, NamespaceOp};
use rustix::process::{Pid, Signal, kill_process};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use world::machine::{Machine, assert_alive, echo};
use world::{POOL, World, run, wait_for};

const SERVER: Ipv4Addr = Ipv4Addr::new(8, 8, 4, 4);

fn repairs(world: &World) -> u64 {
    match world.keeper.request(NamespaceOp::Counters).unwrap().0 {
        NamespaceAnswer::Counters { repairs, .. } => repairs,
        other => panic!("{other:?}"),
    }
}

/// What arrives at `socket` says from whom it is.
fn arrived(socket: &UdpSocket) -> Vec<String> {
    socket.set_nonblocking(true).unwrap();
    let mut buffer = [0; 64];
    let mut all = Vec::new();
    while let Ok(length) = socket.recv(&mut buffer) {
        all.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
    }
    all
}

/// A process that goes on when this goes, also in a test that fails.
struct Stopped(Pid);

impl Stopped {
    fn new(process: Pid) -> Self {
        kill_process(process, Signal::STOP).unwrap();
        Self(process)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::CONT);
    }
}

/// Namespaces without any rule, as between a flush and the repair: the keeper is not running.
#[test]
fn without_its_rules_the_namespace_routes_nothing() {
    let Some(world) = World::new("without_its_rules_the_namespace_routes_nothing") else {
        return;
    };
    world.uplink(&[SERVER]);
    let [one, two] = [1, 2].map(|number| Machine::new(&world, number));
    world.set_nat(one.address(), true);
    let (first, second) = (one.address(), two.address());
    world.ask(NamespaceOp::SetJoin {
        one: first,
        other: second,
        on: true,
    });
    let outside = UdpSocket::bind((SERVER, 0)).unwrap();
    let port = outside.local_addr().unwrap().port();
    let inside = two.udp(port);
    let speak = |said: &'static str| {
        one.inside(move || {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            for to in [SERVER, second] {
                // Without an answer to ARP the kernel gives up by itself.
                let _ = socket.send_to(said.as_bytes(), (to, port));
            }
        });
    };
    let mut heard = (Vec::new(), Vec::new());
    wait_for("the packets of before", || {
        speak("before");
        heard.0.extend(arrived(&outside));
        heard.1.extend(arrived(&inside));
        !heard.0.is_empty() && !heard.1.is_empty()
    });
    // A keeper that is stopped repairs nothing.
    let keeper = world.keeper_pid();
    let stopped = Stopped::new(keeper);
    for gone in [
        &["delete", "table", "inet", "banger"][..],
        &["flush", "ruleset"],
    ] {
        world.inside(|| run("nft", gone));
        arrived(&outside);
        arrived(&inside);
        // Also what comes from outside, or from the other guest, in any order.
        for _ in 0..5 {
            speak("after");
            outside.send_to(b"after", (second, port)).unwrap();
            std::thread::sleep(Duration::from_millis(20));
        }
        let ping = |machine: &Machine, to: Ipv4Addr| {
            let command = format!("ping -c1 -W1 {to} >/dev/null 2>&1 && echo answered || true");
            machine.run("sh", &["-c", &command])
        };
        for to in [SERVER, second, POOL.gateway()] {
            assert_eq!(ping(&one, to), "", "{to} after {gone:?}");
        }
        assert_eq!(arrived(&outside), [""; 0], "{gone:?}");
        assert_eq!(arrived(&inside), [""; 0], "{gone:?}");
    }
    drop(stopped);
    wait_for("the repair", || {
        speak("repaired");
        heard.0 = arrived(&outside);
        !heard.0.is_empty()
    });
}

#[test]
fn a_flushed_ruleset_is_whole_again_within_a_second_and_nobody_is_cut_off() {
    let Some(world) =
        World::new("a_flushed_ruleset_is_whole_again_within_a_second_and_nobody_is_cut_off")
    else {
        return;
    };
    world.uplink(&[SERVER]);
    let machine = Machine::new(&world, 1);
    let listener = TcpListener::bind((SERVER, 0)).unwrap();
    let to = (SERVER, listener.local_addr().unwrap().port());
    echo(listener);
    world.set_nat(machine.address(), true);
    let rules = || world.inside(|| run("nft", &["-s", "list", "ruleset"]));
    // Before a guest is counted.
    let whole = rules();
    let connection = machine.connect(to);
    let mut damages = 0;
    for damage in [
        &["flush", "ruleset"][..],
        &["delete", "table", "bridge", "banger"],
        &["flush", "set", "inet", "banger", "nat_vms"],
        &["add", "rule", "inet", "banger", "way_out", "accept"],
    ] {
        // A machine that is busy with something else may be late once, and is not always.
        let in_time = (0..5).any(|_| {
            world.inside(|| run("nft", damage));
            damages += 1;
            let since = Instant::now();
            wait_for("the rules", || rules() == whole);
            since.elapsed() < Duration::from_secs(1)
        });
        assert!(in_time, "{damage:?}");
    }
    assert_alive(&connection, true);
    assert_eq!(repairs(&world), damages);
}

#[test]
fn whoever_flushes_without_end_opens_nothing_and_our_own_changes_are_no_damage() {
    let Some(world) =
        World::new("whoever_flushes_without_end_opens_nothing_and_our_own_changes_are_no_damage")
    else {
        return;
    };
    world.uplink(&[SERVER]);
    let [one, two] = [1, 2].map(|number| Machine::new(&world, number));
    for number in 10..30 {
        world.ensure_port(&world::guest(number));
        world.set_nat(world::guest(number).address, true);
        world.set_nat(world::guest(number).address, false);
    }
    assert_eq!(repairs(&world), 0);

    let outside = UdpSocket::bind((SERVER, 0)).unwrap();
    let port = outside.local_addr().unwrap().port();
    let inside = two.udp(port);
    let second = two.address();
    let over = AtomicBool::new(false);
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            world.inside(|| {
                while !over.load(Ordering::Relaxed) {
                    run("nft", &["flush", "ruleset"]);
                }
            });
        });
        one.inside(|| {
            // As one who knows the gateway.
            run(
                "ip",
                &[
                    "neighbour",
                    "replace",
                    &POOL.gateway().to_string(),
                    "lladdr",
                    "02:62:61:6e:67:72",
                    "dev",
                    "eth0",
                ],
            );
            run(
                "ip",
                &[
                    "route",
                    "add",
                    &second.to_string(),
                    "via",
                    &POOL.gateway().to_string(),
                ],
            );
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            let until = Instant::now() + Duration::from_secs(2);
            while Instant::now() < until {
                let _ = socket.send_to(b"through", (SERVER, port));
                let _ = socket.send_to(b"through", (second, port));
            }
        });
        over.store(true, Ordering::Relaxed);
    });
    assert_eq!(arrived(&outside), [""; 0]);
    assert_eq!(arrived(&inside), [""; 0]);
    let done = repairs(&world);
    // At most twenty a second, however long it was.
    let most = 20 * (began.elapsed().as_secs() + 1);
    assert!((1..=most).contains(&done), "{done} repairs, {most} at most");
    let whole = || world.inside(|| run("nft", &["list", "tables"]));
    wait_for("the last repair", || whole().contains("bridge banger"));
}

#[test]
fn closing_the_routing_twice_changes_nothing() {
    let Some(world) = World::new("closing_the_routing_twice_changes_nothing") else {
        return;
    };
    let rules = || world.inside(|| run("ip", &["rule"]));
    let before = rules();
    assert!(!before.contains("0:\tfrom all lookup local\n1"), "{before}");
    assert_eq!(before.lines().count(), 10, "{before}");
    world.inside(|| routing::ensure_closed().unwrap());
    assert_eq!(rules(), before);
    assert!(world.inside(|| Rules::new().generation().unwrap()) > 0);
}
