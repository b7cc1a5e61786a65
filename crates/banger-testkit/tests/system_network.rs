//! The network that real guests have, in each mode, on a machine of the test's own with an internet of its own.

#![expect(clippy::unwrap_used, reason = "a test fails where it fails")]

mod network;

use banger_testkit::env::{TestEnv, Vmm};
use banger_testkit::machine::{self, Helper, Mode, sh};
use banger_testkit::run::{LIMIT, PROMPT, Running, eventually};
use network::servers::{RESOLVED, ask};
use network::{ECHO, HOST, METADATA, Machine, PRIVATE, SERVER, SSH};
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

const ADDRESS: u16 = 1;
const POINTER: u16 = 12;
/// How long somebody flushes the packet filter again and again.
const FLUSHING: u32 = 3;
/// How long a connection that is closed may not be heard of.
const SILENCE: Duration = Duration::from_millis(1500);

#[test]
#[ignore = "system test"]
fn as_root_a_guest_reaches_what_was_opened_to_it_and_nothing_else() {
    const TEST: &str = "as_root_a_guest_reaches_what_was_opened_to_it_and_nothing_else";
    tell(Mode::Root, TEST);
}

#[test]
#[ignore = "system test"]
fn with_the_helper_a_guest_reaches_what_was_opened_to_it_and_nothing_else() {
    const TEST: &str = "with_the_helper_a_guest_reaches_what_was_opened_to_it_and_nothing_else";
    tell(Mode::Helper, TEST);
}

#[test]
#[ignore = "system test"]
fn without_root_a_guest_reaches_what_was_opened_to_it_and_nothing_else() {
    const TEST: &str = "without_root_a_guest_reaches_what_was_opened_to_it_and_nothing_else";
    tell(Mode::Rootless, TEST);
}

/// The whole of it, the same in every mode.
fn tell(mode: Mode, test: &'static str) {
    if !machine::can_be_left(test, mode) {
        return;
    }
    network::on_a_machine(test, move |machine| {
        let before = machine.state();
        let Some(mut world) = World::new(machine, mode, test) else {
            return;
        };
        world.nothing_is_open_at_first();
        world.nat_opens_the_internet_and_nothing_else();
        world.a_guest_sends_as_itself_or_not_at_all();
        world.what_is_closed_stays_closed_while_somebody_flushes_the_rules();
        world.nat_that_is_taken_back_ends_what_is_open();
        world.joined_guests_reach_each_other_until_one_leaves();
        world.a_published_udp_port_leads_into_the_guest();
        world.a_published_port_leads_into_the_guest_while_it_runs();
        world.env.ok(&["daemon", "stop", "--vms"]);
        drop(world.helper.take());
        // What holds an ordinary user's way out ends by itself, after the keeper.
        eventually("all have ended", || {
            world.env.host().processes.is_empty().then_some(())
        });
        drop(world);
        let after = machine.state();
        let differs: Vec<_> = after.symmetric_difference(&before).collect();
        assert!(
            differs.is_empty(),
            "something was left on the host: {differs:#?}"
        );
    });
}

/// A daemon with two guests.
struct World<'a> {
    machine: &'a Machine,
    env: TestEnv,
    fox: Ipv4Addr,
    owl: Ipv4Addr,
    gateway: Ipv4Addr,
    helper: Option<Helper>,
}

impl<'a> World<'a> {
    fn new(machine: &'a Machine, mode: Mode, test: &str) -> Option<Self> {
        let env = mode.env(test, Vmm::Real)?;
        let helper = (mode == Mode::Helper).then(|| Helper::start(&[]));
        let create = |name| {
            let guest = ["--image", "tiny", "--memory", "256", "--vcpu", "1"];
            let args = [&["vm", "create", "--name", name, "--wait"], &guest[..]].concat();
            env.spawn(&args)
        };
        let created = [create("fox"), create("owl")].map(Running::finish);
        for output in created {
            assert_eq!(output.status, 0, "{}\n{}", output.stderr, env.daemon_log());
        }
        let address = |name| env.vm(name)["address"].as_str().unwrap().parse().unwrap();
        let (fox, owl) = (address("fox"), address("owl"));
        let [a, b, c, _] = Ipv4Addr::octets(&fox);
        let world = Self {
            machine,
            env,
            fox,
            owl,
            gateway: Ipv4Addr::new(a, b, c, 1),
            helper,
        };
        assert_eq!(world.status()["mode"], mode.name());
        Some(world)
    }

    fn status(&self) -> Value {
        self.env.json(&["nat", "status"])
    }

