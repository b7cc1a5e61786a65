//! The keeper against the real kernel: root, in namespaces that the tests make.

mod world;

use banger_host::net::keeper::{Keeper, KeeperError, probe_namespaces};
use banger_host::op::{NamespaceAnswer, NamespaceOp, PortState};
use rustix::fs::FlockOperation;
use world::{World, guest, run, wait_for};

#[test]
fn the_keeper_ends_with_the_last_that_holds_it() {
    let Some(world) = World::new("the_keeper_ends_with_the_last_that_holds_it") else {
        return;
    };
    let pid = world.keeper_pid();
    let second = world.keepalive();
    drop(world.hold);
    assert!(world.keeper.request(NamespaceOp::Hello).is_ok());
    drop(second);
    wait_for("the keeper's end", || {
        rustix::process::test_kill_process(pid).is_err() && !world.socket.exists()
    });
    assert!(matches!(
        world.keeper.request(NamespaceOp::Hello),
        Err(KeeperError::Unreachable { .. })
    ));
}

#[test]
fn a_holder_that_is_killed_leaves_the_keeper_to_the_others() {
    let Some(world) = World::new("a_holder_that_is_killed_leaves_the_keeper_to_the_others") else {
        return;
    };
    // A process that inherited the descriptor, as a shim does.
    let lock = std::fs::File::create(world.directory.path().join("lock")).unwrap();
    rustix::fs::flock(&lock, FlockOperation::LockExclusive).unwrap();
    rustix::io::fcntl_setfd(&world.hold, rustix::io::FdFlags::empty()).unwrap();
    let mut holder = world::start("sleep", &["600"]);
    drop(world.hold);
    assert!(world.keeper.request(NamespaceOp::Hello).is_ok());
    holder.kill().unwrap();
    holder.wait().unwrap();
    wait_for("the keeper's end", || !world.socket.exists());
}

#[test]
fn a_second_keeper_does_not_take_the_place_of_a_living_one() {
    let Some(world) = World::new("a_second_keeper_does_not_take_the_place_of_a_living_one") else {
        return;
    };
    let error = Keeper::spawn(world::PROGRAM.as_ref(), &world.socket, false).unwrap_err();
    assert!(
        error.to_string().contains("another keeper serves"),
        "{error}"
    );
    assert!(world.keeper.request(NamespaceOp::Hello).is_ok());
}

#[test]
fn ensuring_the_base_twice_changes_nothing_and_repairs_what_was_flushed() {
    let Some(world) =
        World::new("ensuring_the_base_twice_changes_nothing_and_repairs_what_was_flushed")
    else {
        return;
    };
    world.ensure_port(&guest(1));
    let links = || match world.keeper.request(NamespaceOp::ListLinks) {
        Ok((NamespaceAnswer::Links { links }, _)) => links,
        other => panic!("{other:?}"),
    };
    assert_eq!(links(), ["br0"]);
    world.inside(|| run("ip", &["link", "set", "br0", "down"]));
    assert_eq!(links(), Vec::<String>::new());
    world.ensure_base();
    assert_eq!(links(), ["br0"]);
    // Without what the kernel's own timers change.
    let state = || {
        let handles = run("nft", &["-a", "list", "ruleset"]);
        handles + &world::link_names() + &run("ip", &["-o", "address"])
    };
    let before = world.inside(state);
    world.ensure_base();
    assert_eq!(world.inside(state), before);
    let rules = || run("nft", &["-s", "list", "ruleset"]);
    let whole = world.inside(rules);
    for damage in [
        &["flush", "chain", "bridge", "banger", "from_guest"][..],
        &["delete", "table", "inet", "banger"],
        &["flush", "ruleset"],
        &["flush", "set", "bridge", "banger", "ports"],
        &["flush", "set", "inet", "banger", "closed"],
    ] {
        world.inside(|| run("nft", damage));
        world.ensure_base();
        assert_eq!(world.inside(rules), whole, "{damage:?}");
    }
}

