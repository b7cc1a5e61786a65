//! A machine for a test: the calling thread's network plays the host, with one device to an internet of one server,
//! and network namespaces play instances. Needs root and nothing of the real network.

#![expect(clippy::unwrap_used, reason = "a test fails where it fails")]
#![allow(dead_code, reason = "not every test uses all of it")]

use banger_core::addr::Pool;
use banger_core::id::InstanceId;
use banger_host::exec::Run;
use banger_host::host_side::{Caller, Host};
use banger_host::net::host::HostOpError;
use banger_host::net::links::Links;
use banger_host::op::{HostAnswer, HostOp, NatReport};
use rustix::fd::OwnedFd;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub(crate) const ROOT: Caller = Caller { uid: 0 };
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
pub(crate) const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);

pub(crate) struct Machine {
    pub(crate) host: Host,
    pub(crate) folder: PathBuf,
    pub(crate) internet: OwnedFd,
    _directory: tempfile::TempDir,
}

/// An instance as the host sees it: a namespace with one guest's address in it.
pub(crate) struct Instance {
    pub(crate) id: InstanceId,
    pub(crate) pool: Pool,
    pub(crate) namespace: OwnedFd,
}

pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Run::new(program).args(args).run().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// A line of words, as one would type it.
pub(crate) fn sh(line: &str) -> String {
    run("sh", &["-ec", line])
}

/// Waits for what another thread or process does, with a limit.
pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < limit, "{what} did not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Damages by a line of shell, and waits for the repair. It comes within a second: by the first damage, or on a machine
/// that was busy with something else by one of the next.
#[track_caller]
pub(crate) fn repaired_within_a_second(what: &str, damage: &str, whole: &dyn Fn() -> bool) {
    let mut took = Vec::new();
    for _ in 0..5 {
        sh(damage);
        let started = Instant::now();
        wait_for(what, whole);
        let last = started.elapsed();
        if last < Duration::from_secs(1) {
            return;
        }
        took.push(last);
    }
    panic!("{what} took {took:?}");
}

/// What a test lacks here, if anything.
pub(crate) fn missing() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root");
    }
    let lacks = |program: &&str| {
        let line = format!("command -v {program}");
        Run::new("sh").args(["-c", &line]).run().is_err()
    };
    if ["nft", "ip", "setpriv"].iter().any(lacks) {
        return Some("needs nftables, iproute2 and util-linux");
    }
    None
}

#[expect(
    unsafe_code,
    reason = "threads of the test share no descriptors with it"
)]
fn enter_new_network() {
    // SAFETY: the descriptor table stays shared; only the network namespace of this thread changes.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
    // A link's own address and its route come seconds after the link, and would be differences that nobody made.
    sh("cd /proc/sys/net/ipv6/conf/default 2>/dev/null && echo 1 >disable_ipv6 || true");
}

/// A new network namespace that lives as long as its descriptor.
pub(crate) fn new_namespace() -> OwnedFd {
    std::thread::spawn(|| {
        enter_new_network();
        run("ip", &["link", "set", "lo", "up"]);
        std::fs::File::open("/proc/thread-self/ns/net")
            .unwrap()
            .into()
    })
    .join()
    .unwrap()
}

/// Runs `work` in a network namespace.
pub(crate) fn inside<T: Send>(namespace: &OwnedFd, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                    .unwrap();
                work()
            })
            .join()
            .unwrap()
    })
}

impl Machine {
    /// Nothing, and a word, where the machine lacks something.
    pub(crate) fn new(test: &str) -> Option<Self> {
        if let Some(why) = missing() {
            eprintln!("SKIPPED: {test}: {why}");
            return None;
        }
        enter_new_network();
        let internet = new_namespace();
        sh("ip link set lo up; echo 0 > /proc/sys/net/ipv4/ip_forward");
        Links::new()
            .create_veth("eth0", 0, "net0", internet.as_fd())
            .unwrap();
        sh("ip addr add 198.51.100.1/24 dev eth0; ip link set eth0 up");
        inside(&internet, || {
            sh("ip addr add 198.51.100.2/24 dev net0; ip link set net0 up")
        });
        sh("ip route add default via 198.51.100.2 dev eth0");
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().join("banger");
        Some(Self {
            host: Host::with_folder(folder.clone()),
            folder,
            internet,
            _directory: directory,
        })
    }

