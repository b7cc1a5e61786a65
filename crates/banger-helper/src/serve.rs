//! `banger-netns`' socket, and how long it lives.

use banger_host::error_chain;
use banger_host::exec::timespec;
use banger_host::net::namespace::Namespace;
use banger_host::net::seqpacket::{self, Place};
use banger_host::op::{
    MAX_MESSAGE_BYTES, NamespaceAnswer, NamespaceOp, NamespaceReply, NamespaceRequest,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::SocketFlags;
use rustix::pipe::PipeFlags;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long nobody has to ask for a keepalive descriptor after the start.
const UNCLAIMED: Duration = Duration::from_secs(30);
/// How long a client may take over its one message.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);
const BACKLOG: i32 = 64;
/// How long nobody is let in after somebody could not be.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How soon changes are listened for again after an error.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The server could not start, or lost its socket.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket could not be made.
    #[error("cannot listen at `{}`", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody listens there.
    #[error("another keeper serves `{}`", path.display())]
    InUse {
        /// Where.
        path: PathBuf,
    },
    /// The server could not go on.
    #[error("cannot serve")]
    Serve(#[source] io::Error),
}

/// A listening socket and the pipe whose write ends keep the server alive.
pub struct Server {
    place: Place,
    listener: OwnedFd,
    /// The socket file as we made it, so that another's is never unlinked.
    identity: (u64, u64),
    shared: Arc<Shared>,
    keepalive: OwnedFd,
}

struct Shared {
    namespace: Namespace,
    user_namespace: bool,
    /// The write end that is copied to clients; ours is closed at the first copy.
    handout: Mutex<Handout>,
    /// Where the read end is found to open the write end again.
    pipe: String,
}

/// The write end of the keepalive pipe.
enum Handout {
    /// Nobody has asked yet.
    Unclaimed(OwnedFd),
    /// Clients hold it. It is opened again, by way of the read end, for whoever asks next.
    Claimed,
    /// The server is about to end.
    Ended,
}

impl Server {
    /// Listens at `path`, mode 0600, in place of a stale socket.
    ///
    /// # Errors
    /// Another server listens there, or the directory cannot be written.
    pub fn listen(path: &Path, user_namespace: bool) -> Result<Self, ServeError> {
        let failed = |source: io::Error| ServeError::Listen {
            path: path.to_owned(),
            source,
        };
        let place = Place::open(path).map_err(failed)?;
        let address = place.address().map_err(failed)?;
        let probe = seqpacket::socket().map_err(failed)?;
        match rustix::net::connect(&probe, &address) {
            Ok(()) => {
                return Err(ServeError::InUse {
                    path: path.to_owned(),
                });
            }
            Err(Errno::CONNREFUSED) => {
                rustix::fs::unlinkat(&place.directory, &place.name, AtFlags::empty())
                    .map_err(|errno| failed(errno.into()))?;
            }
            // Nothing there; anything else is for `bind` to say.
            Err(_) => {}
        }
        let listener = seqpacket::socket().map_err(failed)?;
        let identity =
            bind_private(&listener, &place, &address).map_err(|errno| failed(errno.into()))?;
        let (keepalive, handout) =
            rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?;
        Ok(Self {
            place,
            listener,
            identity,
            shared: Arc::new(Shared {
                namespace: Namespace::new(),
                user_namespace,
                handout: Mutex::new(Handout::Unclaimed(handout)),
                pipe: format!("/proc/self/fd/{}", keepalive.as_raw_fd()),
            }),
            keepalive,
        })
    }

    /// Serves until all keepalive descriptors that were handed out are closed, or none is asked for in time; then the
    /// socket is removed.
    ///
    /// # Errors
    /// The kernel refuses to wait, or to start the thread that keeps the rules whole.
    pub fn run(self) -> Result<(), ServeError> {
        let shared = Arc::clone(&self.shared);
        std::thread::Builder::new()
            .name("keep-whole".to_owned())
            .spawn(move || keep_whole(&shared.namespace))
            .map_err(ServeError::Serve)?;
        let served = self.accept_until_released();
        let ours = rustix::fs::statat(
            &self.place.directory,
            &self.place.name,
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .is_ok_and(|facts| (facts.st_dev, facts.st_ino) == self.identity);
        if ours {
            let _ = rustix::fs::unlinkat(&self.place.directory, &self.place.name, AtFlags::empty());
        }
        served
    }

    fn accept_until_released(&self) -> Result<(), ServeError> {
        let unclaimed_until = Instant::now() + UNCLAIMED;
        loop {
            let limit = if self.shared.is_claimed() {
                None
            } else {
                let left = unclaimed_until.saturating_duration_since(Instant::now());
                if left.is_zero() && self.shared.abandon() {
                    return Ok(());
                }
                Some(timespec(left))
            };
            let mut fds = [
                PollFd::new(&self.listener, PollFlags::IN),
                PollFd::new(&self.keepalive, PollFlags::empty()),
            ];
            match poll(&mut fds, limit.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(ServeError::Serve(errno.into())),
            }
            let released = fds[1].revents().contains(PollFlags::HUP);
            if fds[0].revents().contains(PollFlags::IN) {
                self.accept();
            } else if released && self.shared.release(&self.keepalive) {
                return Ok(());
            }
        }
    }

    /// Without a descriptor or a thread for a client it is turned away: what we are short of comes back, and the
    /// namespace is not worth less for it.
    fn accept(&self) {
        let connection = match rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC) {
            Ok(connection) => connection,
            Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS) => {
                // They come back as clients end, which has no event of its own.
                std::thread::sleep(ACCEPT_PAUSE);
                return;
            }
            // The client went away.
            Err(_) => return,
        };
        let shared = Arc::clone(&self.shared);
        let spawned = std::thread::Builder::new()
            .name("client".to_owned())
            .spawn(move || shared.serve(&connection));
        if let Err(error) = spawned {
            complain("a client is turned away", &error);
        }
    }
}

