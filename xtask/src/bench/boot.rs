//! From nothing to a command run over ssh, against the same packages as Debian boots them: its own initramfs, its own
//! units, one plain disk.
//!
//! What favours the other side on purpose: its disk is copied before the clock starts, its kernel command line and
//! its machine are ours, and its neighbour is known.

use super::bare::{BareVmm, Namespace};
use super::debian::{ADDRESS, Debian, GATEWAY};
use super::home::{Home, Images, succeed};
use super::pairs;
use super::stats::Target;
use super::table::Row;
use crate::command::command;
use crate::failure::{Failure, Result};
use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

/// Pairs of guest boots, each of which takes many seconds.
const PAIRS: usize = 7;
const TARGET: Target = Target {
    at_most: 0.4,
    margin: 0.25,
    at_most_more: None,
};
const VM: &str = "boot";
/// How long a guest may take to answer.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// How long one try to connect may take, and how long to wait after one that was refused.
const TRY_LIMIT: Duration = Duration::from_millis(100);
const TRY_AGAIN: Duration = Duration::from_millis(20);

pub(super) fn run(dist: &Path) -> Result<Vec<Row>> {
    let home = Home::new(dist, Images::TinyAndDefault)?;
    let debian = Debian::ensure(&home)?;
    home.succeed(&["vm", "create", "--name", VM])?;
    let ours = BareVmm::of(&home, VM, home.scratch("bare")?)?;
    home.succeed(&["vm", "delete", VM, "--force", "--purge"])?;
    let theirs = debian.vmm(ours)?;
    let part = |prefix: &str| {
        theirs
            .vmm
            .value(prefix)
            .ok_or_else(|| Failure::new(format!("the VMM's command line has no `{prefix}`")))
    };
    let (tap, mac) = (part("ifname=")?, part("mac=")?);
    let namespace = Namespace::new(&format!(
        "ip tuntap add dev {tap} mode tap; ip addr add {GATEWAY}/24 dev {tap}; ip link set {tap} up; \
         ip neigh replace {ADDRESS} lladdr {mac} nud permanent dev {tap}"
    ))?;
    let summary = pairs(
        PAIRS,
        || {
            let start = Instant::now();
            home.succeed(&["vm", "create", "--name", VM])?;
            home.succeed(&["vm", "ssh", VM, "--", "true"])?;
            let seconds = start.elapsed().as_secs_f64();
            home.succeed(&["vm", "delete", VM, "--force", "--purge"])?;
            eprintln!("ours   {seconds:.2} s");
            Ok(seconds)
        },
        || {
            let mut copy = command("cp");
            copy.arg("--sparse=always")
                .arg(&debian.disk)
                .arg(&theirs.disk);
            succeed(&mut copy)?;
            namespace.inside(|| {
                let start = Instant::now();
                let (_running, _) = theirs.vmm.start()?;
                wait_for_ssh(start)?;
                succeed(&mut debian.ssh("true"))?;
                let seconds = start.elapsed().as_secs_f64();
                eprintln!("theirs {seconds:.2} s");
                Ok(seconds)
            })
        },
    )?;
    let name = "create to ssh / Debian's own boot";
    Ok(vec![Row::pairs(name, &summary, TARGET, PAIRS)])
}

/// Waits until sshd greets.
fn wait_for_ssh(start: Instant) -> Result<()> {
    let address = SocketAddr::from((ADDRESS, 22));
    while start.elapsed() < BOOT_LIMIT {
        match TcpStream::connect_timeout(&address, TRY_LIMIT) {
            Ok(mut stream) => {
                let mut greeting = [0; 4];
                let read = stream
                    .set_read_timeout(Some(BOOT_LIMIT))
                    .and_then(|()| stream.read_exact(&mut greeting));
                if read.is_ok() && &greeting == b"SSH-" {
                    return Ok(());
                }
            }
            // Nothing in this world tells when a port of another machine opens.
            Err(error) if error.kind() != std::io::ErrorKind::TimedOut => {
                std::thread::sleep(TRY_AGAIN);
            }
            Err(_) => {}
        }
    }
    Err(Failure::new(format!(
        "the guest's ssh did not answer within {} s",
        BOOT_LIMIT.as_secs()
    )))
}
