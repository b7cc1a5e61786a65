//! Whether forwarding slows down with the VMs in the sets: small packets, one way, from a guest through the ruleset as
//! it is shipped, once among many and once alone.
//!
//! The guest is a namespace at the end of a veth whose other end is a port of the bridge, named as a TAP is. The
//! kernel does all of it within the sender's system call, so what is counted is the sender's time.

use super::bare::Namespace;
use super::cpu;
use super::machine::{on_a_machine, shell};
use super::nat::load;
use super::stats::{Target, summarise};
use super::table::Row;
use crate::command::{capture, command};
use crate::failure::{Failure, Result};
use std::fmt::Write as _;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::time::Instant;

/// VMs in the sets where many are.
const MANY: u8 = 250;
/// There are so many for each of two networks of 256.
const NETWORKS: u8 = 2;
/// Of one measurement.
const PACKETS: u32 = 20_000;
const PAIRS: usize = 30;
/// At least 0.95 of the packets in the same time.
const TARGET: Target = Target {
    at_most: 1.0 / 0.95,
    margin: 0.10,
    at_most_more: None,
};
const INTERNET: Ipv4Addr = Ipv4Addr::new(8, 8, 4, 4);

const DEFINES: &str = "define host_address = 100.126.15.254
define gateway = 100.126.0.1
define guests = 100.126.0.0/21
define pool = 100.126.0.0/20
";
/// The ruleset as it is shipped, which the keeper loads behind its own definitions.
const RULES: &str = include_str!("../../../crates/banger-host/src/net/base.nft");
/// As the keeper sets it up: `net/namespace.rs` and `net/routing.rs`.
const ROUTER: &str = "echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore
ip link set lo up
ip link add br0 address 02:62:61:6e:67:72 type bridge mcast_snooping 0
ip addr add 100.126.0.1/21 dev br0
ip link set br0 up
echo 1 >/proc/sys/net/ipv4/conf/br0/proxy_arp_pvlan
ip rule add priority 100 table local
ip rule add priority 10 iif br0 fwmark 3 table local
ip rule add priority 11 iif br0 fwmark 3 table main
ip rule add priority 12 iif br0 fwmark 2 table local
ip rule add priority 19 iif br0 blackhole
ip rule add priority 20 iif up0 table local
ip rule add priority 21 iif up0 fwmark 3 table main
ip rule add priority 29 iif up0 blackhole
ip rule del priority 0";

pub(super) fn run(dist: &Path) -> Result<Vec<Row>> {
    on_a_machine(dist, |_machine| {
        let one = Way::new(false)?;
        let many = Way::new(true)?;
        let (mut walls, mut cpus) = (Vec::new(), Vec::new());
        for number in 0..=PAIRS {
            // Whoever goes second finds a warmer machine, so the sides take turns.
            let (ours, theirs) = if number % 2 == 0 {
                let ours = many.send()?;
                (ours, one.send()?)
            } else {
                let theirs = one.send()?;
                (many.send()?, theirs)
            };
            walls.push((ours.0, theirs.0));
            cpus.push((ours.1, theirs.1));
        }
        let sum = |pairs: &[(f64, f64)]| {
            summarise(&pairs[1..]).ok_or_else(|| Failure::new("packets took no time at all"))
        };
        let (wall, cpu) = (sum(&walls)?, sum(&cpus)?);
        let rate = |seconds: f64| f64::from(PACKETS) / seconds;
        eprintln!(
            "packets per second: {:.0} with many VMs, {:.0} with one",
            rate(wall.ours.median),
            rate(wall.theirs.median)
        );
        let vms = u32::from(MANY) * u32::from(NETWORKS);
        let name = format!("time of {PACKETS} packets: {vms} VMs / 1 VM");
        Ok(vec![
            Row::pairs(&name, &wall, TARGET, PAIRS),
            Row::pairs("  the same in CPU time", &cpu, TARGET, PAIRS),
        ])
    })
}

/// From a guest to the internet, whose kernel drops and counts what comes.
struct Way {
    internet: Namespace,
    guest: Namespace,
    _router: Namespace,
    socket: UdpSocket,
}

