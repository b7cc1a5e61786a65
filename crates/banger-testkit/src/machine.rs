//! A host of a test's own: the calling thread's network plays the host, with a way out that leads nowhere, and mounts
//! of the thread's own hide what the real host has in `/run` and who may open its tun node.

use crate::env::{Options, TestEnv, Vmm, programs};
use crate::run::{LIMIT, eventually, wait_exit};
use crate::skip::skip;
use rustix::fd::OwnedFd;
use rustix::fs::Access;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen};
use rustix::thread::UnshareFlags;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Where a daemon looks for the helper.
const HELPER: &str = "/run/banger-helper.sock";
/// What the machine remembers of the objects on it.
const LEDGER: &str = "/run/banger";
/// The device that leads out of the machine.
pub const WAN: &str = "wan0";
const NOBODY: u32 = 65_534;

/// Who does what needs root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// The daemon, which is root's.
    Root,
    /// `banger-helper`, for an ordinary user's daemon.
    Helper,
    /// Nobody: an ordinary user's daemon does without.
    Rootless,
}

impl Mode {
    /// As in the settings.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Helper => "helper",
            Self::Rootless => "rootless",
        }
    }

    /// A world in this mode, on the machine of the calling thread.
    ///
    /// # Panics
    /// As [`TestEnv::with`].
    pub fn env(self, test: &str, vmm: Vmm) -> Option<TestEnv> {
        TestEnv::with(
            test,
            &Options {
                vmm,
                user: (self != Self::Root).then_some(NOBODY),
                mode: Some(self.name()),
                ..Options::default()
            },
        )
    }
}

/// The machine of the calling thread, and of all threads and programs that this one starts.
#[derive(Debug)]
pub struct Machine {
    _own: (),
}

/// Whether this host has what a machine of a test's own takes; says why where it has not.
pub fn can_be_left(test: &str, mode: Mode) -> bool {
    if !rustix::process::geteuid().is_root() {
        skip(test, "it makes a machine of its own as root");
        return false;
    }
    let needed = ["nft", "ip", "nsenter", "pasta"];
    let needed = &needed[..if mode == Mode::Rootless { 4 } else { 3 }];
    if let Some(program) = needed.iter().find(|program| !crate::env::on_path(program)) {
        skip(test, format!("`{program}` is not installed"));
        return false;
    }
    if let Err(why) = rustix::fs::access("/dev/net/tun", Access::EXISTS) {
        skip(test, format!("/dev/net/tun: {why}"));
        return false;
    }
    true
}

/// Takes the calling thread to a machine of its own, which has a loopback alone.
///
/// # Panics
/// It cannot be made although the host has all that it takes.
pub fn leave_the_host() {
    #[expect(unsafe_code, reason = "unshare may break what threads share")]
    let left = {
        let own = UnshareFlags::NEWNET | UnshareFlags::NEWNS;
        // SAFETY: only namespaces are unshared, never the table of descriptors.
        unsafe { rustix::thread::unshare_unsafe(own) }
    };
    left.expect("root makes namespaces");
    sh(
        "mount --make-rprivate /; mount -t tmpfs -o mode=755 tmpfs /run; \
        mknod /run/tun c 10 200; chmod 0666 /run/tun; mount --bind /run/tun /dev/net/tun; \
        echo 0 >/proc/sys/net/ipv4/ip_forward; ip link set lo up",
    );
}

impl Machine {
    /// Leaves the host for a machine of the thread's own. Answers `None`, and says why, where that cannot be.
    ///
    /// # Panics
    /// It cannot be made although the host has all that it takes.
    pub fn enter(test: &str, mode: Mode) -> Option<Self> {
        if !can_be_left(test, mode) {
            return None;
        }
        leave_the_host();
        // No addresses of its own making: what is on the host must not change by itself.
        sh("ip link add wan0 type veth peer name wan1; \
            for end in wan0 wan1; do ip link set $end addrgenmode none; ip link set $end up; done; \
            ip address add 192.0.2.2/24 dev wan0; ip route add default via 192.0.2.1 dev wan0");
        eventually("the way out has carrier", || {
            let links = sh("ip -j link");
            (links.matches("\"operstate\":\"UP\"").count() == 2).then_some(())
        });
        Some(Self { _own: () })
    }