    fn ssh(&self, guest: &str, line: &str) -> String {
        // The rules on the way there are themselves flushed in some of these tests; 255 says that it was ssh that did
        // not get through, which is not what they are about.
        let output = eventually("ssh gets through", || {
            let output = self.env.banger(&["vm", "ssh", guest, "--", line]);
            (output.status != 255).then_some(output)
        });
        assert_eq!(output.status, 0, "{output:?}");
        output.stdout
    }

    /// What of `targets` answers a guest that tries all of them at once, with a second for each.
    fn answers(&self, guest: &str, targets: &[Target]) -> BTreeSet<String> {
        let lines = self.ssh(guest, &script(targets, "once"));
        lines.lines().map(str::to_owned).collect()
    }

    #[track_caller]
    fn closed(&self, guest: &str, targets: &[Target]) {
        let answered = self.answers(guest, targets);
        assert_eq!(answered, BTreeSet::new(), "reached by `{guest}`");
        self.nobody_came_to_what_is_closed();
    }

    /// The first packet may be lost to the search for the other's hardware address, and guests are slow.
    #[track_caller]
    fn open(&self, guest: &str, targets: &[Target]) {
        let wanted: BTreeSet<String> = targets.iter().map(Target::word).collect();
        eventually(&format!("`{guest}` reaches {wanted:?}"), || {
            (self.answers(guest, targets) == wanted).then_some(())
        });
    }

    #[track_caller]
    fn nobody_came_to_what_is_closed(&self) {
        assert_eq!(self.machine.came_to_closed(), 0);
        for address in HOST.into_iter().chain([PRIVATE, METADATA]) {
            assert_eq!(self.machine.heard.at(address), 0, "{address}");
        }
    }

    /// The host, by all of its addresses, and all that is not the public internet.
    fn never(&self) -> Vec<Target> {
        let pool = banger_core::addr::Pool::at(self.env.pool());
        let host = HOST.into_iter().chain([pool.host(), pool.uplink()]);
        let host = host.flat_map(|address| [Target::Tcp(address, SSH), Target::Ping(address)]);
        let closed = [PRIVATE, METADATA].into_iter().flat_map(|address| {
            [
                Target::Tcp(address, ECHO),
                Target::Dns(address),
                Target::Ping(address),
            ]
        });
        host.chain(closed)
            .chain([Target::Tcp(self.gateway, SSH), Target::Ping(self.gateway)])
            .collect()
    }

    fn internet(&self) -> Vec<Target> {
        vec![Target::Tcp(SERVER, ECHO), Target::Dns(SERVER)]
    }

    /// A guest's ways to the other guest.
    fn guest(address: Ipv4Addr) -> Vec<Target> {
        vec![Target::Tcp(address, SSH), Target::Ping(address)]
    }

    fn nothing_is_open_at_first(&self) {
        let targets = [self.internet(), self.never(), Self::guest(self.owl)].concat();
        self.closed("fox", &targets);
        // Its own names it knows; those of the internet are none of its business.
        let text = self.ssh(
            "fox",
            &format!(
                "nslookup owl.vm; nslookup {}; nslookup -type=a there.example; true",
                self.owl
            ),
        );
        assert!(text.contains(&self.owl.to_string()), "{text}");
        assert!(text.contains("name = owl.vm"), "{text}");
        assert!(text.contains("REFUSED"), "{text}");
        assert!(!text.contains(&RESOLVED.to_string()), "{text}");
        let dns = self.env.json(&["dns", "status"]);
        let server: SocketAddr = dns["host"].as_str().unwrap().parse().unwrap();
        let forward = ask(server, "owl.vm", ADDRESS);
        assert!(forward.ends_with(&self.owl.octets()), "{forward:?}");
        let [a, b, c, d] = self.owl.octets();
        let reverse = ask(server, &format!("{d}.{c}.{b}.{a}.in-addr.arpa"), POINTER);
        let name = b"\x03owl\x02vm\0";
        let named = reverse.windows(name.len()).any(|bytes| bytes == name);
        assert!(named, "{reverse:?}");
    }

    fn nat_opens_the_internet_and_nothing_else(&self) {
        self.env.ok(&["nat", "up", "fox"]);
        self.open("fox", &self.internet());
        self.closed("fox", &[self.never(), Self::guest(self.owl)].concat());
        self.closed("owl", &[self.internet(), Self::guest(self.fox)].concat());
        eventually("names of the internet are asked for", || {
            let text = self.ssh("fox", "nslookup -type=a there.example; true");
            text.contains(&RESOLVED.to_string()).then_some(())
        });
        let text = self.ssh("owl", "nslookup -type=a there.example; true");
        assert!(text.contains("REFUSED"), "{text}");
    }

    /// Packets with another sender, so far.
    fn foreign_senders(&self) -> u64 {
        self.status()["dropped"]["sender_dropped"].as_u64().unwrap()
    }

