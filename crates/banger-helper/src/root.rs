//! `banger-helper`'s serving loop: one thread a client, few of them, each request judged by the kernel's word for who
//! sent it; and one thread that keeps what was asked for as it is.

use banger_host::error_chain;
use banger_host::exec::timespec;
use banger_host::host_side::{Caller, Host, Settled};
use banger_host::net::host::HostOpError;
use banger_host::net::seqpacket;
use banger_host::op::{HostAnswer, HostOp, HostReply, HostRequest, TOO_MANY_REQUESTS};
use banger_host::seldom::Seldom;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::SocketFlags;
use rustix::net::sockopt::Timeout;
use std::collections::HashMap;
use std::io::{self, Write as _};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How many clients one user may have at a time, and all users together.
pub const CLIENTS_PER_USER: usize = 8;
/// See [`CLIENTS_PER_USER`].
pub const CLIENTS: usize = 64;
/// The longest request.
pub const MAX_REQUEST_BYTES: usize = 16 * 1024;
/// How much of what a client said is repeated to it, and in the log.
const MAX_REPEATED_CHARS: usize = 256;
/// How long a client may take over each message, and over reading each answer.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long nobody is let in after somebody could not be.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How often it is told, at most, that clients are turned away.
const CROWD_LINE: Duration = Duration::from_secs(1);

/// A line for whoever reads the log.
pub fn say(line: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Serves until nothing is attached and nobody has asked for anything for as long as `idle`; for ever without it.
///
/// # Errors
/// The process is out of descriptors or threads for good, or cannot hear of changes.
pub fn serve(listener: OwnedFd, host: Host, idle: Option<Duration>) -> io::Result<()> {
    let host = Arc::new(host);
    // Without it rules could stay flushed, so there is no serving.
    let mut seldom = Seldom::default();
    let _keeping = host.keep(move |settled| {
        report(settled, &mut seldom);
        ControlFlow::Continue(())
    })?;
    accept_until_idle(&listener, &host, idle)
}

/// Somebody who changes the rules without end must not fill the log.
fn report(settled: Result<Settled, HostOpError>, seldom: &mut Seldom) {
    let mut tell = |line: String| {
        if let Some(held_back) = seldom.tell(&line, Instant::now()) {
            say(format_args!("{line}{held_back}"));
        }
    };
    match settled {
        Ok(settled) => {
            for instance in &settled.ended {
                say(format_args!("instance {instance} has ended"));
            }
            settled.lines().into_iter().for_each(tell);
        }
        Err(error) => {
            tell(format!("cannot settle: {}", error_chain(&error)));
            if matches!(error, HostOpError::Watch(_)) {
                // Rules could stay flushed now: systemd starts another.
                std::process::exit(1);
            }
        }
    }
}

fn accept_until_idle(
    listener: &OwnedFd,
    host: &Arc<Host>,
    idle: Option<Duration>,
) -> io::Result<()> {
    let crowd = Arc::new(Mutex::new(Crowd::default()));
    let mut last = Instant::now();
    let mut turned_away = TurnedAway::default();
    loop {
        let limit = idle.map(|idle| timespec(idle.saturating_sub(last.elapsed())));
        match poll(&mut [PollFd::new(listener, PollFlags::IN)], limit.as_ref()) {
            Ok(0) => {
                // What could not be looked at may be attached.
                let idle = host
                    .settle()
                    .is_ok_and(|settled| settled.attached == 0 && settled.failed.is_empty());
                if lock(&crowd).all == 0 && idle {
                    return Ok(());
                }
                last = Instant::now();
                continue;
            }
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        last = Instant::now();
        let connection = match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(connection) => connection,
            // Short of something that comes back as clients end, which has no event of its own.
            Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS) => {
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            }
            // The client went away.
            Err(_) => continue,
        };
        let Ok(peer) = rustix::net::sockopt::socket_peercred(&connection) else {
            continue;
        };
        let caller = Caller {
            uid: peer.uid.as_raw(),
        };
        let Some(place) = Place::take(&crowd, caller) else {
            turned_away.tell(caller);
            refuse(&connection, TOO_MANY_REQUESTS.to_owned());
            continue;
        };
        let host = Arc::clone(host);
        let started = std::thread::Builder::new()
            .name("client".to_owned())
            .spawn(move || {
                let _place = place;
                attend(&connection, caller, &host);
            });
        if let Err(error) = started {
            say(format_args!("cannot attend a client: {error}"));
        }
    }
}

