//! The way out of an ordinary user's namespace: `pasta` of the passt project.

use super::keeper::{Keeper, KeeperError};
use std::path::Path;

/// The namespace could not be given a way out.
#[derive(Debug, thiserror::Error)]
pub enum PastaError {
    /// The keeper is gone, or refused.
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    /// Not there yet.
    #[error("a way to the internet without root is not available yet")]
    NotAvailable,
}

/// Gives the namespace of `keeper`, which is in a user namespace, a way to the internet if it has none: starts `helper`
/// (a `banger-netns`), which starts `pasta` outside of the namespace, then has what leaves masqueraded. Both end with
/// the keeper and outlive this process. Takes up to 15 s the first time, and nothing but one request afterwards.
///
/// # Errors
/// `pasta` is not installed or gives up, or the keeper refuses.
pub fn ensure(_keeper: &Keeper, _helper: &Path, _pasta: &Path) -> Result<(), PastaError> {
    Err(PastaError::NotAvailable)
}
