//! Host operations in this process, which is root.

use crate::net::host::{self, HostOpError};
use crate::op::{HostAnswer, HostOp};
use rustix::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;

/// Where the machine's own facts about our objects are. Gone after a reboot, as the objects are.
const RUN_FOLDER: &str = "/run/banger";

/// For whom an operation is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// The user's id: objects carry it.
    pub uid: u32,
}

impl Caller {
    /// This process itself.
    pub fn this_process() -> Self {
        Self {
            uid: rustix::process::geteuid().as_raw(),
        }
    }
}

/// The host as this process, which is root, changes it.
#[derive(Debug)]
pub struct Host {
    folder: PathBuf,
}

impl Host {
    /// The machine that this process runs on.
    pub fn of_this_machine() -> Self {
        Self::with_folder(RUN_FOLDER.into())
    }

    /// One whose facts are in `folder`, made when needed, for root alone.
    pub fn with_folder(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Does `op` for `caller`.
    ///
    /// # Errors
    /// The kernel refuses, or the caller may not do this.
    pub fn perform(
        &self,
        _caller: Caller,
        op: &HostOp,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(HostAnswer, Vec<OwnedFd>), HostOpError> {
        let _ = &self.folder;
        if descriptors.len() != op.descriptors() {
            return Err(HostOpError::Descriptors {
                operation: op.name(),
                wanted: op.descriptors(),
                given: descriptors.len(),
            });
        }
        let answer = match op {
            HostOp::Hello {} => HostAnswer::Hello {
                pid: rustix::process::getpid().as_raw_nonzero().get(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
            },
            HostOp::AttachVeth { .. } | HostOp::DetachVeth { .. } => {
                host::perform(op, descriptors.first().copied())?;
                HostAnswer::Done
            }
            HostOp::EnsureNat { .. }
            | HostOp::RemoveNat { .. }
            | HostOp::EnsureResolved { .. }
            | HostOp::RemoveResolved { .. }
            | HostOp::ListOwned {} => return Err(HostOpError::NotYet(op.name())),
        };
        Ok((answer, Vec::new()))
    }
}
