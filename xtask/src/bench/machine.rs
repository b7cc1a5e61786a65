//! A host of a bench's own: a network without a way out, a `/run` of its own, and a tun node that everybody may open.
//! All of it goes with the thread and the programs in it.

use super::home::succeed;
use crate::command::{capture, command};
use crate::failure::{Failure, Result};
use rustix::thread::UnshareFlags;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// Where the helper listens, as its unit has it.
const HELPER: &str = "/run/banger-helper.sock";
/// How long it may take to listen.
const LISTEN_LIMIT: Duration = Duration::from_secs(10);
/// The folders of build and homes may be where only root enters, so that they are shown here.
const SHOWN: &str = "/run/bench";

const SET_UP: &str = "mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
mknod /run/tun c 10 200
chmod 0666 /run/tun
mount --bind /run/tun /dev/net/tun
mkdir -p /run/bench/dist
mount --bind 'DIST' /run/bench/dist
ip link set lo up
ip link add wan0 type veth peer name net0
ip link set net0 up
ip addr add 203.0.113.5/24 dev wan0
ip link set wan0 up
ip route add default via 203.0.113.1 dev wan0";

/// The machine that the calling thread is in.
#[derive(Debug)]
pub(super) struct Machine {
    /// The programs to measure.
    pub(super) dist: PathBuf,
}

/// Runs `work` in a thread that is a machine of its own; so are the programs that it starts.
pub(super) fn on_a_machine<T: Send>(
    dist: &Path,
    work: impl FnOnce(&Machine) -> Result<T> + Send,
) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| work(&Machine::new(dist)?));
        thread
            .join()
            .unwrap_or_else(|_| Err(Failure::new("a bench's thread panicked")))
    })
}

impl Machine {
    fn new(dist: &Path) -> Result<Self> {
        #[expect(unsafe_code, reason = "there is no safe call")]
        // SAFETY: descriptors stay shared; only namespaces of this thread change, and it ends with the bench.
        let entered =
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) };
        entered.map_err(|error| {
            Failure::io("cannot make a machine for the bench")(error.into())
                .hint("this bench needs root: run it with sudo")
        })?;
        shell(&SET_UP.replace("DIST", &dist.display().to_string()))?;
        Ok(Self {
            dist: Path::new(SHOWN).join("dist"),
        })
    }

    /// Shows `folder` under `name` where everybody may look for it.
    pub(super) fn show(&self, folder: &Path, name: &str) -> Result<PathBuf> {
        let shown = Path::new(SHOWN).join(name);
        std::fs::create_dir_all(&shown)
            .map_err(Failure::io(format!("cannot make `{}`", shown.display())))?;
        succeed(command("mount").arg("--bind").arg(folder).arg(&shown))?;
        Ok(shown)
    }

    /// Starts the helper, which serves as long as the value lives.
    pub(super) fn helper(&self) -> Result<Helper> {
        let program = self.dist.join("banger-helper");
        let child = command(&program)
            .args(["--listen", HELPER])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(Failure::io(format!("cannot run `{}`", program.display())))?;
        let helper = Helper { child };
        let end = Instant::now() + LISTEN_LIMIT;
        // A listening has no event.
        while Instant::now() < end {
            if listens(HELPER) {
                return Ok(helper);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Err(Failure::new("the helper does not listen"))
    }
}

/// Runs a script, which must succeed, in the namespaces of the calling thread.
pub(super) fn shell(script: &str) -> Result<()> {
    let done = capture(command("sh").args(["-ec", script]))?;
    if done.success {
        Ok(())
    } else {
        let said = done.stderr.trim();
        Err(Failure::new(format!(
            "cannot set the bench's machine up: {said}"
        )))
    }
}

fn listens(path: &str) -> bool {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};
    let Ok(address) = SocketAddrUnix::new(path) else {
        return false;
    };
    socket(AddressFamily::UNIX, SocketType::SEQPACKET, None)
        .is_ok_and(|socket| connect(&socket, &address).is_ok())
}

/// `banger-helper`, as its unit would have started it.
#[derive(Debug)]
pub(super) struct Helper {
    child: Child,
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
