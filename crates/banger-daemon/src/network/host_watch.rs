//! Threads that hear of changes on the host: its own addresses, which no guest may reach, and, where this process is
//! root, rules of ours that somebody flushed. They end with the network's actor.

use super::Ask;
use banger_host::error_chain;
use banger_host::host_side::{HostSide, Keeping, Settled};
use banger_host::net::addresses;
use banger_host::net::host::HostOpError;
use banger_host::seldom::Seldom;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::ops::ControlFlow;
use std::time::Instant;
use tokio::sync::mpsc;

/// Tells the network's actor the host's addresses, now and whenever they change.
pub(super) fn follow_addresses(inbox: mpsc::WeakSender<Ask>) {
    let spawned = std::thread::Builder::new()
        .name("host-addresses".to_owned())
        .spawn(move || {
            let heard = addresses::follow(|addresses| {
                let sent = inbox
                    .upgrade()
                    .map(|inbox| inbox.blocking_send(Ask::HostAddresses(addresses)));
                match sent {
                    Some(Ok(())) => ControlFlow::Continue(()),
                    Some(Err(_)) | None => ControlFlow::Break(()),
                }
            });
            if let Err(error) = heard {
                tracing::warn!(%error, "changes of the host's addresses are not heard of");
            }
        });
    if let Err(error) = spawned {
        tracing::warn!(%error, "changes of the host's addresses are not heard of");
    }
}

/// Tells the network's actor when the process `keeper` has ended.
pub(super) fn follow_keeper(keeper: i32, inbox: mpsc::WeakSender<Ask>) {
    let Ok(pidfd) = banger_vmm::process::open(keeper) else {
        return;
    };
    let spawned = std::thread::Builder::new()
        .name("keeper-end".to_owned())
        .spawn(move || {
            let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
            while let Err(Errno::INTR) = poll(&mut ended, None) {}
            if let Some(inbox) = inbox.upgrade() {
                // The actor may have ended, too.
                let _ = inbox.blocking_send(Ask::KeeperEnded);
            }
        });
    if let Err(error) = spawned {
        tracing::warn!(%error, "the end of the namespace's keeper is not heard of");
    }
}

/// Keeps what was asked of the host side as it is, for as long as the answer is held.
pub(super) fn keep(host: &HostSide) -> Option<Keeping> {
    let mut seldom = Seldom::default();
    let report = move |settled| {
        report(settled, &mut seldom);
        ControlFlow::Continue(())
    };
    host.keep(report).unwrap_or_else(|error| {
        tracing::warn!(%error, "changes of the host's packet filter are not heard of");
        None
    })
}

/// Somebody who changes the rules without end must not fill the log.
fn report(settled: Result<Settled, HostOpError>, seldom: &mut Seldom) {
    let mut warn = |line: String| {
        if let Some(held_back) = seldom.tell(&line, Instant::now()) {
            tracing::warn!("{line}{held_back}");
        }
    };
    match settled {
        Ok(settled) => settled.lines().into_iter().for_each(warn),
        Err(error) => warn(format!(
            "the host cannot be settled: {}",
            error_chain(&error)
        )),
    }
}
