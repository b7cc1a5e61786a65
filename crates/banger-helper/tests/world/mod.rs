//! A keeper of the test's own, in a network namespace that plays the host.
#![allow(dead_code, reason = "each test program uses a part")]
#![expect(clippy::unwrap_used, reason = "a test fails where it fails")]

pub(crate) mod machine;

use banger_core::addr::Pool;
use banger_core::id::MacAddress;
use banger_host::exec::Run;
use banger_host::net::keeper::Keeper;
use banger_host::net::links::Links;
use banger_host::net::tap;
use banger_host::op::{NamespaceAnswer, NamespaceOp, Port, PortState, UPLINK};
use rustix::fd::OwnedFd;
use rustix::process::Pid;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_banger-netns");
pub(crate) const POOL: Pool = Pool::at(Ipv4Addr::new(172, 31, 240, 0));
const NOBODY: u32 = 65534;
/// Its virtio header comes before each frame.
pub(crate) const HEADER_BYTES: usize = 10;

pub(crate) struct World {
    pub(crate) keeper: Keeper,
    pub(crate) hold: OwnedFd,
    pub(crate) socket: PathBuf,
    pub(crate) directory: tempfile::TempDir,
    /// What starts `banger-netns`: by itself, or as an ordinary user.
    pub(crate) program: PathBuf,
    /// Asked for once, so that it is there while the keeper is stopped.
    network: OnceLock<OwnedFd>,
}

/// The port of the test's guest `number`.
pub(crate) fn guest(number: u8) -> Port {
    Port {
        tap: format!("bt0000000000{number:02x}"),
        mac: MacAddress([6, 0, 0, 0, 0, number]),
        address: Ipv4Addr::new(172, 31, 240, number + 1),
    }
}

pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Run::new(program).args(args).run().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Number and name of every link.
pub(crate) fn link_names() -> String {
    run("ip", &["-o", "link"])
        .lines()
        .map(|line| line.split(": ").take(2).collect::<Vec<_>>().join(" ") + "\n")
        .collect()
}

#[expect(
    clippy::disallowed_methods,
    reason = "a process that a test holds on to"
)]
pub(crate) fn start(program: &str, args: &[&str]) -> Child {
    Command::new(program).args(args).spawn().unwrap()
}

/// Waits for what another process does, with a limit.
pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < limit, "{what} did not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn missing() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root");
    }
    if !std::path::Path::new("/dev/net/tun").exists() {
        return Some("needs /dev/net/tun");
    }
    if ["nft", "ip", "bridge", "unshare", "setpriv"]
        .iter()
        .any(|program| {
            Run::new("sh")
                .args(["-c", &format!("command -v {program}")])
                .run()
                .is_err()
        })
    {
        return Some("needs nftables, iproute2 and util-linux");
    }
    None
}

impl World {
    /// With a base; nothing, and a word, where the machine lacks something.
    pub(crate) fn new(test: &str) -> Option<Self> {
        let world = Self::without_base(test)?;
        world.ensure_base();
        Some(world)
    }

    pub(crate) fn without_base(test: &str) -> Option<Self> {
        Self::start(test, false)
    }

    /// As an ordinary user, with a TAP node of its own that anybody may open.
    pub(crate) fn rootless(test: &str) -> Option<Self> {
        Self::start(test, true)
    }

