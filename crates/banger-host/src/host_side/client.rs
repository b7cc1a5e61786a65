//! The client's side of `banger-helper`.

use crate::net::seqpacket::{self, Place};
use crate::op::{HostAnswer, HostOp, HostReply, HostRequest};
use rustix::fd::{BorrowedFd, OwnedFd};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the helper's unit listens.
pub const HELPER_SOCKET: &str = "/run/banger-helper.sock";
/// How long an operation may take; the helper may have to be started, or be busy for others, first.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// A door to `banger-helper`. Every request has a connection of its own, so one value serves any number of threads,
/// and a helper that ended meanwhile is started again.
#[derive(Debug)]
pub struct HelperClient {
    socket: PathBuf,
    place: Place,
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
    /// Nobody answers.
    pub fn connect(socket: &Path) -> Result<Self, HelperError> {
        let place = Place::open(socket).map_err(|source| HelperError::Unreachable {
            socket: socket.to_owned(),
            source,
        })?;
        let client = Self {
            socket: socket.to_owned(),
            place,
        };
        client.request(&HostOp::Hello {}, &[])?;
        Ok(client)
    }

    /// Does `op` with its descriptors, within a minute; once more if the helper dies in the middle of it.
    ///
    /// # Errors
    /// The helper is gone, or the operation failed or was refused.
    pub fn request(
        &self,
        op: &HostOp,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(HostAnswer, Vec<OwnedFd>), HelperError> {
        let bad = |source| HelperError::BadReply {
            socket: self.socket.clone(),
            source,
        };
        let message = serde_json::to_vec(&HostRequest { op: op.clone() }).map_err(bad)?;
        let exchange = || seqpacket::exchange(&self.place, &message, descriptors, REQUEST_TIMEOUT);
        let exchanged = match exchange() {
            // It died before it answered. Every operation measures first, so another helper goes on where this one
            // was; what has half been done would else stay so.
            Err(error) if is_broken_off(&error) => exchange(),
            exchanged => exchanged,
        };
        let (bytes, handed_out) = exchanged.map_err(|source| HelperError::Unreachable {
            socket: self.socket.clone(),
            source,
        })?;
        let reply: HostReply = serde_json::from_slice(&bytes).map_err(bad)?;
        match reply.result {
            Ok(answer) => Ok((answer, handed_out)),
            Err(why) => Err(HelperError::Refused {
                operation: op.name(),
                why,
            }),
        }
    }
}

fn is_broken_off(error: &io::Error) -> bool {
    seqpacket::is_hung_up(error) || error.kind() == io::ErrorKind::UnexpectedEof
}