/// Without end: to listen anew repairs what happened meanwhile, and another keeper would meet the same error.
fn keep_whole(namespace: &Namespace) {
    let mut deaf = false;
    loop {
        if let Err(error) = namespace.keep_whole()
            && !std::mem::replace(&mut deaf, true)
        {
            complain("changes of the rules are not heard of", &error);
        }
        std::thread::sleep(LISTEN_AGAIN);
    }
}

fn complain(what: &str, error: &io::Error) {
    // Nobody may be reading.
    let _ = writeln!(io::stderr(), "banger-netns: {what}: {error}");
}

/// Binds so that the socket never has another mode than 0600.
fn bind_private(
    listener: &OwnedFd,
    place: &Place,
    address: &rustix::net::SocketAddrUnix,
) -> Result<(u64, u64), Errno> {
    let before = rustix::process::umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
    let bound = rustix::net::bind(listener, address);
    rustix::process::umask(before);
    bound?;
    rustix::net::listen(listener, BACKLOG)?;
    let facts = rustix::fs::statat(&place.directory, &place.name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok((facts.st_dev, facts.st_ino))
}

impl Shared {
    fn is_claimed(&self) -> bool {
        !matches!(*self.handout(), Handout::Unclaimed(_))
    }

    fn handout(&self) -> std::sync::MutexGuard<'_, Handout> {
        self.handout.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves one client, message by message.
    fn serve(&self, connection: &OwnedFd) {
        seqpacket::widen(connection);
        // Inside a user namespace our own user is 0 and everybody else is nobody.
        let ours = rustix::net::sockopt::socket_peercred(connection)
            .is_ok_and(|peer| peer.uid == rustix::process::geteuid());
        if !ours {
            return;
        }
        while let Ok(Some((message, came_with))) =
            seqpacket::receive(connection, Some(Instant::now() + CLIENT_TIMEOUT))
        {
            let answer = parse(&message).and_then(|op| self.answer(op, came_with));
            let (result, descriptors) = match answer {
                Ok((answer, descriptors)) => (Ok(answer), descriptors),
                Err(why) => (Err(why), Vec::new()),
            };
            if reply(connection, result, &descriptors).is_err() {
                return;
            }
        }
    }

    fn answer(
        &self,
        op: NamespaceOp,
        came_with: Vec<OwnedFd>,
    ) -> Result<(NamespaceAnswer, Vec<OwnedFd>), String> {
        match op {
            NamespaceOp::Hello => Ok((
                NamespaceAnswer::Hello {
                    pid: rustix::process::getpid().as_raw_nonzero().get(),
                    version: VERSION.to_owned(),
                    user_namespace: self.user_namespace,
                },
                Vec::new(),
            )),
            NamespaceOp::Keepalive => Ok((NamespaceAnswer::Done, vec![self.keepalive()?])),
            NamespaceOp::Namespaces => Ok((NamespaceAnswer::Done, self.namespaces()?)),
            op => self
                .namespace
                .perform(&op, came_with)
                .map_err(|error| error_chain(&error)),
        }
    }

    /// The write end of the pipe: at first ours, later opened again by way of the read end.
    fn keepalive(&self) -> Result<OwnedFd, String> {
        let mut handout = self.handout();
        match std::mem::replace(&mut *handout, Handout::Claimed) {
            Handout::Unclaimed(end) => Ok(end),
            Handout::Claimed => {
                let flags = OFlags::WRONLY | OFlags::CLOEXEC;
                rustix::fs::open(&self.pipe, flags, Mode::empty())
                    .map_err(|errno| format!("cannot open the keepalive pipe: {errno}"))
            }
            Handout::Ended => {
                *handout = Handout::Ended;
                Err("the keeper is ending".to_owned())
            }
        }
    }

    fn namespaces(&self) -> Result<Vec<OwnedFd>, String> {
        let names: &[&str] = if self.user_namespace {
            &["/proc/self/ns/net", "/proc/self/ns/user"]
        } else {
            &["/proc/self/ns/net"]
        };
        names
            .iter()
            .map(|name| {
                rustix::fs::open(*name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                    .map_err(|errno| format!("cannot open `{name}`: {errno}"))
            })
            .collect()
    }

    /// Whether everybody has let go; from then on nobody can hold on any more.
    fn release(&self, keepalive: &OwnedFd) -> bool {
        let mut handout = self.handout();
        let now = Timespec::default();
        let mut fds = [PollFd::new(keepalive, PollFlags::empty())];
        let released =
            poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::HUP);
        if released {
            *handout = Handout::Ended;
        }
        released
    }

    /// Whether nobody has asked for a keepalive descriptor; from then on nobody can.
    fn abandon(&self) -> bool {
        let mut handout = self.handout();
        let unclaimed = matches!(*handout, Handout::Unclaimed(_));
        if unclaimed {
            *handout = Handout::Ended;
        }
        unclaimed
    }
}

fn parse(message: &[u8]) -> Result<NamespaceOp, String> {
    serde_json::from_slice(message)
        .map(|request: NamespaceRequest| request.op)
        .map_err(|error| format!("the request is not understood: {error}"))
}

fn reply(
    connection: &OwnedFd,
    result: Result<NamespaceAnswer, String>,
    descriptors: &[OwnedFd],
) -> io::Result<()> {
    let bytes = serde_json::to_vec(&NamespaceReply { result })?;
    if bytes.len() <= MAX_MESSAGE_BYTES {
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        match seqpacket::send(connection, &bytes, &borrowed) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::MSGSIZE) => {}
            sent => return sent,
        }
    }
    let result = Err(format!("the answer of {} bytes is too long", bytes.len()));
    let bytes = serde_json::to_vec(&NamespaceReply { result })?;
    seqpacket::send(connection, &bytes, &[])
}
