//! What a server did so far.

use crate::wire::Code;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts since the server was started. Every query ends as one of `answered`, `refused`, `malformed`, `failed` or
/// `dropped`, or still waits for a resolver.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stats {
    /// Messages that came in.
    pub queries: u64,
    /// Those that got an answer, be it that there is no such name.
    pub answered: u64,
    /// Those that were refused: names of the internet without NAT, kinds of query that are never answered, names that
    /// lead into private networks.
    pub refused: u64,
    /// Those that were no proper query, and were told so.
    pub malformed: u64,
    /// Those that no resolver answered, or for which there was no place among those that wait.
    pub failed: u64,
    /// Those that got no reply: beyond the client's rate, from a stranger, or too broken to reply to. TCP connections
    /// beyond the bounds count, too.
    pub dropped: u64,
    /// Those for which a resolver was asked.
    pub forwarded: u64,
    /// Those of `refused` whose answer led into a private network.
    pub rebinding: u64,
    /// Those that wait for a resolver right now.
    pub waiting: usize,
    /// The resolvers that are asked, the preferred one first.
    pub resolvers: Vec<SocketAddr>,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) queries: AtomicU64,
    pub(crate) answered: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) malformed: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) dropped: AtomicU64,
    pub(crate) forwarded: AtomicU64,
    pub(crate) rebinding: AtomicU64,
}

/// Counts one more.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Counters {
    /// Counts a reply by its code.
    pub(crate) fn replied(&self, code: Code) {
        count(match code {
            Code::NoError | Code::NoName => &self.answered,
            Code::Refused => &self.refused,
            Code::Malformed | Code::BadVersion => &self.malformed,
            Code::ServerFailure => &self.failed,
        });
    }

    pub(crate) fn stats(&self, waiting: usize, resolvers: Vec<SocketAddr>) -> Stats {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            queries: load(&self.queries),
            answered: load(&self.answered),
            refused: load(&self.refused),
            malformed: load(&self.malformed),
            failed: load(&self.failed),
            dropped: load(&self.dropped),
            forwarded: load(&self.forwarded),
            rebinding: load(&self.rebinding),
            waiting,
            resolvers,
        }
    }
}
