//! A machine for a test: the calling thread's network plays the host, another one the internet, and mounts of the
//! thread's own hide what the real host has in `/run`, its resolvers, and who may open its tun node.

pub(crate) mod servers;

use banger_testkit::machine::{leave_the_host, on_a_thread, sh};
use rustix::fd::OwnedFd;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use servers::{Heard, RESOLVED_PORT};
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;

pub(crate) const SERVER: Ipv4Addr = Ipv4Addr::new(8, 8, 4, 4);
pub(crate) const RESOLVER: Ipv4Addr = Ipv4Addr::new(9, 9, 9, 9);
pub(crate) const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 7);
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The host's own addresses.
pub(crate) const HOST: [Ipv4Addr; 2] = [
    Ipv4Addr::new(203, 0, 112, 5),
    Ipv4Addr::new(192, 168, 77, 5),
];
/// Where servers of the internet echo.
pub(crate) const ECHO: u16 = 7000;
/// Where the host echoes, on all of its addresses.
pub(crate) const SSH: u16 = 22;
/// Somebody else's rules on the host.
const FOREIGN: &str = "table inet somebody {
	counter seen { }
	chain forward {
		type filter hook forward priority 10; policy accept;
		counter name seen
	}
}";

/// The internet's own count of what came to addresses that nobody may reach.
const COUNT: &str = "table inet count {
	counter closed { }
	chain input {
		type filter hook input priority 0; policy accept;
		ip daddr { CLOSED } counter name closed
	}
}";

pub(crate) struct Machine {
    /// What the internet's servers, and the host's, have heard.
    pub(crate) heard: Heard,
    internet: OwnedFd,
}

/// Runs a program, which must succeed, and answers what it printed.
#[track_caller]
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    #[expect(clippy::disallowed_methods, reason = "a test sets up its machine")]
    let output = Command::new(program).args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// Runs `work` in a thread that is a machine of its own; so its children are, too.
pub(crate) fn on_a_machine(test: &str, work: impl FnOnce(&Machine) + Send + 'static) {
    on_a_thread(test, move || work(&Machine::new()));
}

/// Runs `work` in a network.
pub(crate) fn inside<T: Send>(network: &OwnedFd, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            work()
        });
        thread.join().unwrap()
    })
}

impl Machine {
    fn new() -> Self {
        // Where it leads on the real host, before `/run` is another one.
        let resolvers = std::fs::canonicalize("/etc/resolv.conf").unwrap();
        leave_the_host();
        let text = format!("nameserver {RESOLVER}\n");
        std::fs::write("/run/resolv.conf", &text).unwrap();
        if resolvers.starts_with("/run") {
            std::fs::create_dir_all(resolvers.parent().unwrap()).unwrap();
            std::fs::write(&resolvers, &text).unwrap();
        } else {
            run(
                "mount",
                &["--bind", "/run/resolv.conf", resolvers.to_str().unwrap()],
            );
        }
        let internet = std::thread::spawn(|| {
            leave_the_host();
            here()
        });
        let internet = internet.join().unwrap();
        let heard = Heard::default();
        let machine = Self { heard, internet };
        machine.connect();
        machine.serve();
        machine
    }

    /// One device to the internet, which is one router that has all addresses; the host has two of its own.
    fn connect(&self) {
        // No addresses of its own making: what is on the host must not change by itself.
        sh("ip link add wan0 type veth peer name net0; \
            for end in wan0 net0; do ip link set $end addrgenmode none; done");
        let internet = format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            self.internet.as_raw_fd()
        );
        sh(&format!(
            "ip link set net0 netns {internet}; ip addr add {}/24 dev wan0; ip addr add {}/24 dev wan0; ip link set wan0 up",
            HOST[0], HOST[1]
        ));
        let own = [SERVER, RESOLVER, PRIVATE, METADATA];
        inside(&self.internet, || {
            sh("ip addr add 203.0.112.1/24 dev net0; ip link set net0 up");
            for address in own {
                sh(&format!("ip addr add {address}/32 dev lo"));
            }
            run(
                "nft",
                &[&COUNT.replace("CLOSED", &format!("{PRIVATE}, {METADATA}"))],
            );
        });
        sh("ip route add default via 203.0.112.1 dev wan0");
        run("nft", &[FOREIGN]);
    }

    fn serve(&self) {
        let (listener, resolvers) = inside(&self.internet, || {
            let resolver = |address| UdpSocket::bind((address, RESOLVED_PORT)).unwrap();
            (
                TcpListener::bind((Ipv4Addr::UNSPECIFIED, ECHO)).unwrap(),
                [SERVER, RESOLVER, PRIVATE, METADATA].map(resolver),
            )
        });
        self.heard.echo(listener);
        resolvers.into_iter().for_each(servers::resolve);
        self.heard
            .echo(TcpListener::bind((Ipv4Addr::UNSPECIFIED, SSH)).unwrap());
        // What is closed to guests is there, and open to others.
        inside(&self.internet, || {
            for address in HOST {
                run(
                    "ip",
                    &["route", "replace", &address.to_string(), "dev", "net0"],
                );
                TcpStream::connect((address, SSH)).unwrap();
            }
        });
    }

    /// Packets that came to addresses that nobody may reach.
    pub(crate) fn came_to_closed(&self) -> u64 {
        let text = inside(&self.internet, || {
            run("nft", &["list", "counter", "inet", "count", "closed"])
        });
        let mut words = text.split_whitespace();
        words.find(|word| *word == "packets");
        words.next().unwrap().parse().unwrap()
    }

    /// Puts back somebody else's rules, which a flush took.
    pub(crate) fn restore_foreign(&self) {
        run("nft", &[FOREIGN]);
    }

    /// All that could be left on the host, line by line.
    pub(crate) fn state(&self) -> BTreeSet<String> {
        let forwarding =
            "cd /proc/sys/net/ipv4; grep . ip_forward conf/*/forwarding conf/*/rp_filter";
        let text = [
            run("nft", &["--stateless", "list", "ruleset"]),
            run("ip", &["-d", "-j", "link"]),
            run("ip", &["-j", "address"]),
            run("ip", &["-j", "route", "show", "table", "all"]),
            run("ip", &["-j", "rule"]),
            sh(forwarding),
        ];
        let text = text.join("\n").replace("},{", "},\n{");
        text.lines().map(str::to_owned).collect()
    }
}

/// The calling thread's own network.
pub(crate) fn here() -> OwnedFd {
    std::fs::File::open("/proc/thread-self/ns/net")
        .unwrap()
        .into()
}