impl Way {
    fn new(many: bool) -> Result<Self> {
        let router = Namespace::new(ROUTER)?;
        let guest = Namespace::new("ip link set lo up")?;
        let internet = Namespace::new("ip link set lo up; ip addr add 8.8.4.4/32 dev lo")?;
        let rules = format!("{DEFINES}{RULES}{}", elements(many));
        router.inside(|| {
            load(&rules)?;
            shell(&format!(
                "ip link add bt0 type veth peer name eth0 address 06:00:00:00:00:02 netns {guest}
ip link set bt0 master br0
ip link set bt0 up
bridge link set dev bt0 isolated on learning off flood off
bridge fdb replace 06:00:00:00:00:02 dev bt0 master static
ip neigh replace 100.126.0.2 lladdr 06:00:00:00:00:02 dev br0 nud permanent
ip link add up0 type veth peer name net0 netns {internet}
ip addr add 100.126.15.253/30 dev up0
ip link set up0 up
ip route add default via 100.126.15.254",
                guest = guest.pid(),
                internet = internet.pid(),
            ))
        })?;
        internet.inside(|| {
            shell(
                "ip addr add 100.126.15.254/30 dev net0; ip link set net0 up; \
                 ip route add 100.126.0.0/21 via 100.126.15.253",
            )?;
            load(
                "table ip count { counter came { }
chain prerouting { type filter hook prerouting priority raw; udp dport 9 counter name came drop\n}\n}",
            )
        })?;
        let socket = guest.inside(|| {
            shell("ip addr add 100.126.0.2/21 dev eth0; ip link set eth0 up; ip route add default via 100.126.0.1")?;
            let failed = || Failure::io("cannot make a guest's socket");
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(failed())?;
            socket.connect((INTERNET, 9)).map_err(failed())?;
            Ok(socket)
        })?;
        let path = Self {
            internet,
            guest,
            _router: router,
            socket,
        };
        // The first packets wait for the neighbours, of which nobody tells.
        let end = Instant::now() + std::time::Duration::from_secs(10);
        while path.came()? == 0 {
            if Instant::now() > end {
                return Err(Failure::new(
                    "the bench's guest does not reach its internet",
                ));
            }
            let _ = path.socket.send(&[0; 18]);
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        Ok(path)
    }

    /// The wall and the CPU time that all packets take, every one of which must arrive.
    fn send(&self) -> Result<(f64, f64)> {
        let before = self.came()?;
        let took = self.guest.inside(|| {
            let cpu = cpu::seconds_of_this_thread();
            let start = Instant::now();
            for _ in 0..PACKETS {
                self.socket
                    .send(&[0; 18])
                    .map_err(Failure::io("cannot send"))?;
            }
            let wall = start.elapsed().as_secs_f64();
            Ok((wall, cpu::seconds_of_this_thread() - cpu))
        })?;
        let came = self.came()? - before;
        if came == u64::from(PACKETS) {
            Ok(took)
        } else {
            Err(Failure::new(format!("{came} of {PACKETS} packets arrived")))
        }
    }

    fn came(&self) -> Result<u64> {
        let listed = self
            .internet
            .inside(|| capture(command("nft").args(["list", "counter", "ip", "count", "came"])))?;
        let mut words = listed.stdout.split_whitespace();
        let count = words
            .find(|word| *word == "packets")
            .and_then(|_| words.next());
        count
            .and_then(|word| word.parse().ok())
            .ok_or_else(|| Failure::new("`nft` shows no counter"))
    }
}

/// The guest's own, and those of as many others.
fn elements(many: bool) -> String {
    let mut script = String::from(
        "add element bridge banger ports { \"bt0\" . 06:00:00:00:00:02 . 100.126.0.2 }\n\
         add element inet banger nat_vms { 100.126.0.2 }\n\
         add element inet banger host_addresses { 203.0.113.5 }\n",
    );
    if !many {
        return script;
    }
    // One of them is the guest itself.
    let others = (0..NETWORKS).flat_map(|network| (0..MANY).map(move |host| (network + 1, host)));
    for (network, host) in others.skip(1) {
        let _ = writeln!(
            script,
            "add element bridge banger ports {{ \"bt{network}x{host}\" . 06:00:00:00:{network:02x}:{host:02x} . 100.126.{network}.{host} }}\n\
             add element inet banger nat_vms {{ 100.126.{network}.{host} }}"
        );
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_the_rules_need_to_know_is_defined() {
        let word = |text: &str| -> String {
            let of_word = |c: &char| c.is_ascii_alphanumeric() || *c == '_';
            text.chars().take_while(of_word).collect()
        };
        let script = format!("{DEFINES}{RULES}");
        for used in RULES.split('$').skip(1).map(word) {
            assert!(script.contains(&format!("define {used} = ")), "{used}");
        }
    }

    #[test]
    fn many_vms_are_as_many_as_they_are_said_to_be() {
        let ports = |many| elements(many).matches("bridge banger ports").count();
        assert_eq!(ports(false), 1);
        assert_eq!(ports(true), usize::from(MANY) * usize::from(NETWORKS));
    }
}
