//! The client's side of `banger-helper`.

use crate::net::seqpacket::{self, Place};
use crate::op::{HostAnswer, HostOp, HostReply, HostRequest, TOO_MANY_REQUESTS};
use rustix::fd::{BorrowedFd, OwnedFd};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Where the helper's unit listens.
pub const HELPER_SOCKET: &str = "/run/banger-helper.sock";
/// How long an operation may take; the helper may have to be started, or be busy for others, first.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// How many requests are under way at once: half of what the helper allows a user, who may have two daemons.
const REQUESTS: usize = 4;
/// How soon one that found no place is asked again: at first, and at most. The helper says so by a refusal alone, so
/// there is no event to wait for.
const SOONEST: Duration = Duration::from_millis(20);
const LATEST: Duration = Duration::from_millis(500);
/// What one that is asked has in any case, however little is left.
const LEAST: Duration = Duration::from_secs(1);

/// A door to `banger-helper`. Every request has a connection of its own, so one value serves any number of threads,
/// and a helper that ended meanwhile is started again.
#[derive(Debug)]
pub struct HelperClient {
    socket: PathBuf,
    place: Place,
    limit: Duration,
    turns: Turns,
}

/// How many requests are under way, so that one daemon does not take the places that it needs from itself.
#[derive(Debug, Default)]
struct Turns {
    taken: Mutex<usize>,
    freed: Condvar,
}

/// The right to ask, given up when it is dropped.
struct Turn<'a>(&'a Turns);

impl Turns {
    /// Waits for a turn; nothing if none came in time.
    fn take(&self, deadline: Instant) -> Option<Turn<'_>> {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let left = deadline.saturating_duration_since(Instant::now());
        let (mut taken, _) = self
            .freed
            .wait_timeout_while(taken, left, |taken| *taken >= REQUESTS)
            .unwrap_or_else(PoisonError::into_inner);
        if *taken >= REQUESTS {
            return None;
        }
        *taken += 1;
        Some(Turn(self))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.taken.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.freed.notify_one();
    }
}

/// The helper could not be reached, or did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// Nobody answers at the socket.
    #[error("cannot reach `banger-helper` at `{}`", socket.display())]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its reply makes no sense to us.
    #[error("`banger-helper` at `{}` gave a reply that is not understood", socket.display())]
    BadReply {
        /// The socket.
        socket: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// It refused, or tried and failed.
    #[error("`banger-helper` did not do {operation}: {why}")]
    Refused {
        /// The operation's name.
        operation: &'static str,
        /// The cause and its causes, in the helper's words.
        why: String,
    },
}

impl HelperClient {
    /// The helper at `socket`, checked to be there.
    ///
    /// # Errors
    /// Nobody answers: see [`HelperError::says_nobody`].
    pub fn connect(socket: &Path) -> Result<Self, HelperError> {
        Self::connect_within(socket, REQUEST_TIMEOUT)
    }

    fn connect_within(socket: &Path, limit: Duration) -> Result<Self, HelperError> {
        let place = Place::open(socket).map_err(|source| HelperError::Unreachable {
            socket: socket.to_owned(),
            source,
        })?;
        let client = Self {
            socket: socket.to_owned(),
            place,
            limit,
            turns: Turns::default(),
        };
        client.request(&HostOp::Hello {}, &[])?;
        Ok(client)
    }

