//! The root side of the host, reached in one of two ways: in process where the daemon is root, else by
//! `banger-helper`.

mod client;
mod closed;
mod descriptor;
mod forwarding;
mod host;
mod keep;
mod ledger;
mod resolved;
mod table;
mod tag;
mod veth;

pub use client::{HELPER_SOCKET, HelperClient, HelperError};
pub use host::{Caller, Host, MAX_INSTANCES, Settled};
pub use keep::Keeping;
pub use ledger::LedgerError;

use crate::crash::{Side, point};
use crate::net::host::HostOpError;
use crate::op::{HostAnswer, HostOp};
use rustix::fd::{BorrowedFd, OwnedFd};
use std::io;
use std::ops::ControlFlow;

/// Who does what needs root.
#[derive(Debug)]
pub enum HostSide {
    /// This process, which is root.
    InProcess(Host),
    /// `banger-helper`.
    Helper(HelperClient),
}

impl HostSide {
    /// The root side of this process: itself if it is root, else the helper if there is one, else nobody.
    ///
    /// # Errors
    /// There is a helper, but it does not answer, or has no place for this user within a minute: VMs may live by it.
    pub fn find() -> Result<Option<Self>, HelperError> {
        if rustix::process::geteuid().is_root() {
            return Ok(Some(Self::InProcess(Host::of_this_machine())));
        }
        match HelperClient::connect(HELPER_SOCKET.as_ref()) {
            Ok(client) => Ok(Some(Self::Helper(client))),
            Err(error) if error.says_nobody() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Keeps what was asked for as it is, in a thread of its own, whoever changes the packet filter, default routes or
    /// forwarding: see [`Host::keep`]. Ends when the answer is dropped. Nothing where the helper does this by
    /// itself.
    ///
    /// # Errors
    /// Changes cannot be heard of, or the process is out of threads.
    pub fn keep(
        &self,
        report: impl FnMut(Result<Settled, HostOpError>) -> ControlFlow<()> + Send + 'static,
    ) -> io::Result<Option<Keeping>> {
        match self {
            Self::InProcess(host) => host.keep(report).map(Some),
            Self::Helper(_) => Ok(None),
        }
    }

    /// Does `op` with its descriptors, and answers with what it hands out.
    ///
    /// # Errors
    /// The kernel refuses, the operation is not allowed, or the helper cannot be reached.
    pub fn perform(
        &self,
        op: &HostOp,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(HostAnswer, Vec<OwnedFd>), HostOpError> {
        let perform = || match self {
            Self::InProcess(host) => host.perform(Caller::this_process(), op, descriptors),
            Self::Helper(client) => Ok(client.request(op, descriptors)?),
        };
        if !op.changes_something() {
            return perform();
        }
        point("host", op.name(), Side::Before);
        let performed = perform();
        point("host", op.name(), Side::After);
        performed
    }
}
