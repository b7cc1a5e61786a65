//! One VM lives beside the real Docker, ufw and firewalld, and beside rules that somebody wrote by hand: what they
//! close is named with what opens it, which holds over their restarts, and nothing of theirs is touched.

use crate::host::{eventually, root, try_root};
use crate::inside::{Seconds, World};
use rustix::fd::AsFd;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::io::Write;
use std::net::TcpListener;
use std::time::Instant;

const VM: &str = "calm";
/// A server of the internet, which tells who asks.
const SERVER: &str = "8.8.4.4";
/// A server of a private network behind the same router.
const PRIVATE: &str = "192.168.77.1";
/// The host's address on it.
const HOST: &str = "198.51.100.1";

/// The machine's way to an internet that is a network namespace.
fn go_online() {
    root(
        "ip netns add internet
         ip link add wan0 type veth peer name net0 netns internet
         ip addr add 198.51.100.1/24 dev wan0 && ip link set wan0 up
         ip -n internet link set lo up && ip -n internet link set net0 up
         ip -n internet addr add 198.51.100.2/24 dev net0 && ip -n internet addr add 8.8.4.4/32 dev lo
         ip -n internet addr add 192.168.77.1/32 dev lo
         ip route add default via 198.51.100.2",
    );
    let namespace = std::fs::File::open("/run/netns/internet").unwrap();
    std::thread::spawn(move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        let listener = TcpListener::bind("0.0.0.0:80").unwrap();
        while let Ok((mut stream, from)) = listener.accept() {
            // Whoever went away meanwhile hears nothing.
            let _ = writeln!(stream, "you are {}", from.ip());
        }
    });
}

/// All rules but banger's own, without what counts by itself.
fn their_rules() -> String {
    let rules = root("nft --stateless list ruleset 2>/dev/null; iptables-save; ip6tables-save");
    let mut ours = false;
    let theirs = rules.lines().filter(|line| {
        ours |= line.starts_with("table inet banger_");
        let keep = !ours;
        ours &= *line != "}";
        keep && !line.starts_with('#')
    });
    // `:FORWARD DROP [12:720]` counts.
    let theirs = theirs.map(|line| match line.strip_prefix(':') {
        Some(chain) => chain.split(" [").next().unwrap(),
        None => line,
    });
    theirs.collect::<Vec<_>>().join("\n")
}

/// Which devices of the host pass packets on.
fn forwarding() -> String {
    root("cd /proc/sys/net/ipv4/conf && grep . all/forwarding default/forwarding wan0/forwarding")
}

fn docker(line: &str) -> String {
    root(&format!("docker {line}"))
}

/// A container reaches the internet, and the other one, and is reached at its published port.
fn containers_work() {
    let seen = docker(&format!("exec one nc -w 10 {SERVER} 80 < /dev/null"));
    assert_eq!(seen, format!("you are {HOST}\n"));
    let address = docker("inspect -f {{.NetworkSettings.IPAddress}} two");
    docker(&format!(
        "exec one wget -q -O /dev/null http://{}/sh",
        address.trim()
    ));
    root(&format!(
        "ip netns exec internet curl --silent --max-time 20 --output /dev/null http://{HOST}:8080/sh"
    ));
}

/// A VM and its machine.
struct Beside {
    world: World,
    started: Instant,
}

impl Beside {
    fn say(&self, what: &str) {
        println!(
            "NEIGHBOURS: {what}: after {}",
            Seconds(self.started.elapsed())
        );
    }

    /// What the guest hears from the server, if it gets there.
    fn heard(&self) -> String {
        let line = format!("nc -w 3 {SERVER} 80 < /dev/null 2>&1 || true");
        self.world.ssh(VM, &line)
    }

    /// The guest gets there; what was just opened or loaded again may take a moment.
    #[track_caller]
    fn reaches(&self) {
        let mut heard = String::new();
        for _ in 0..5 {
            heard = self.heard();
            if heard == format!("you are {HOST}\n") {
                return;
            }
        }
        panic!(
            "{heard}\n{}\n{}",
            self.world.told(&["nat", "status"]),
            their_rules()
        );
    }

    #[track_caller]
    fn is_cut_off(&self) {
        let heard = self.heard();
        assert!(!heard.contains("you are"), "{heard}");
    }

    /// What does not depend on the way out.
    fn names_and_ports_work(&self) {
        let address = self.world.vm(VM)["address"].as_str().unwrap().to_owned();
        let found = self.world.ssh(VM, &format!("nslookup {VM}.vm"));
        assert!(found.contains(&address), "{found}");
        let found = root(&format!("resolvectl query {VM}.vm"));
        assert!(found.contains(&address), "{found}");
        let banner = root(
            "timeout 10 sh -c 'exec 3<>/dev/tcp/127.0.0.1/2222; head -n 1 <&3' 2>&1 || \
                           busybox nc -w 5 127.0.0.1 2222 < /dev/null | head -n 1",
        );
        assert!(banner.contains("SSH-2.0"), "{banner}");
    }

    /// The commands that banger prints for what closes the way out, after it named `owners`.
    #[track_caller]
    fn remedies(&self, owners: &[&str]) -> Vec<String> {
        let told = self.world.told(&["nat", "status"]);
        for owner in owners {
            assert!(told.contains(&format!("({owner})")), "{told}");
        }
        let remedies: Vec<String> = told
            .lines()
            .filter_map(|line| line.split_once("as root: "))
            .map(|(_, command)| command.to_owned())
            .collect();
        assert_eq!(remedies.len(), owners.len(), "{told}");
        remedies
    }

    #[track_caller]
    fn is_told_nothing(&self) {
        let told = self.world.told(&["nat", "status"]);
        assert!(told.contains("by wan0\n"), "{told}");
        assert!(!told.contains("as root:"), "{told}");
    }

