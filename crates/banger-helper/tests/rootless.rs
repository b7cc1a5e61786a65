//! An ordinary user's way out, with `pasta`. The test's host plays the internet too.

#![expect(clippy::unwrap_used, reason = "a test fails where it fails")]

mod world;

use banger_host::exec::Run;
use banger_host::net::pasta::{self, PastaError};
use banger_host::op::NamespaceOp;
use rustix::process::{Pid, Signal, kill_process};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use world::machine::{Machine, assert_alive, echo};
use world::{World, as_root, run, wait_for};

const SERVER: Ipv4Addr = Ipv4Addr::new(8, 8, 4, 4);
const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 112, 5);
const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 1, 2, 3);
const ROUTER: Ipv4Addr = Ipv4Addr::new(203, 0, 112, 1);

/// A rootless world whose host has `pasta`, a default route and the server's address.
fn online(test: &str) -> Option<World> {
    if Run::new("pasta").arg("--version").run().is_err() {
        eprintln!("SKIPPED: {test}: needs passt");
        return None;
    }
    let world = World::rootless(test)?;
    world.ensure_base();
    as_root(|| {
        run("ip", &["link", "set", "lo", "up"]);
        run(
            "ip",
            &[
                "link", "add", "wan", "type", "veth", "peer", "name", "router",
            ],
        );
        run("ip", &["link", "set", "router", "up"]);
        run("ip", &["link", "set", "wan", "up"]);
        run(
            "ip",
            &["address", "add", &format!("{HOST}/24"), "dev", "wan"],
        );
        run(
            "ip",
            &["route", "add", "default", "via", &ROUTER.to_string()],
        );
        run(
            "ip",
            &["address", "add", &format!("{SERVER}/32"), "dev", "lo"],
        );
    });
    Some(world)
}

fn server() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    echo(listener);
    port
}

/// The processes that hold the way out of `keeper`: `pasta`, and who holds it.
fn holders(keeper: Pid) -> Vec<(Pid, bool)> {
    let number = keeper.as_raw_nonzero().to_string();
    let namespace = format!("/proc/{number}/ns/net");
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        let (Some(pid), Ok(words)) = (pid, std::fs::read(entry.path().join("cmdline"))) else {
            continue;
        };
        let words: Vec<&[u8]> = words.split(|byte| *byte == 0).collect();
        let is_pasta = words.contains(&namespace.as_bytes());
        let holds = words
            .windows(2)
            .any(|pair| pair == [b"--way-out-of", number.as_bytes()])
            && words[0].ends_with(b"banger-netns");
        if is_pasta || holds {
            found.push((Pid::from_raw(pid).unwrap(), is_pasta));
        }
    }
    found.sort_unstable_by_key(|(pid, _)| pid.as_raw_nonzero());
    found
}

#[test]
fn an_ordinary_users_guest_reaches_the_internet_by_pasta_and_not_the_host() {
    let Some(world) =
        online("an_ordinary_users_guest_reaches_the_internet_by_pasta_and_not_the_host")
    else {
        return;
    };
    // What Docker and others close is none of `pasta`'s: what it sends comes from the host itself.
    as_root(|| {
        let closed = "table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }";
        run("nft", &[closed]);
    });
    let ensure = || pasta::ensure(&world.keeper, &world.program, Path::new("pasta"));
    let keeper = world.keeper_pid();
    ensure().unwrap();
    let there = holders(keeper);
    assert_eq!(
        there.iter().filter(|(_, is_pasta)| *is_pasta).count(),
        1,
        "{there:?}"
    );
    assert_eq!(there.len(), 2, "{there:?}");
    ensure().unwrap();
    assert_eq!(holders(keeper), there, "once is enough");

    let machine = Machine::new(&world, 1);
    let port = server();
    assert!(!machine.reaches((SERVER, port)), "NAT is off");
    world.set_nat(machine.address(), true);
    let connection = machine.connect((SERVER, port));
    assert_alive(&connection, true);
    // Neither the host by its address, nor its loopback by way of the router's, as `pasta` would have it.
    for address in [HOST, ROUTER, Ipv4Addr::LOCALHOST] {
        assert!(!machine.reaches((address, port)), "{address}");
    }
    // A private network only by its own switch.
    as_root(|| {
        run(
            "ip",
            &["address", "add", &format!("{PRIVATE}/32"), "dev", "lo"],
        );
    });
    assert!(!machine.reaches((PRIVATE, port)));
    world.ask(NamespaceOp::SetPrivate {
        address: machine.address(),
        on: true,
    });
    assert_alive(&machine.connect((PRIVATE, port)), true);
    assert!(!machine.reaches((ROUTER, port)));
    let addresses = vec![SERVER, HOST];
    world.ask(NamespaceOp::SetHostAddresses { addresses });
    assert_alive(&connection, false);
    assert!(!machine.reaches((SERVER, port)));
    world.ask(NamespaceOp::SetHostAddresses {
        addresses: vec![HOST],
    });
    // The base is ensured again by a daemon that starts: the way out stays.
    world.ensure_base();
    assert_alive(&machine.connect((SERVER, port)), true);
    world.set_nat(machine.address(), false);
    assert!(!machine.reaches((SERVER, port)));

    // Whoever is killed, nothing is left, and it can be made again.
    world.set_nat(machine.address(), true);
    for pasta_dies in [true, false] {
        let victim = holders(keeper).into_iter().find(|one| one.1 == pasta_dies);
        as_root(|| kill_process(victim.unwrap().0, Signal::KILL).unwrap());
        wait_for("the end of both", || holders(keeper).is_empty());
        assert!(!machine.reaches((SERVER, port)));
        ensure().unwrap();
        assert_alive(&machine.connect((SERVER, port)), true);
    }
    drop(machine);
    drop(world);
    wait_for("the end of both with the keeper", || {
        holders(keeper).is_empty()
    });
}

#[test]
fn without_pasta_or_without_a_network_the_cause_is_said() {
    let Some(world) = online("without_pasta_or_without_a_network_the_cause_is_said") else {
        return;
    };
    let ensure = |pasta: &str| {
        let error = pasta::ensure(&world.keeper, &world.program, Path::new(pasta)).unwrap_err();
        assert!(matches!(error, PastaError::Failed { .. }), "{error:?}");
        error.to_string()
    };
    let said = ensure("/nowhere/pasta");
    assert!(
        said.contains("cannot start `/nowhere/pasta` (is `passt` installed?)"),
        "{said}"
    );
    as_root(|| run("ip", &["route", "flush", "all"]));
    let said = ensure("pasta");
    assert!(said.contains("`pasta` ended"), "{said}");
    assert!(said.to_lowercase().contains("interface"), "{said}");
    assert_eq!(holders(world.keeper_pid()), []);
}