#[test]
fn a_removed_port_leaves_nothing() {
    let Some(world) = World::new("a_removed_port_leaves_nothing") else {
        return;
    };
    let state = || {
        run("nft", &["-s", "list", "ruleset"])
            + &world::link_names()
            + &run("ip", &["neighbour"])
            + &run("bridge", &["fdb"])
    };
    let before = world.inside(state);
    world.ensure_port(&guest(1));
    world.ensure_port(&guest(1));
    assert_eq!(
        world.ports(),
        [PortState {
            tap: guest(1).tap,
            link: true,
            allowed: Some((guest(1).mac, guest(1).address))
        }]
    );
    let remove = || {
        let tap = guest(1).tap;
        world
            .keeper
            .request(NamespaceOp::RemovePort { tap })
            .unwrap();
    };
    remove();
    assert_eq!(world.inside(state), before);
    remove();
    assert_eq!(world.ports(), []);
}

#[test]
fn a_port_without_a_base_or_with_a_foreign_name_or_address_is_refused() {
    let Some(world) =
        World::without_base("a_port_without_a_base_or_with_a_foreign_name_or_address_is_refused")
    else {
        return;
    };
    let refusal = |port| match world.keeper.request(NamespaceOp::EnsurePort(port)) {
        Err(error @ KeeperError::Refused { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    };
    assert!(refusal(guest(1)).contains("no bridge and no rules"));
    world.ensure_base();
    let mut port = guest(1);
    port.address = world::POOL.gateway();
    assert!(refusal(port).contains("is not a guest's address of"));
    let mut port = guest(1);
    port.tap = "eth0".to_owned();
    assert!(refusal(port).contains("`eth0` is not the name of a VM's TAP"));
    assert_eq!(world.ports(), []);
}

#[test]
fn an_ordinary_user_gets_bridge_rules_and_ports_in_a_user_namespace() {
    let Some(world) =
        World::rootless("an_ordinary_user_gets_bridge_rules_and_ports_in_a_user_namespace")
    else {
        return;
    };
    let (answer, _) = world.keeper.request(NamespaceOp::Hello).unwrap();
    assert!(matches!(
        answer,
        NamespaceAnswer::Hello {
            user_namespace: true,
            ..
        }
    ));
    world.ensure_base();
    world.ensure_port(&guest(1));
    assert_eq!(world.ports().len(), 1);
    let (_, namespaces) = world.keeper.request(NamespaceOp::Namespaces).unwrap();
    assert_eq!(namespaces.len(), 2);
    let error = world
        .keeper
        .request(NamespaceOp::Connect {
            address: guest(1).address,
            port: 22,
            timeout_ms: 100,
        })
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("cannot connect to 172.31.240.2:22 within 0.1 s"),
        "{error}"
    );
}

#[test]
fn whether_namespaces_may_be_made_is_found_out_by_making_some() {
    let test = "whether_namespaces_may_be_made_is_found_out_by_making_some";
    let probe = || probe_namespaces(world::PROGRAM.as_ref());
    if let Err(error) = probe() {
        eprintln!("SKIPPED: {test}: {}", banger_host::error_chain(&error));
        return;
    }
    // In a namespace of the own whose limit is for those below it alone.
    let folder = tempfile::tempdir().unwrap();
    let limited = folder.path().join("limited");
    let script = format!(
        "#!/bin/sh\nexec unshare --user --map-root-user sh -c 'echo 0 >/proc/sys/user/max_user_namespaces; \
         exec {} \"$0\"' \"$1\"\n",
        world::PROGRAM
    );
    std::fs::write(&limited, script).unwrap();
    std::fs::set_permissions(
        &limited,
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let refused = probe_namespaces(&limited).unwrap_err().to_string();
    assert!(
        refused.contains("user.max_user_namespaces is 0; as root run `sysctl -w"),
        "{refused}"
    );
}