    pub(crate) fn perform(&self, op: &HostOp) -> Result<HostAnswer, HostOpError> {
        self.host.perform(ROOT, op, &[]).map(|(answer, _)| answer)
    }

    pub(crate) fn attach(&self, instance: &Instance) -> Result<HostAnswer, HostOpError> {
        let descriptors = [instance.namespace.as_fd()];
        let attached = self
            .host
            .perform(ROOT, &instance.attach(), &descriptors)
            .map(|(answer, _)| answer);
        if attached.is_ok() {
            instance.configure();
        }
        attached
    }

    pub(crate) fn nat(&self, instance: &Instance) -> NatReport {
        match self.perform(&instance.ensure_nat()).unwrap() {
            HostAnswer::Nat(report) => report,
            other => panic!("{other:?}"),
        }
    }

    /// All that an operation could leave behind.
    pub(crate) fn state(&self) -> String {
        run("nft", &["list", "ruleset"])
            // Not what timers and negotiation change by themselves.
            + &sh("ip -o link | sed 's/ state [A-Z]*//; s/<.*>//; s/ qdisc [a-z]*//'")
            + &run("ip", &["-o", "-4", "address"])
            + &run("ip", &["route", "show", "table", "all"])
            + &forwarding()
    }
}

/// Every device of the calling thread's network, and whether it forwards.
pub(crate) fn forwarding() -> String {
    sh("cd /proc/sys/net/ipv4/conf; for name in *; do echo $name $(cat $name/forwarding); done")
}

pub(crate) fn forwards(device: &str) -> bool {
    let text = forwarding();
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.any(|(name, value)| name == device && value == "1")
}

impl Instance {
    pub(crate) fn new(number: u8) -> Self {
        Self {
            id: format!("0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b{number:02x}")
                .parse()
                .unwrap(),
            pool: Pool::at(Ipv4Addr::new(172, 31, 16 * number, 0)),
            namespace: new_namespace(),
        }
    }

    pub(crate) fn attach(&self) -> HostOp {
        HostOp::AttachVeth {
            instance: self.id,
            pool: self.pool,
        }
    }

    pub(crate) fn detach(&self) -> HostOp {
        HostOp::DetachVeth { instance: self.id }
    }

    pub(crate) fn ensure_nat(&self) -> HostOp {
        HostOp::EnsureNat {
            instance: self.id,
            pool: self.pool,
        }
    }

    pub(crate) fn remove_nat(&self) -> HostOp {
        HostOp::RemoveNat { instance: self.id }
    }

    pub(crate) fn veth(&self) -> String {
        self.id.veth_name()
    }

    /// The address that plays a guest.
    pub(crate) fn guest(&self) -> Ipv4Addr {
        let [a, b, c, _] = self.pool.network().base().octets();
        Ipv4Addr::new(a, b, c, 2)
    }

    pub(crate) fn configure(&self) {
        let (guest, uplink, host) = (self.guest(), self.pool.uplink(), self.pool.host());
        inside(&self.namespace, || {
            sh(&format!(
                "ip addr replace {guest}/32 dev lo; ip addr replace {uplink}/32 dev up0; ip link set up0 up; \
                 ip route replace {host}/32 dev up0; ip route replace default via {host} dev up0 src {guest} onlink"
            ))
        });
    }

    /// Whom a server at `address` sees when the guest connects; nothing if it cannot.
    pub(crate) fn reach(&self, server: &OwnedFd, address: Ipv4Addr) -> Option<SocketAddr> {
        connect(&self.namespace, server, address)
    }
}

/// Whom a server at `address` in the network `server` sees when somebody in `client` connects to it.
pub(crate) fn connect(client: &OwnedFd, server: &OwnedFd, address: Ipv4Addr) -> Option<SocketAddr> {
    let listener = inside(server, || TcpListener::bind((address, 0)).unwrap());
    let to = listener.local_addr().unwrap();
    let connected = inside(client, || {
        std::net::TcpStream::connect_timeout(&to, Duration::from_secs(2))
    });
    connected.ok().map(|_stream| listener.accept().unwrap().1)
}

/// The calling thread's own network.
pub(crate) fn here() -> OwnedFd {
    std::fs::File::open("/proc/thread-self/ns/net")
        .unwrap()
        .into()
}
