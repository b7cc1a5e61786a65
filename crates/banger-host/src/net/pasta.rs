//! The way out of an ordinary user's namespace: `pasta` of the passt project.

use super::keeper::{self, Keeper, KeeperError};
use crate::op::{NamespaceAnswer, NamespaceOp};
use std::ffi::OsStr;
use std::path::Path;

/// The namespace could not be given a way out.
#[derive(Debug, thiserror::Error)]
pub enum PastaError {
    /// The keeper is gone, or refused.
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    /// `pasta` gave up.
    #[error("cannot give the guests a way to the internet: {why}")]
    Failed {
        /// What it said.
        why: String,
    },
    /// With root the way out is the veth.
    #[error("the namespace has no user namespace: its way out is the host's veth, not `pasta`")]
    NotRootless,
    /// It says that it is ready, and the namespace has nothing.
    #[error("`pasta` is ready, but the namespace has no default route through it")]
    NoRoute,
}

/// Gives the namespace of `keeper`, which is in a user namespace, a way to the internet if it has none: starts `helper`
/// (a `banger-netns`), which starts `pasta` outside of the namespace, then has what leaves masqueraded. Both end with
/// the keeper and outlive this process. Takes up to 10 s the first time, and one request afterwards.
///
/// # Errors
/// `pasta` is not installed or gives up, or the keeper refuses.
pub fn ensure(keeper: &Keeper, helper: &Path, pasta: &Path) -> Result<(), PastaError> {
    if is_ready(keeper)? {
        return Ok(());
    }
    let pid = match keeper.request(NamespaceOp::Hello)?.0 {
        NamespaceAnswer::Hello {
            pid,
            user_namespace: true,
            ..
        } => pid.to_string(),
        _ => return Err(PastaError::NotRootless),
    };
    let args = [
        OsStr::new("--way-out-of"),
        OsStr::new(&pid),
        OsStr::new("--pasta"),
        pasta.as_os_str(),
    ];
    keeper::start(helper, &args).map_err(|error| match error {
        KeeperError::NotReady { why } => PastaError::Failed { why },
        error => PastaError::Keeper(error),
    })?;
    if is_ready(keeper)? {
        Ok(())
    } else {
        Err(PastaError::NoRoute)
    }
}

fn is_ready(keeper: &Keeper) -> Result<bool, KeeperError> {
    let (answer, _) = keeper.request(NamespaceOp::EnsureWayOut)?;
    Ok(answer == NamespaceAnswer::WayOut { ready: true })
}