    /// Somebody closes the way out: it is told, by every verb that says something of it; what is printed opens it, and
    /// nothing of theirs is touched.
    fn is_opened_as_told(&self, owner: &str) {
        self.is_cut_off();
        let before = their_rules();
        let warned = self.world.told(&["nat", "up", VM]);
        let remedies = self.remedies(&[owner]);
        assert!(warned.contains(&remedies[0]), "{warned}");
        let doctor = self.world.told_anyway(&["doctor"]);
        assert!(doctor.contains(&remedies[0]), "{doctor}");
        self.names_and_ports_work();
        assert_eq!(their_rules(), before, "banger changes nothing of {owner}'s");
        println!("NEIGHBOURS: {owner}: {}", remedies[0]);
        root(&remedies[0]);
        self.reaches();
        self.is_told_nothing();
        self.say(owner);
    }

    fn reaches_private_networks_when_asked(&self) {
        let heard = || {
            let line = format!("nc -w 3 {PRIVATE} 80 < /dev/null 2>&1 || true");
            self.world.ssh(VM, &line)
        };
        assert!(!heard().contains("you are"));
        self.world.banger(&["nat", "up", VM, "--private"]);
        let there = format!("you are {HOST}\n");
        assert!((0..5).any(|_| heard() == there), "{}", heard());
        self.world
            .banger(&["vm", "set", VM, "--nat-private", "off"]);
        self.reaches();
    }

    fn goes_down_and_up(&self) {
        let opened = their_rules();
        self.world.banger(&["nat", "down", VM]);
        self.is_cut_off();
        self.world.banger(&["nat", "up", VM]);
        self.reaches();
        assert_eq!(their_rules(), opened);
    }

    /// What was opened stays open.
    #[track_caller]
    fn still_reaches_after(&self, line: &str) {
        root(line);
        self.reaches();
        self.is_told_nothing();
        self.say(line);
    }
}

/// Takes every rule that is not banger's.
fn forget_their_rules() {
    root(
        "nft list tables | grep -v banger_ | while read -r table family name; do \
             nft delete table $family $name; done",
    );
}

#[test]
#[ignore = "runs inside the test host"]
fn a_vm_lives_beside_docker_ufw_firewalld_and_a_closed_ruleset() {
    let started = Instant::now();
    go_online();
    root(
        "systemctl start docker
         mkdir -p /tmp/box/bin && cp /bin/busybox /tmp/box/bin && cd /tmp/box/bin
         for name in sh nc wget httpd sleep; do ln -s busybox $name; done
         tar -C /tmp/box -c . | docker import - box
         docker run --security-opt apparmor=unconfined --detach --name one box /bin/sleep 100000
         docker run --security-opt apparmor=unconfined --detach --name two --publish 8080:80 box /bin/httpd -f -p 80 -h /bin",
    );
    containers_work();
    let before = (their_rules(), forwarding());

    let world = World::new();
    let beside = Beside { world, started };
    beside.say("containers reach the internet");
    let created = beside.world.told(&[
        "vm",
        "create",
        "--name",
        VM,
        "--image",
        "tiny",
        "--memory",
        "256",
        "--vcpu",
        "1",
        "--nat",
        "-p",
        "127.0.0.1:2222:22",
        "--wait",
    ]);
    assert!(created.contains("(Docker)"), "{created}");
    beside.say("the VM is ready");
    containers_work();
    assert_eq!(their_rules(), before.0);
    beside.is_opened_as_told("Docker");
    beside.goes_down_and_up();
    beside.reaches_private_networks_when_asked();
    containers_work();
    // It is started anew on a host that is a router for the VM's sake alone.
    root("docker stop --time 1 one two && echo 0 > /proc/sys/net/ipv4/ip_forward");
    eventually("the way out is lent again", || {
        root("cat /proc/sys/net/ipv4/conf/wan0/forwarding")
            .starts_with('1')
            .then_some(())
    });
    beside.still_reaches_after("systemctl restart docker");
    docker("start one two");
    containers_work();
    assert_eq!(forwarding(), before.1);
    root("docker rm --force one two && systemctl stop docker.socket docker containerd");
    forget_their_rules();
    beside.reaches();

    root("ufw --force enable");
    beside.is_opened_as_told("ufw");
    beside.still_reaches_after("ufw reload");
    root("ufw disable");
    forget_their_rules();

    // It answers once its rules are there.
    root("systemctl start firewalld && firewall-cmd --state");
    beside.is_opened_as_told("firewalld");
    beside.still_reaches_after("firewall-cmd --reload");
    beside.still_reaches_after("systemctl restart firewalld && firewall-cmd --state");
    root("systemctl stop firewalld");
    forget_their_rules();

    // Neither ends by a policy: one is of iptables, whose rules are modules.
    root("iptables -A FORWARD -j REJECT --reject-with icmp-host-prohibited");
    beside.is_opened_as_told("iptables");
    forget_their_rules();
    root(
        "nft -f - << END
table inet mine {
    chain in { type filter hook input priority filter; policy drop; ct state established,related accept; iif lo accept; }
    chain through { type filter hook forward priority filter; policy drop; tcp dport 99 accept; }
}
END",
    );
    beside.is_opened_as_told("nftables");
    forget_their_rules();
    beside.say("all neighbours");

    beside
        .world
        .banger(&["vm", "delete", VM, "--force", "--purge"]);
    beside.world.banger(&["daemon", "stop"]);
    eventually("nothing is left of banger", || {
        try_root("! ip link | grep bv && ! nft list ruleset | grep banger").ok()
    });
    assert_eq!(forwarding(), before.1);
}