    /// Does `op` with its descriptors, within a minute; once more if the helper dies in the middle of it, and as often
    /// as it takes if it has no place for us.
    ///
    /// # Errors
    /// The helper is gone, or the operation failed or was refused.
    pub fn request(
        &self,
        op: &HostOp,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(HostAnswer, Vec<OwnedFd>), HelperError> {
        let deadline = Instant::now() + self.limit;
        let Some(_turn) = self.turns.take(deadline) else {
            return Err(self.unreachable(io::ErrorKind::TimedOut.into()));
        };
        let message = serde_json::to_vec(&HostRequest { op: op.clone() })
            .map_err(|source| self.bad_reply(source))?;
        let mut pause = SOONEST;
        loop {
            let (reply, handed_out) = self.ask(&message, descriptors, deadline)?;
            match reply.result {
                Ok(answer) => return Ok((answer, handed_out)),
                // Other processes of the user have all the places.
                Err(why) if why == TOO_MANY_REQUESTS && Instant::now() + pause < deadline => {
                    std::thread::sleep(pause);
                    pause = LATEST.min(pause * 2);
                }
                Err(why) => {
                    return Err(HelperError::Refused {
                        operation: op.name(),
                        why,
                    });
                }
            }
        }
    }

    fn ask(
        &self,
        message: &[u8],
        descriptors: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(HostReply, Vec<OwnedFd>), HelperError> {
        let exchange = || {
            let left = deadline.saturating_duration_since(Instant::now());
            seqpacket::exchange(&self.place, message, descriptors, left.max(LEAST))
        };
        let exchanged = match exchange() {
            // It died before it answered. Every operation measures first, so another helper goes on where this one
            // was; what has half been done would else stay so.
            Err(error) if is_broken_off(&error) => exchange(),
            exchanged => exchanged,
        };
        let (bytes, handed_out) = exchanged.map_err(|source| self.unreachable(source))?;
        let reply = serde_json::from_slice(&bytes).map_err(|source| self.bad_reply(source))?;
        Ok((reply, handed_out))
    }

    fn unreachable(&self, source: io::Error) -> HelperError {
        HelperError::Unreachable {
            socket: self.socket.clone(),
            source,
        }
    }

    fn bad_reply(&self, source: serde_json::Error) -> HelperError {
        HelperError::BadReply {
            socket: self.socket.clone(),
            source,
        }
    }
}

impl HelperError {
    /// Whether there is no helper for this user, for good: its socket is not there, serves nobody or is closed to the
    /// user. Any other error may be over in a moment.
    pub fn says_nobody(&self) -> bool {
        use io::ErrorKind::{ConnectionRefused, NotFound, PermissionDenied};
        matches!(
            self,
            Self::Unreachable { source, .. }
                if matches!(source.kind(), NotFound | ConnectionRefused | PermissionDenied)
        )
    }
}

fn is_broken_off(error: &io::Error) -> bool {
    seqpacket::is_hung_up(error) || error.kind() == io::ErrorKind::UnexpectedEof
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Plays the helper at `socket`: `answer` says how each client is answered, and by nothing hangs up.
    fn helper(
        socket: &Path,
        answer: impl FnMut() -> Option<Result<HostAnswer, String>> + Send + 'static,
    ) {
        let mut answer = answer;
        let listener = seqpacket::socket().unwrap();
        let place = Place::open(socket).unwrap();
        rustix::net::bind(&listener, &place.address().unwrap()).unwrap();
        rustix::net::listen(&listener, 64).unwrap();
        std::thread::spawn(move || {
            while let Ok(connection) = rustix::net::accept(&listener) {
                if let Some(result) = answer() {
                    let bytes = serde_json::to_vec(&HostReply { result }).unwrap();
                    let _ = seqpacket::send(&connection, &bytes, &[]);
                }
            }
        });
    }

    #[test]
    fn a_helper_without_a_place_is_asked_again_until_the_time_is_over() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("helper.sock");
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        helper(&socket, move || {
            match count.fetch_add(1, Ordering::Relaxed) {
                0..3 => Some(Err(TOO_MANY_REQUESTS.to_owned())),
                3 => Some(Ok(HostAnswer::Done)),
                4 => Some(Err("it is not yours".to_owned())),
                _ => Some(Err(TOO_MANY_REQUESTS.to_owned())),
            }
        });
        let mut client = HelperClient::connect(&socket).unwrap();
        assert_eq!(asked.load(Ordering::Relaxed), 4);
        // Any other refusal is the last word.
        assert!(client.request(&HostOp::ListOwned {}, &[]).is_err());
        assert_eq!(asked.load(Ordering::Relaxed), 5);
        client.limit = Duration::from_millis(200);
        let refused = client.request(&HostOp::ListOwned {}, &[]).unwrap_err();
        assert!(
            refused.to_string().ends_with(TOO_MANY_REQUESTS),
            "{refused}"
        );
        assert!(!refused.says_nobody());
    }

    #[test]
    fn only_an_absent_helper_is_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("helper.sock");
        let limit = Duration::from_millis(200);
        let connect = || HelperClient::connect_within(&socket, limit);
        assert!(connect().unwrap_err().says_nobody(), "no socket");
        std::fs::write(&socket, "").unwrap();
        assert!(connect().unwrap_err().says_nobody(), "nobody listens");
        std::fs::remove_file(&socket).unwrap();
        helper(&socket, || None);
        assert!(!connect().unwrap_err().says_nobody(), "it hangs up");
    }

    #[test]
    fn few_requests_are_under_way_at_once() {
        let turns = Turns::default();
        let soon = || Instant::now() + Duration::from_millis(20);
        let mut taken: Vec<_> = (0..REQUESTS).map(|_| turns.take(soon()).unwrap()).collect();
        assert!(turns.take(soon()).is_none());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let late = Instant::now() + Duration::from_secs(60);
                turns.take(late).is_some()
            });
            taken.pop();
            assert!(waiting.join().unwrap());
        });
    }
}