    /// The network of the host in the words of its own tools, and what it remembers of our objects.
    pub fn network(&self) -> String {
        let mut text = sh(
            "nft --stateless list ruleset; ip -d -j link; ip -j address; \
            ip -j -4 route show table all; ip -j -6 route show table all; ip -j -4 rule; ip -j -6 rule; \
            cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/conf/*/forwarding",
        );
        for (name, facts) in ledger() {
            let _ = writeln!(text, "{name}: {facts}");
        }
        text.replace("},{", "},\n{")
    }

    /// Waits until the network is as it was `before`: the kernel takes apart what nobody holds a moment later.
    ///
    /// # Panics
    /// It does not become so.
    pub fn assert_network(&self, before: &str, at: &str) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let now = self.network();
            if now == before {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{at}: the host is another than before:\n{}",
                differences(before, &now)
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// All settings of the network, by name, but for what counts by itself.
    pub fn settings(&self) -> BTreeMap<PathBuf, String> {
        let mut settings = BTreeMap::new();
        let mut folders = vec![PathBuf::from("/proc/sys/net")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                } else if !path.ends_with("nf_conntrack_count") {
                    // Some can only be written.
                    let text = std::fs::read(&path).unwrap_or_default();
                    settings.insert(path, String::from_utf8_lossy(&text).into_owned());
                }
            }
        }
        settings
    }

    /// Whether the way out passes on what comes from guests.
    ///
    /// # Panics
    /// It is not there.
    pub fn forwards(&self) -> bool {
        let path = format!("/proc/sys/net/ipv4/conf/{WAN}/forwarding");
        std::fs::read_to_string(path).expect("the machine has its way out") == "1\n"
    }
}

/// Runs `work` on a machine of its own, with root's helper where the mode needs it, in a world whose VMM is scripted.
/// Afterwards the machine's network must become what it was. Does nothing, and says why, where that cannot be.
///
/// # Panics
/// Something is left, or `work` panics.
pub fn in_a_world(
    mode: Mode,
    test: &'static str,
    work: impl FnOnce(&Machine, TestEnv) + Send + 'static,
) {
    on_a_thread(test, move || {
        let Some(machine) = Machine::enter(test, mode) else {
            return;
        };
        let before = machine.network();
        let helper = (mode == Mode::Helper).then(|| Helper::start(&[]));
        let Some(env) = mode.env(test, Vmm::Scripted(String::new())) else {
            return;
        };
        work(&machine, env);
        drop(helper);
        machine.assert_network(&before, test);
    });
}

/// Runs `work` on a thread of its own: one that becomes another machine is nobody else's afterwards. It has the test's
/// name, by which what it says when it panics is found.
///
/// # Panics
/// `work` does.
pub fn on_a_thread<T: Send + 'static>(test: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::Builder::new().name(test.to_owned());
    let thread = thread.spawn(work).expect("there is room for a thread");
    match thread.join() {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// What is remembered of instances and of forwarding; a lock, and an empty memory, are nothing.
pub fn ledger() -> BTreeMap<String, String> {
    let names = crate::env::names(Path::new(LEDGER));
    let facts = names.into_iter().filter_map(|name| {
        let facts = std::fs::read_to_string(Path::new(LEDGER).join(&name)).ok()?;
        (name != "lock" && facts != "{}").then_some((name, facts))
    });
    facts.collect()
}

/// What leads from one text to another, line by line.
pub fn differences(before: &str, after: &str) -> String {
    let mut text = String::new();
    for (sign, from, other) in [('-', before, after), ('+', after, before)] {
        for line in from
            .lines()
            .filter(|line| !other.lines().any(|kept| kept == *line))
        {
            let _ = writeln!(text, "{sign} {line}");
        }
    }
    text
}

/// Runs a line of shell on the machine, which must succeed; answers what it printed.
///
/// # Panics
/// It fails.
#[track_caller]
pub fn sh(line: &str) -> String {
    try_sh(line).unwrap_or_else(|why| panic!("{why}"))
}

/// As [`sh`], of what may be gone by then.
///
/// # Errors
/// It fails; the text says at what.
pub fn try_sh(line: &str) -> Result<String, String> {
    #[expect(
        clippy::disallowed_methods,
        reason = "a test sets up and reads its machine"
    )]
    let output = Command::new("sh").args(["-ec", line]).output();
    let output = output.map_err(|error| format!("{line}: {error}"))?;
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(format!("{line}: {}", text(&output.stderr)))
    }
}