/// How many clients there are, and whose.
#[derive(Debug, Default)]
struct Crowd {
    all: usize,
    of_user: HashMap<u32, usize>,
}

fn lock(crowd: &Mutex<Crowd>) -> MutexGuard<'_, Crowd> {
    crowd.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A client's place in the crowd, given up when it is dropped.
struct Place {
    crowd: Arc<Mutex<Crowd>>,
    uid: u32,
}

impl Place {
    fn take(crowd: &Arc<Mutex<Crowd>>, caller: Caller) -> Option<Self> {
        let mut counts = lock(crowd);
        let of_user = counts.of_user.get(&caller.uid).copied().unwrap_or(0);
        if counts.all >= CLIENTS || of_user >= CLIENTS_PER_USER {
            return None;
        }
        counts.all += 1;
        counts.of_user.insert(caller.uid, of_user + 1);
        Some(Self {
            crowd: Arc::clone(crowd),
            uid: caller.uid,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = lock(&self.crowd);
        counts.all -= 1;
        if let Some(of_user) = counts.of_user.get_mut(&self.uid) {
            *of_user -= 1;
            if *of_user == 0 {
                counts.of_user.remove(&self.uid);
            }
        }
    }
}

/// Keeps a flood of clients from becoming a flood of lines.
#[derive(Debug, Default)]
struct TurnedAway {
    told: Option<Instant>,
    since: usize,
}

impl TurnedAway {
    fn tell(&mut self, caller: Caller) {
        self.since += 1;
        if self.told.is_none_or(|told| told.elapsed() >= CROWD_LINE) {
            let (uid, count) = (caller.uid, self.since);
            say(format_args!(
                "refused uid={uid} op=connect: {TOO_MANY_REQUESTS} ({count} turned away)"
            ));
            self.told = Some(Instant::now());
            self.since = 0;
        }
    }
}

/// Serves one client, message by message.
fn attend(connection: &OwnedFd, caller: Caller, host: &Host) {
    let uid = caller.uid;
    if rustix::net::sockopt::set_socket_timeout(connection, Timeout::Send, Some(CLIENT_TIMEOUT))
        .is_err()
    {
        return;
    }
    loop {
        let deadline = Instant::now() + CLIENT_TIMEOUT;
        let (message, descriptors) = match seqpacket::receive(connection, Some(deadline)) {
            Ok(Some(received)) => received,
            Ok(None) => return,
            Err(error) => {
                if error.kind() != io::ErrorKind::ConnectionReset {
                    say(format_args!("refused uid={uid} op=receive: {error}"));
                }
                return;
            }
        };
        let (name, result) = answer(host, caller, &message, &descriptors);
        let (result, handed_out) = match result {
            Ok((answer, handed_out)) => (Ok(answer), handed_out),
            Err(why) => {
                say(format_args!("refused uid={uid} op={name}: {why}"));
                (Err(why), Vec::new())
            }
        };
        if let Err(error) = reply(connection, result, &handed_out) {
            say(format_args!(
                "refused uid={uid} op={name}: it does not hear the answer: {error}"
            ));
            return;
        }
    }
}

type Answered = Result<(HostAnswer, Vec<OwnedFd>), String>;

fn answer(
    host: &Host,
    caller: Caller,
    message: &[u8],
    descriptors: &[OwnedFd],
) -> (&'static str, Answered) {
    if message.len() > MAX_REQUEST_BYTES {
        let why = format!("a request of {} bytes is too long", message.len());
        return ("receive", Err(why));
    }
    let op: HostOp = match serde_json::from_slice::<HostRequest>(message) {
        Ok(request) => request.op,
        Err(error) => {
            let why = format!("the request is not understood: {error}");
            // It repeats words of the request, which must not fill the log.
            let said = why.escape_debug().take(MAX_REPEATED_CHARS).collect();
            return ("receive", Err(said));
        }
    };
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let performed = host.perform(caller, &op, &borrowed);
    (op.name(), performed.map_err(|error| error_chain(&error)))
}

fn reply(
    connection: &OwnedFd,
    result: Result<HostAnswer, String>,
    descriptors: &[OwnedFd],
) -> io::Result<()> {
    let bytes = serde_json::to_vec(&HostReply { result })?;
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    seqpacket::send(connection, &bytes, &borrowed)
}

/// Says why, if that takes no waiting.
fn refuse(connection: &OwnedFd, why: String) {
    if rustix::io::ioctl_fionbio(connection, true).is_ok() {
        let _ = reply(connection, Err(why), &[]);
    }
}