    fn a_guest_sends_as_itself_or_not_at_all(&self) {
        let (owl, gateway) = (self.owl, self.gateway);
        // Programs take a sender only from the addresses that the guest has.
        let as_owl = |line: &str| {
            format!("ip addr add {owl}/32 dev eth0; {line}; ip addr del {owl}/32 dev eth0")
        };
        let asks = format!("nslookup owl.vm {gateway}");
        for (what, line) in [
            ("IP", as_owl(&format!("ping -c 1 -W 1 -I {owl} {SERVER}"))),
            (
                "ARP",
                as_owl(&format!("arping -c 1 -w 1 -I eth0 -s {owl} {gateway}")),
            ),
            (
                "ARP that nobody asked for",
                as_owl(&format!("arping -U -c 1 -w 1 -I eth0 -s {owl} {owl}")),
            ),
            (
                "MAC",
                format!(
                    "own=$(cat /sys/class/net/eth0/address); ip link set eth0 address 02:00:00:00:00:99; \
                     timeout 1 {asks}; ip link set eth0 address $own"
                ),
            ),
        ] {
            let before = self.foreign_senders();
            // A slow guest may not come to send anything within the second that it has.
            eventually(what, || {
                // Without a connection, which would suffer as well.
                let detached = format!(
                    "rm -f /tmp/said; setsid sh -c '{line}; echo done' >/tmp/said 2>&1 </dev/null &"
                );
                self.ssh("fox", &detached);
                let said = eventually(what, || {
                    let said = self.ssh("fox", "cat /tmp/said");
                    said.contains("done").then_some(said)
                });
                assert!(!said.contains("bytes from"), "{what}: {said}");
                assert!(!said.contains("reply from"), "{what}: {said}");
                assert!(!said.contains("owl.vm\nAddress"), "{what}: {said}");
                (self.foreign_senders() > before).then_some(())
            });
        }
        self.open("fox", &self.internet());
    }

    fn what_is_closed_stays_closed_while_somebody_flushes_the_rules(&self) {
        let repairs = self.status()["repairs"].as_u64().unwrap();
        let keeper = self.env.keeper().unwrap();
        for (guest, targets) in [
            ("fox", [self.never(), Self::guest(self.owl)].concat()),
            (
                "owl",
                [self.never(), self.internet(), Self::guest(self.fox)].concat(),
            ),
        ] {
            let tries = script(&targets, "again");
            let detached = format!(
                "rm -f /tmp/found; cat >/tmp/tries <<'E'\n{tries}\necho done\nE\n\
                 setsid sh /tmp/tries >/tmp/found 2>/dev/null </dev/null &"
            );
            self.ssh(guest, &detached);
        }
        let flush = format!("timeout {FLUSHING} sh -c 'while :; do nft flush ruleset; done'");
        let lines = [
            format!("{flush} || true"),
            format!("nsenter --net=/proc/{keeper}/ns/net {flush} || true"),
        ];
        std::thread::scope(|scope| {
            // Threads of this one are in its network, too.
            for line in &lines {
                scope.spawn(|| sh(line));
            }
        });
        for guest in ["fox", "owl"] {
            let found = eventually("the guest has tried all", || {
                let found = self.ssh(guest, "cat /tmp/found");
                found.ends_with("done\n").then_some(found)
            });
            assert_eq!(found, "done\n", "reached by `{guest}`");
        }
        self.nobody_came_to_what_is_closed();
        self.machine.restore_foreign();
        assert!(self.status()["repairs"].as_u64().unwrap() > repairs);
        // And it works as before.
        self.open("fox", &self.internet());
        self.closed("owl", &self.internet());
    }

    fn nat_that_is_taken_back_ends_what_is_open(&self) {
        let heard = || self.machine.heard.at(SERVER);
        let before = heard();
        self.ssh(
            "fox",
            &format!(
                "setsid sh -c 'while sleep 0.1; do echo tick; done | nc {SERVER} {ECHO}' >/dev/null 2>&1 </dev/null &"
            ),
        );
        eventually("the connection is open", || {
            (heard() > before + 20).then_some(())
        });
        self.env.ok(&["nat", "down", "fox"]);
        // What was on its way is heard of yet, and how late depends on this machine; a connection that goes on is not.
        let down = Instant::now();
        let at_the_end = eventually("no more is heard", || {
            let before = heard();
            std::thread::sleep(SILENCE / 5);
            (heard() == before).then_some(before)
        });
        assert!(down.elapsed() < PROMPT, "{:?}", down.elapsed());
        std::thread::sleep(SILENCE);
        assert_eq!(heard(), at_the_end, "a connection outlived its NAT");
        self.closed("fox", &[self.internet(), self.never()].concat());
    }