    fn start(test: &str, rootless: bool) -> Option<Self> {
        if let Some(why) = missing() {
            eprintln!("SKIPPED: {test}: {why}");
            return None;
        }
        enter_new_host();
        // A path too long for a socket's address.
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let socket = deep.join("netns.sock");
        let mut program = PathBuf::from(PROGRAM);
        if rootless {
            program = directory.path().join("as-nobody");
            std::fs::write(&program, wrapper(directory.path())).unwrap();
            std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
            std::fs::copy(PROGRAM, directory.path().join("banger-netns")).unwrap();
            // As its owner, the user can remove it at the end.
            std::os::unix::fs::chown(directory.path(), Some(NOBODY), None).unwrap();
            for path in [directory.path(), &deep] {
                std::fs::set_permissions(path, PermissionsExt::from_mode(0o777)).unwrap();
            }
        }
        let spawned = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    let keeper = Keeper::spawn(&program, &socket, rootless);
                    if !rootless {
                        return keeper;
                    }
                    become_nobody();
                    Keeper::connect(&socket)
                })
                .join()
                .unwrap()
        });
        if rootless {
            become_nobody();
        }
        let keeper = match spawned {
            Ok(keeper) => keeper,
            Err(error)
                if error
                    .to_string()
                    .contains("user namespaces are not allowed") =>
            {
                eprintln!("SKIPPED: {test}: {error}");
                return None;
            }
            Err(error) => panic!("{}", banger_host::error_chain(&error)),
        };
        let (_, mut descriptors) = keeper.request(NamespaceOp::Keepalive).unwrap();
        Some(Self {
            keeper,
            hold: descriptors.remove(0),
            socket,
            directory,
            program,
            network: OnceLock::new(),
        })
    }

    pub(crate) fn keepalive(&self) -> OwnedFd {
        let (_, mut descriptors) = self.keeper.request(NamespaceOp::Keepalive).unwrap();
        descriptors.remove(0)
    }

    pub(crate) fn keeper_pid(&self) -> Pid {
        match self.keeper.request(NamespaceOp::Hello).unwrap().0 {
            NamespaceAnswer::Hello { pid, .. } => Pid::from_raw(pid).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn ensure_base(&self) {
        let op = NamespaceOp::EnsureBase { pool: POOL };
        self.keeper.request(op).unwrap();
    }

    pub(crate) fn ensure_port(&self, port: &Port) {
        let op = NamespaceOp::EnsurePort(port.clone());
        self.keeper.request(op).unwrap();
    }

    pub(crate) fn ports(&self) -> Vec<PortState> {
        match self.keeper.request(NamespaceOp::ListPorts).unwrap().0 {
            NamespaceAnswer::Ports { ports } => ports,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn namespace(&self) -> OwnedFd {
        let (_, mut namespaces) = self.keeper.request(NamespaceOp::Namespaces).unwrap();
        namespaces.remove(0)
    }

    /// Runs `work` inside the keeper's network namespace.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = self.network.get_or_init(|| self.namespace());
        as_root(|| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            work()
        })
    }

    /// The guest's end of a port.
    pub(crate) fn attach(&self, port: &Port) -> OwnedFd {
        self.ensure_port(port);
        self.inside(|| {
            let tap = tap::open(&port.tap).unwrap();
            // The bridge notices in its own time that somebody is there.
            wait_for("the port", || {
                run("bridge", &["link", "show", "dev", &port.tap]).contains("state forwarding")
            });
            tap
        })
    }

    /// Does what answers nothing.
    pub(crate) fn ask(&self, op: NamespaceOp) {
        let (answer, _) = self.keeper.request(op).unwrap();
        assert_eq!(answer, NamespaceAnswer::Done);
    }

    pub(crate) fn set_nat(&self, address: Ipv4Addr, on: bool) {
        self.ask(NamespaceOp::SetNat { address, on });
    }

    /// All counters of what was dropped, by name.
    pub(crate) fn counters(&self) -> std::collections::BTreeMap<String, u64> {
        match self.keeper.request(NamespaceOp::Counters).unwrap().0 {
            NamespaceAnswer::Counters { dropped, .. } => dropped
                .into_iter()
                .map(|(name, dropped)| (name, dropped.packets))
                .collect(),
            other => panic!("{other:?}"),
        }
    }

    /// A veth between the namespace and the test's host, which forwards nothing, and these addresses on the host.
    pub(crate) fn uplink(&self, addresses: &[Ipv4Addr]) {
        let namespace = self.namespace();
        Links::new()
            .create_veth("veth-test", 0, UPLINK, namespace.as_fd())
            .unwrap();
        run("ip", &["link", "set", "lo", "up"]);
        let host = format!("{}/32", POOL.host());
        run("ip", &["address", "add", &host, "dev", "veth-test"]);
        run("ip", &["link", "set", "veth-test", "up"]);
        let (guests, gateway) = (POOL.guests().to_string(), POOL.uplink().to_string());
        run(
            "ip",
            &[
                "route",
                "add",
                &guests,
                "via",
                &gateway,
                "dev",
                "veth-test",
                "onlink",
            ],
        );
        for address in addresses {
            run(
                "ip",
                &["address", "add", &format!("{address}/32"), "dev", "lo"],
            );
        }
        self.ask(NamespaceOp::EnsureUplink { pool: POOL });
    }

    /// How many packets a rule with this counter has dropped.
    pub(crate) fn dropped(&self, family: &str, counter: &str) -> u64 {
        let text = self.inside(|| run("nft", &["list", "counter", family, "banger", counter]));
        let (_, rest) = text.split_once("packets ").unwrap();
        rest.split(' ').next().unwrap().parse().unwrap()
    }
}

/// The calling thread, and what it starts, gets a network of its own to play the host.
#[expect(
    unsafe_code,
    reason = "threads of the test share no descriptors with it"
)]
fn enter_new_host() {
    // SAFETY: the descriptor table stays shared; only the network namespace of this thread changes.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
}

/// The calling thread, and what it starts, acts as an ordinary user, and can come back.
fn become_nobody() {
    let nobody = rustix::process::Uid::from_raw(NOBODY);
    let root = rustix::process::Uid::ROOT;
    rustix::thread::set_thread_res_uid(root, nobody, root).unwrap();
}

/// In a thread of its own, as root again.
pub(crate) fn as_root<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let work = || {
            let root = rustix::process::Uid::ROOT;
            rustix::thread::set_thread_res_uid(root, root, root).unwrap();
            work()
        };
        scope.spawn(work).join().unwrap()
    })
}

fn wrapper(directory: &std::path::Path) -> String {
    let directory = directory.display();
    format!(
        "#!/bin/sh\nexec unshare -m sh -c 'mkdir -p {directory}/dev && mount -t tmpfs tmpfs {directory}/dev && \
         mknod -m 0666 {directory}/dev/tun c 10 200 && chmod 0666 {directory}/dev/tun && \
         mount --bind {directory}/dev/tun /dev/net/tun && \
         exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups {directory}/banger-netns \"$@\"' sh \"$@\"\n"
    )
}
