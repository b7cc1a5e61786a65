//! What root's operations do to a host: the real kernel, in networks that the tests make.

mod machine;

use banger_host::host_side::Caller;
use banger_host::net::host::HostOpError;
use banger_host::op::{HostAnswer, OwnedKind};
use machine::{
    HOST, Instance, Machine, ROOT, SERVER, connect, forwards, here, inside, run, sh, wait_for,
};
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::time::Duration;

#[test]
fn attaching_and_nat_leave_the_host_as_it_was() {
    let Some(machine) = Machine::new("attaching_and_nat_leave_the_host_as_it_was") else {
        return;
    };
    sh(
        "nft add table inet other; nft add chain inet other c '{ type filter hook forward priority 5; }'",
    );
    let instance = Instance::new(1);
    let before = machine.state();
    machine.attach(&instance).unwrap();
    let attached = machine.state();
    assert_ne!(attached, before);
    machine.attach(&instance).unwrap();
    assert_eq!(machine.state(), attached, "attaching twice changes nothing");

    let report = machine.nat(&instance);
    assert_eq!(report.uplinks, ["eth0"]);
    assert_eq!(report.forward_closed_by, []);
    let open = machine.state();
    assert_eq!(machine.nat(&instance), report);
    assert_eq!(machine.state(), open, "NAT twice changes nothing");

    machine.perform(&instance.remove_nat()).unwrap();
    machine.perform(&instance.remove_nat()).unwrap();
    assert_eq!(machine.state(), attached);
    machine.nat(&instance);
    machine.perform(&instance.detach()).unwrap();
    machine.perform(&instance.detach()).unwrap();
    assert_eq!(machine.state(), before);
    let left: Vec<_> = std::fs::read_dir(&machine.folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(
        left.iter()
            .all(|name| name == "lock" || name == "forwarding.json"),
        "{left:?}"
    );
}

#[test]
fn nat_lets_a_guest_out_behind_the_hosts_address_and_nobody_in() {
    let Some(machine) = Machine::new("nat_lets_a_guest_out_behind_the_hosts_address_and_nobody_in")
    else {
        return;
    };
    let instance = Instance::new(1);
    machine.attach(&instance).unwrap();
    assert_eq!(
        instance.reach(&machine.internet, SERVER),
        None,
        "closed at first"
    );
    machine.nat(&instance);
    let seen = instance.reach(&machine.internet, SERVER).unwrap();
    assert_eq!(seen.ip(), HOST);
    // The host opens connections to its guests, and they to nothing of it.
    let host = here();
    assert!(connect(&host, &instance.namespace, instance.guest()).is_some());
    for address in [HOST, instance.pool.host()] {
        assert_eq!(instance.reach(&host, address), None, "{address}");
    }
    // A neighbour that sends to the guests' network through this host does not get there.
    inside(&machine.internet, || {
        sh(&format!(
            "ip route add {} via {HOST}",
            instance.pool.guests()
        ))
    });
    let guest = instance.guest();
    assert_eq!(connect(&machine.internet, &instance.namespace, guest), None);
    machine.perform(&instance.remove_nat()).unwrap();
    assert_eq!(instance.reach(&machine.internet, SERVER), None);
}

#[test]
fn forwarding_is_on_for_the_way_out_alone_and_other_ways_stay_closed() {
    let Some(machine) =
        Machine::new("forwarding_is_on_for_the_way_out_alone_and_other_ways_stay_closed")
    else {
        return;
    };
    // Another network of the host, which it is no router for.
    let third = machine::new_namespace();
    banger_host::net::links::Links::new()
        .create_veth("eth1", 0, "eth0", third.as_fd())
        .unwrap();
    sh("ip addr add 203.0.113.1/24 dev eth1; ip link set eth1 up");
    inside(&third, || {
        sh(
            "ip addr add 203.0.113.2/24 dev eth0; ip link set eth0 up; ip route add default via 203.0.113.1",
        )
    });
    inside(&machine.internet, || {
        sh("ip route add 203.0.113.0/24 via 198.51.100.1")
    });
    let other = std::net::Ipv4Addr::new(203, 0, 113, 2);
    assert_eq!(connect(&machine.internet, &third, other), None);

    let (one, two) = (Instance::new(1), Instance::new(2));
    machine.attach(&one).unwrap();
    machine.attach(&two).unwrap();
    machine.nat(&one);
    machine.nat(&two);
    for (device, on) in [
        ("eth0", true),
        ("eth1", false),
        ("all", false),
        ("default", false),
    ] {
        assert_eq!(forwards(device), on, "{device}");
    }
    assert!(forwards(&one.veth()) && forwards(&two.veth()));
    assert!(one.reach(&machine.internet, SERVER).is_some());
    assert!(two.reach(&machine.internet, SERVER).is_some());
    // Though packets from `eth0` could be passed on now, none are that nobody asked for.
    assert_eq!(connect(&machine.internet, &third, other), None);
    // Nor do guests reach each other, or networks that are not on the way out.
    assert_eq!(connect(&one.namespace, &two.namespace, two.guest()), None);
    assert_eq!(connect(&one.namespace, &third, other), None);

    // The first that goes leaves the device to the second.
    machine.perform(&one.detach()).unwrap();
    assert!(forwards("eth0"));
    assert!(two.reach(&machine.internet, SERVER).is_some());
    machine.perform(&two.remove_nat()).unwrap();
    assert!(!forwards("eth0") && !forwards(&two.veth()));
}

#[test]
fn a_host_that_became_a_router_meanwhile_stays_one() {
    let Some(machine) = Machine::new("a_host_that_became_a_router_meanwhile_stays_one") else {
        return;
    };
    let instance = Instance::new(1);
    machine.attach(&instance).unwrap();
    machine.nat(&instance);
    sh("echo 1 > /proc/sys/net/ipv4/ip_forward");
    machine.nat(&instance);
    let ruleset = run("nft", &["list", "ruleset"]);
    assert!(
        !ruleset.contains("elements = { \"eth0\" }\n\t}\n\n\tchain input"),
        "{ruleset}"
    );
    machine.perform(&instance.detach()).unwrap();
    assert!(forwards("eth0") && forwards("all"));

    // One that was a router before stays one, too; and closed guests stay closed on it.
    machine.attach(&instance).unwrap();
    assert!(!forwards(&instance.veth()));
    assert_eq!(instance.reach(&machine.internet, SERVER), None);
    machine.nat(&instance);
    machine.perform(&instance.remove_nat()).unwrap();
    assert!(forwards("eth0"));
}

/// In root mode nobody repairs while the daemon is down, and Docker may be started then.
#[test]
fn a_host_that_becomes_a_router_while_nobody_looks_routes_for_its_containers() {
    let Some(machine) =
        Machine::new("a_host_that_becomes_a_router_while_nobody_looks_routes_for_its_containers")
    else {
        return;
    };
    let instance = Instance::new(1);
    machine.attach(&instance).unwrap();
    machine.nat(&instance);
    let container = machine::new_namespace();
    banger_host::net::links::Links::new()
        .create_veth("docker0", 0, "eth0", container.as_fd())
        .unwrap();
    sh("echo 1 > /proc/sys/net/ipv4/ip_forward
        ip addr add 172.17.0.1/16 dev docker0; ip link set docker0 up
        nft -f - <<'END'
table ip nat {
	chain PREROUTING { type nat hook prerouting priority dstnat; iifname eth0 tcp dport 8080 dnat to 172.17.0.2:80; }
	chain POSTROUTING { type nat hook postrouting priority srcnat; ip saddr 172.17.0.0/16 oifname eth0 masquerade; }
}
END");
    inside(&container, || {
        sh(
            "ip addr add 172.17.0.2/16 dev eth0; ip link set eth0 up; ip route add default via 172.17.0.1",
        )
    });
    let seen = connect(&container, &machine.internet, SERVER).unwrap();
    assert_eq!(seen.ip(), HOST, "a container gets out");
    // Nobody sees to it that whoever is outside reaches no more than before.
    inside(&machine.internet, || {
        sh(&format!("ip route add 172.17.0.0/16 via {HOST}"))
    });
    let inner = std::net::Ipv4Addr::new(172, 17, 0, 2);
    assert_eq!(connect(&machine.internet, &container, inner), None);
    let web = inside(&container, || {
        std::net::TcpListener::bind((inner, 80)).unwrap()
    });
    let published = inside(&machine.internet, || {
        std::net::TcpStream::connect_timeout(&(HOST, 8080).into(), Duration::from_secs(2))
    });
    assert!(
        published.is_ok(),
        "a published port is reached: {published:?}"
    );
    drop(web);
    // Once somebody looks, all that a router passes on is passed on.
    machine.host.settle().unwrap();
    assert!(connect(&machine.internet, &container, inner).is_some());
    assert!(instance.reach(&machine.internet, SERVER).is_some());
}

#[test]
fn a_flushed_ruleset_and_another_default_route_are_put_right_within_a_second() {
    let Some(machine) =
        Machine::new("a_flushed_ruleset_and_another_default_route_are_put_right_within_a_second")
    else {
        return;
    };
    let instance = Instance::new(1);
    machine.attach(&instance).unwrap();
    machine.nat(&instance);
    let rules = || run("nft", &["list", "ruleset"]);
    let whole = rules();
    let keeping = machine
        .host
        .keep(|settled| {
            let settled = settled.unwrap();
            assert!(settled.failed.is_empty(), "{settled:?}");
            ControlFlow::Continue(())
        })
        .unwrap();
    let put_right = machine::repaired_within_a_second;
    put_right("the table", "nft flush ruleset", &|| rules() == whole);
    let line = "nft delete chain inet banger_1f2e3d4c5b01 to_host || nft flush chain inet banger_1f2e3d4c5b01 to_host";
    put_right("the chain", line, &|| rules() == whole);
    let line = "nft flush set inet banger_1f2e3d4c5b01 uplinks";
    put_right("the set", line, &|| rules() == whole);
    let line = "echo 0 > /proc/sys/net/ipv4/conf/eth0/forwarding";
    put_right("forwarding", line, &|| forwards("eth0"));

    sh("ip link add eth9 type bridge; ip link set eth9 up");
    let (old, new) = ("default via 198.51.100.2 dev eth0", "default dev eth9");
    let line = format!("ip route replace {old}; ip route replace {new}");
    put_right("the new device", &line, &|| {
        // The devices come before the table.
        forwards("eth9") && !forwards("eth0") && rules().contains("elements = { \"eth9\" }")
    });
    let line = format!("ip route replace {new}; ip route del default");
    put_right("no device", &line, &|| {
        !forwards("eth9") && !rules().contains("eth9")
    });
    put_right(
        "the old device",
        &format!("ip route replace {old}"),
        &|| rules() == whole && forwards("eth0"),
    );
    assert!(instance.reach(&machine.internet, SERVER).is_some());
    drop(keeping);
}

#[test]
fn an_instance_whose_namespace_has_ended_leaves_nothing() {
    let Some(machine) = Machine::new("an_instance_whose_namespace_has_ended_leaves_nothing") else {
        return;
    };
    let before = machine.state();
    let instance = Instance::new(1);
    machine.attach(&instance).unwrap();
    machine.nat(&instance);
    let (id, veth) = (instance.id, instance.veth());
    drop(instance);
    wait_for("the end of the veth", || !sh("ip -o link").contains(&veth));
    let settled = machine.host.settle().unwrap();
    assert_eq!((settled.attached, settled.ended), (0, vec![id]));
    assert_eq!(machine.state(), before);
}

#[test]
fn whoever_closes_the_forward_path_is_named_with_the_remedy_and_not_touched() {
    let Some(machine) =
        Machine::new("whoever_closes_the_forward_path_is_named_with_the_remedy_and_not_touched")
    else {
        return;
    };
    let instance = Instance::new(1);
    let veth = instance.veth();
    machine.attach(&instance).unwrap();
    sh("nft -f - <<'END'
table ip filter {
	chain DOCKER-USER { return; }
	chain FORWARD { type filter hook forward priority filter; policy drop; jump DOCKER-USER; }
}
table inet firewalld {
	chain filter_FORWARD {
		type filter hook forward priority 10; policy accept;
		ct state established,related accept
		reject with icmpx admin-prohibited
	}
}
table inet open {
	chain forward { type filter hook forward priority 20; policy accept; tcp dport 99 drop; }
	chain input { type filter hook input priority 20; policy drop; accept; }
}
END");
    let theirs = || {
        ["ip filter", "inet firewalld", "inet open"]
            .map(|table| sh(&format!("nft list table {table}")))
    };
    let before = theirs();
    let report = machine.nat(&instance);
    let chains: Vec<&str> = report
        .forward_closed_by
        .iter()
        .map(|closed| closed.chain.as_str())
        .collect();
    assert_eq!(
        chains,
        [
            "chain FORWARD of table ip filter (Docker)",
            "chain filter_FORWARD of table inet firewalld (firewalld)"
        ]
    );
    assert!(
        report.forward_closed_by[0]
            .remedy
            .starts_with(&format!("iptables -I DOCKER-USER -i {veth} -j ACCEPT && "))
    );
    assert_eq!(theirs(), before);
    assert_eq!(instance.reach(&machine.internet, SERVER), None);
    // Once their owner lets the guests through, they are told of no more.
    sh(&format!(
        "nft insert rule ip filter DOCKER-USER iifname {veth} accept
         nft insert rule ip filter DOCKER-USER oifname {veth} ct state established,related accept
         nft insert rule inet firewalld filter_FORWARD iifname {veth} accept"
    ));
    assert_eq!(machine.nat(&instance).forward_closed_by, []);
    assert!(instance.reach(&machine.internet, SERVER).is_some());
}

#[test]
fn what_has_our_name_but_not_our_tag_is_named_and_left_alone() {
    let Some(machine) = Machine::new("what_has_our_name_but_not_our_tag_is_named_and_left_alone")
    else {
        return;
    };
    let instance = Instance::new(1);
    let veth = instance.veth();
    let refused = |what: &str, result: Result<HostAnswer, HostOpError>| match result {
        Err(HostOpError::Foreign { name, .. }) => assert_eq!(name, what),
        other => panic!("{what}: {other:?}"),
    };
    for words in [
        "",
        "banger uid=1000 instance=0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b01",
        "banger uid=0 instance=0198c2a4-7d1e-7b3a-9c4d-000000000001",
    ] {
        sh(&format!(
            "ip link add {veth} type veth peer name theirs; ip link set {veth} alias '{words}'"
        ));
        let before = machine.state();
        refused(&veth, machine.attach(&instance));
        refused(&veth, machine.perform(&instance.detach()));
        refused(&veth, machine.perform(&instance.ensure_nat()));
        assert_eq!(machine.state(), before);
        sh(&format!("ip link del {veth}"));
    }
    let table = "banger_1f2e3d4c5b01";
    for comment in [
        "",
        "comment \\\"banger uid=1000 instance=0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b01\\\";",
    ] {
        sh(&format!(
            "nft \"add table inet {table} {{ {comment} }}\"; nft add chain inet {table} theirs"
        ));
        let before = machine.state();
        refused(table, machine.attach(&instance));
        refused(table, machine.perform(&instance.detach()));
        assert_eq!(machine.state(), before);
        sh(&format!("nft delete table inet {table}"));
    }
    machine.attach(&instance).unwrap();
}

#[test]
fn another_users_instance_is_out_of_reach_and_one_user_has_a_limit() {
    let Some(machine) =
        Machine::new("another_users_instance_is_out_of_reach_and_one_user_has_a_limit")
    else {
        return;
    };
    let instance = Instance::new(1);
    machine.attach(&instance).unwrap();
    machine.nat(&instance);
    let before = machine.state();
    let stranger = Caller { uid: 1000 };
    for op in [
        instance.detach(),
        instance.ensure_nat(),
        instance.remove_nat(),
    ] {
        let refused = machine.host.perform(stranger, &op, &[]);
        assert!(
            matches!(refused, Err(HostOpError::Foreign { .. })),
            "{refused:?}"
        );
    }
    // Nor may one's objects go into a namespace of another's.
    let namespace = [instance.namespace.as_fd()];
    let refused = machine
        .host
        .perform(stranger, &instance.attach(), &namespace);
    assert!(
        matches!(refused, Err(HostOpError::ForeignNamespace { .. })),
        "{refused:?}"
    );
    let owned =
        |caller| match machine
            .host
            .perform(caller, &banger_host::op::HostOp::ListOwned {}, &[])
        {
            Ok((HostAnswer::Owned { objects }, _)) => objects,
            other => panic!("{other:?}"),
        };
    assert_eq!(owned(stranger), []);
    let kinds: Vec<_> = owned(ROOT)
        .into_iter()
        .map(|object| (object.kind, object.name))
        .collect();
    assert_eq!(
        kinds,
        [
            (OwnedKind::Veth, instance.veth()),
            (OwnedKind::NftTable, "banger_1f2e3d4c5b01".to_owned()),
            (OwnedKind::Forwarding, "eth0".to_owned()),
        ]
    );
    assert_eq!(machine.state(), before);
}

#[test]
fn a_pool_that_another_has_or_that_the_host_uses_is_refused_and_changes_nothing() {
    let Some(machine) = Machine::new(
        "a_pool_that_another_has_or_that_the_host_uses_is_refused_and_changes_nothing",
    ) else {
        return;
    };
    let one = Instance::new(1);
    let mut two = Instance::new(2);
    machine.attach(&one).unwrap();
    let before = machine.state();
    two.pool = one.pool;
    assert!(matches!(
        machine.attach(&two),
        Err(HostOpError::RouteInTheWay { .. })
    ));
    two.pool = banger_core::addr::Pool::at([198, 51, 100, 0].into());
    assert!(matches!(machine.attach(&two), Err(HostOpError::BadPool(_))));
    let mut moved = Instance::new(1);
    moved.pool = Instance::new(3).pool;
    assert!(matches!(
        machine.attach(&moved),
        Err(HostOpError::OtherPool { .. })
    ));
    assert!(matches!(
        machine.perform(&moved.ensure_nat()),
        Err(HostOpError::OtherPool { .. })
    ));
    assert!(matches!(
        machine.perform(&two.ensure_nat()),
        Err(HostOpError::NotAttached(_))
    ));
    assert_eq!(machine.state(), before);
}

#[test]
fn the_routes_of_a_vpn_are_seen_in_whatever_table_and_shape() {
    let Some(machine) = Machine::new("the_routes_of_a_vpn_are_seen_in_whatever_table_and_shape")
    else {
        return;
    };
    let instance = Instance::new(1);
    sh("ip route add 172.31.16.0/24 dev lo table 52");
    let refused = machine.attach(&instance);
    assert!(
        matches!(&refused, Err(HostOpError::RouteInTheWay { route, .. }) if route == "route 172.31.16.0/24 dev lo"),
        "{refused:?}"
    );
    sh("ip route flush table 52");
    // One that leads everything elsewhere by its own table, and one that does so by two halves.
    sh(
        "ip link add tun0 type bridge; ip link set tun0 up; ip route add default dev tun0 table 51820",
    );
    sh("ip link add tun1 type bridge; ip link set tun1 up
        ip route add 0.0.0.0/1 dev tun1; ip route add 128.0.0.0/1 dev tun1");
    machine.attach(&instance).unwrap();
    assert_eq!(machine.nat(&instance).uplinks, ["eth0", "tun0", "tun1"]);
    // Several ways at once.
    sh("ip route del default; ip route add default nexthop dev eth0 via 198.51.100.2 nexthop dev tun0
        ip route del 0.0.0.0/1; ip route del 128.0.0.0/1; ip route flush table 51820");
    assert_eq!(machine.nat(&instance).uplinks, ["eth0", "tun0"]);
    assert!(!forwards("tun1"));
}

#[test]
fn a_pool_in_which_the_host_reaches_somebody_by_its_default_route_is_refused() {
    let Some(machine) =
        Machine::new("a_pool_in_which_the_host_reaches_somebody_by_its_default_route_is_refused")
    else {
        return;
    };
    let instance = Instance::new(1);
    for (does, undoes, what) in [
        (
            "ip route add default via 172.31.16.9 dev eth0 onlink metric 9",
            "ip route del default via 172.31.16.9",
            "gateway 172.31.16.9 ",
        ),
        (
            "ip neigh add 172.31.17.9 lladdr 02:00:00:00:00:09 dev eth0",
            "ip neigh del 172.31.17.9 dev eth0",
            "neighbour 172.31.17.9 ",
        ),
    ] {
        sh(does);
        let before = machine.state();
        let refused = machine.attach(&instance).unwrap_err().to_string();
        assert!(refused.contains(what), "{refused}");
        assert_eq!(machine.state(), before);
        // Nor would a new instance choose it.
        let known = banger_host::net::host::host_routes().unwrap();
        let pool = instance.pool.network();
        assert!(
            known
                .iter()
                .any(|net| net.prefix() > 0 && net.overlaps(&pool))
        );
        sh(undoes);
    }
    machine.attach(&instance).unwrap();
    machine.perform(&instance.detach()).unwrap();
}

#[test]
fn a_default_route_with_an_odd_name_is_told_to_who_asks_for_nat_and_stops_nobody_else() {
    let Some(machine) = Machine::new(
        "a_default_route_with_an_odd_name_is_told_to_who_asks_for_nat_and_stops_nobody_else",
    ) else {
        return;
    };
    let [one, two] = [1, 2].map(Instance::new);
    machine.attach(&one).unwrap();
    machine.nat(&one);
    sh(
        "ip link add 'vpn#1' type bridge; ip link set 'vpn#1' up; ip route add default dev 'vpn#1' metric 9",
    );
    let settled = machine.host.settle().unwrap();
    assert!(settled.failed.is_empty(), "{:?}", settled.failed);
    machine.attach(&two).unwrap();
    let refused = machine.perform(&two.ensure_nat());
    assert!(matches!(&refused, Err(HostOpError::OddName(name)) if name == "vpn#1"));
    machine.perform(&two.detach()).unwrap();
    sh("ip link del 'vpn#1'");
    assert_eq!(machine.nat(&one).uplinks, ["eth0"]);
}

#[test]
fn two_keepers_of_different_versions_leave_each_others_rules() {
    let Some(machine) = Machine::new("two_keepers_of_different_versions_leave_each_others_rules")
    else {
        return;
    };
    let [one, two] = [1, 2].map(Instance::new);
    machine.attach(&one).unwrap();
    let record = machine.folder.join(format!("{}.json", one.id));
    let ours = std::fs::read_to_string(&record).unwrap();
    let (first, rest) = ours.split_once("\"made_from\":").unwrap();
    let (_, last) = rest.split_once('}').unwrap();
    let theirs = format!("{first}\"made_from\":7}}{last}");
    std::fs::write(&record, &theirs).unwrap();
    // What is done for another instance leaves it, and what is done for this one does not.
    machine.attach(&two).unwrap();
    assert_eq!(std::fs::read_to_string(&record).unwrap(), theirs);
    machine.attach(&one).unwrap();
    assert_eq!(std::fs::read_to_string(&record).unwrap(), ours);
    // A keeper does so once, when it comes up.
    std::fs::write(&record, &theirs).unwrap();
    let (told, settled) = std::sync::mpsc::channel();
    let keeping = machine.host.keep(move |settled| {
        let _ = told.send(settled.unwrap().repaired);
        ControlFlow::Continue(())
    });
    let _keeping = keeping.unwrap();
    let limit = Duration::from_secs(20);
    assert_eq!(settled.recv_timeout(limit).unwrap(), [one.id]);
    let seen = || std::fs::read_to_string(&record).unwrap();
    wait_for("our own rules", || seen() == ours);
    while settled.recv_timeout(Duration::from_millis(500)).is_ok() {}
    std::fs::write(&record, &theirs).unwrap();
    sh("ip link add other0 type bridge");
    assert_eq!(settled.recv_timeout(limit).unwrap(), []);
    assert_eq!(seen(), theirs);
}

#[test]
fn an_instance_keeps_its_pool_when_a_vpn_routes_it_elsewhere_later() {
    let Some(machine) =
        Machine::new("an_instance_keeps_its_pool_when_a_vpn_routes_it_elsewhere_later")
    else {
        return;
    };
    let instance = Instance::new(1);
    machine.attach(&instance).unwrap();
    machine.nat(&instance);
    sh("ip route add 172.16.0.0/12 via 198.51.100.2 dev eth0");
    let before = machine.state();
    // As a daemon does that finds its VMs again.
    machine.attach(&instance).unwrap();
    machine.nat(&instance);
    assert_eq!(machine.state(), before);
    assert!(instance.reach(&machine.internet, SERVER).is_some());
    machine.perform(&instance.detach()).unwrap();
    let refused = machine.attach(&instance);
    assert!(matches!(&refused, Err(HostOpError::RouteInTheWay { .. })));
}

#[test]
fn what_a_killed_operation_left_is_finished_or_removed_by_the_next() {
    let Some(machine) =
        Machine::new("what_a_killed_operation_left_is_finished_or_removed_by_the_next")
    else {
        return;
    };
    let instance = Instance::new(1);
    let before = machine.state();
    let veth = instance.veth();
    machine.attach(&instance).unwrap();
    machine.nat(&instance);
    let whole = machine.state();
    let record = machine.folder.join(format!("{}.json", instance.id));
    let recorded = std::fs::read(&record).unwrap();

    // Recorded, and killed before anything was made.
    machine.perform(&instance.detach()).unwrap();
    std::fs::write(&record, &recorded).unwrap();
    assert_eq!(machine.host.settle().unwrap().ended, [instance.id]);
    assert_eq!(machine.state(), before);

    // Killed between making the veth, in the group of unfinished ones, and giving it its tag.
    std::fs::write(&record, &recorded).unwrap();
    sh(&format!(
        "ip link add {veth} group 1651402610 type veth peer name p"
    ));
    machine.attach(&instance).unwrap();
    machine.nat(&instance);
    let names = |state: &str| -> String {
        // A link made anew has another number.
        state
            .split_whitespace()
            .filter(|word| !word.contains(|c: char| c.is_ascii_digit()))
            .collect()
    };
    assert_eq!(names(&machine.state()), names(&whole));

    // Killed between removing the veth and the rest.
    sh(&format!("ip link del {veth}"));
    machine.perform(&instance.detach()).unwrap();
    assert_eq!(machine.state(), before);

    // Made by another version, with other rules.
    machine.attach(&instance).unwrap();
    let rules = run("nft", &["list", "ruleset"]);
    let text = std::fs::read_to_string(&record).unwrap();
    let (first, _) = text.split_once(",\"made_from\":").unwrap();
    std::fs::write(&record, format!("{first}}},\"dns\":null}}")).unwrap();
    assert_eq!(machine.host.settle().unwrap().repaired, [instance.id]);
    assert_eq!(run("nft", &["list", "ruleset"]), rules);
    machine.perform(&instance.detach()).unwrap();

    // Killed between removing the table and forgetting it; and all of the facts lost.
    machine.attach(&instance).unwrap();
    sh("nft delete table inet banger_1f2e3d4c5b01");
    machine.perform(&instance.detach()).unwrap();
    assert_eq!(machine.state(), before);
    machine.attach(&instance).unwrap();
    std::fs::remove_dir_all(&machine.folder).unwrap();
    machine.attach(&instance).unwrap();
    std::fs::remove_dir_all(&machine.folder).unwrap();
    machine.perform(&instance.detach()).unwrap();
    assert_eq!(machine.state(), before);
}