    fn joined_guests_reach_each_other_until_one_leaves(&self) {
        self.env.ok(&["net", "join", "fox", "owl"]);
        self.open("fox", &Self::guest(self.owl));
        self.open("owl", &Self::guest(self.fox));
        self.closed("owl", &[self.internet(), self.never()].concat());
        self.env.ok(&["net", "leave", "owl", "fox"]);
        self.closed("fox", &Self::guest(self.owl));
        self.closed("owl", &Self::guest(self.fox));
    }

    /// Datagrams that came to the guest for a port that nobody hears on.
    fn unheard(&self) -> u64 {
        let text = self.ssh("fox", "cat /proc/net/snmp");
        // Names first, then figures: `Udp: InDatagrams NoPorts …`.
        let figures = text.lines().filter(|line| line.starts_with("Udp:")).nth(1);
        figures.unwrap().split(' ').nth(2).unwrap().parse().unwrap()
    }

    /// No program of the tiny image hears on a UDP port; its kernel counts what came.
    fn a_published_udp_port_leads_into_the_guest(&self) {
        const NOBODY_HEARS: u16 = 9;
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let free = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let place = free.local_addr().unwrap();
        drop(free);
        let port = format!("{place}:{NOBODY_HEARS}/udp");
        self.env.ok(&["port", "add", "fox", &port]);
        let before = self.unheard();
        socket.send_to(b"hello", place).unwrap();
        eventually("a datagram comes to the guest", || {
            (self.unheard() > before).then_some(())
        });
        self.env.ok(&["port", "rm", "fox", &format!("{place}/udp")]);
        let before = self.unheard();
        // The second is refused when the first was answered by the kernel: nobody is there.
        let gone = [(); 2].map(|()| socket.connect(place).and_then(|()| socket.send(b"hello")));
        assert!(gone.iter().any(Result::is_err), "{gone:?}");
        assert_eq!(self.unheard(), before);
    }

    fn a_published_port_leads_into_the_guest_while_it_runs(&self) {
        let free = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let place = free.local_addr().unwrap();
        drop(free);
        self.env
            .ok(&["port", "add", "fox", &format!("{place}:{SSH}")]);
        let mut connection = TcpStream::connect_timeout(&place, LIMIT).unwrap();
        connection.set_read_timeout(Some(LIMIT)).unwrap();
        let mut banner = [0; 4];
        connection.read_exact(&mut banner).unwrap();
        assert_eq!(&banner, b"SSH-");
        self.env.ok(&["vm", "stop", "fox"]);
        let refused = TcpStream::connect_timeout(&place, LIMIT).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        // Whoever was connected learns of it.
        let mut rest = Vec::new();
        let end = connection.read_to_end(&mut rest);
        let silent = matches!(&end, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock);
        assert!(!silent, "{end:?}");
    }
}

/// What a guest may try to reach.
#[derive(Debug, Clone, Copy)]
enum Target {
    /// Somebody says something on a TCP port.
    Tcp(Ipv4Addr, u16),
    /// A resolver answers by UDP.
    Dns(Ipv4Addr),
    /// The address answers to ICMP.
    Ping(Ipv4Addr),
}

impl Target {
    fn word(&self) -> String {
        match self {
            Self::Tcp(address, port) => format!("{address}:{port}"),
            Self::Dns(address) => format!("{address}:dns"),
            Self::Ping(address) => format!("{address}:ping"),
        }
    }

    fn command(&self) -> String {
        match self {
            Self::Tcp(address, port) => {
                // By `pasta`, the other side's end is at times lost to whoever ended first.
                format!(
                    "echo hello | timeout 2 nc -w 1 {address} {port} 2>/dev/null | head -c 1 | grep -q ."
                )
            }
            Self::Dns(address) => {
                format!(
                    "timeout 1 nslookup -type=a there.example {address} 2>&1 | grep -q {RESOLVED}"
                )
            }
            Self::Ping(address) => format!("ping -c 1 -W 1 {address} >/dev/null 2>&1"),
        }
    }
}

/// A script that tries all at once, and prints the words of those that answered; `again` and again for as long as
/// somebody flushes.
fn script(targets: &[Target], how: &str) -> String {
    let mut script = String::new();
    for target in targets {
        let (command, word) = (target.command(), target.word());
        script += &match how {
            "again" => format!(
                "(end=$(($(date +%s) + {FLUSHING} + 1)); while [ $(date +%s) -lt $end ]; do {command} && echo {word}; \
                 done) &\n"
            ),
            _ => format!("({command} && echo {word}) &\n"),
        };
    }
    script + "wait\n"
}