/// `banger-helper` as its units would have it: a socket that is always there, and somebody who starts it again.
#[derive(Debug)]
pub struct Helper {
    child: Arc<Mutex<Option<Child>>>,
    ended: Arc<AtomicBool>,
    keeping: Option<std::thread::JoinHandle<()>>,
}

fn lock(child: &Mutex<Option<Child>>) -> MutexGuard<'_, Option<Child>> {
    child.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Helper {
    /// Starts it, on the machine of the calling thread. Only the first one has the `variables`.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn start(variables: &[(&str, &str)]) -> Self {
        let listener = listener();
        let start = move |variables: &[(&str, &str)]| {
            // Systemd hands over the fourth descriptor.
            let line = "exec 3<&0 0</dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\"";
            #[expect(
                clippy::disallowed_methods,
                reason = "tests run the project's own programs"
            )]
            let mut command = Command::new("sh");
            let log = std::fs::File::options()
                .create(true)
                .append(true)
                .open("/run/helper.log");
            command
                .args(["-c", line])
                .arg(programs().join("banger-helper"))
                .envs(variables.iter().copied())
                .current_dir("/")
                .stdin(Stdio::from(listener.try_clone().expect("room for a copy")))
                .stderr(log.expect("the machine's `/run` is ours"));
            command.spawn().expect("there is a shell")
        };
        let child = Arc::new(Mutex::new(Some(start(variables))));
        let ended = Arc::new(AtomicBool::new(false));
        let keeping = std::thread::spawn({
            let (child, ended) = (Arc::clone(&child), Arc::clone(&ended));
            move || {
                loop {
                    let now = lock(&child).as_ref().map(pid);
                    let Some(pid) = now else { return };
                    while !wait_exit(pid, LIMIT) {}
                    let mut child = lock(&child);
                    if let Some(mut gone) = child.take() {
                        let _ = gone.wait();
                    }
                    if !ended.load(Ordering::SeqCst) {
                        *child = Some(start(&[]));
                    }
                }
            }
        });
        Self {
            child,
            ended,
            keeping: Some(keeping),
        }
    }

    /// Ends it with SIGKILL, in the middle of whatever it does. Another one comes.
    pub fn kill(&self) {
        if let Some(child) = lock(&self.child).as_mut() {
            let _ = child.kill();
        }
    }

    /// All that it has said so far, on this machine.
    pub fn log() -> String {
        std::fs::read_to_string("/run/helper.log").unwrap_or_default()
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        self.kill();
        if let Some(keeping) = self.keeping.take() {
            let _ = keeping.join();
        }
        let _ = std::fs::remove_file(HELPER);
        if std::thread::panicking() {
            eprintln!("the helper's log:\n{}", Self::log());
        }
    }
}

fn pid(child: &Child) -> i32 {
    i32::try_from(child.id()).expect("process ids are small")
}

/// The socket, for everybody.
fn listener() -> OwnedFd {
    let _ = std::fs::remove_file(HELPER);
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
    let socket = socket.expect("there are sockets");
    let address = SocketAddrUnix::new(HELPER).expect("a short path");
    bind(&socket, &address).expect("the machine's `/run` is ours");
    let everybody = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(HELPER, everybody).expect("it is ours");
    listen(&socket, 128).expect("it is bound");
    socket
}
