//! What every part of the daemon may use.

use crate::config::Config;
use crate::drivers::Drivers;
use crate::events::Hub;
use crate::images::Images;
use crate::instance::Instance;
use crate::names::Names;
use crate::network::Network;
use crate::operations::Operations;
use crate::storage::StorageHost;
use crate::store::Store;
use banger_api::daemon::Mode;
use banger_api::paths::Paths;
use jiff::Timestamp;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tokio::sync::watch;

/// The programs that belong to banger.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    pub(crate) shim: PathBuf,
    pub(crate) keeper: PathBuf,
    pub(crate) init: PathBuf,
}

/// Why it is the mode that it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ModeReason {
    pub(crate) why: String,
    /// What would give a better one.
    pub(crate) hint: Option<&'static str>,
}

impl std::fmt::Display for ModeReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.why)?;
        match self.hint {
            Some(hint) => write!(f, "; {hint}"),
            None => Ok(()),
        }
    }
}

/// What every part of the daemon may use.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) paths: Paths,
    pub(crate) config: Config,
    pub(crate) instance: Instance,
    pub(crate) mode: Mode,
    pub(crate) mode_reason: ModeReason,
    pub(crate) programs: Programs,
    pub(crate) store: Store,
    pub(crate) hub: Hub,
    pub(crate) network: Network,
    pub(crate) names: Names,
    pub(crate) images: Arc<Images>,
    pub(crate) drivers: Drivers,
    pub(crate) storage: StorageHost,
    pub(crate) operations: Arc<Operations>,
    /// The public half of banger's own ssh key.
    pub(crate) authorized_key: String,
    /// Identifies this boot of the host.
    pub(crate) boot_id: String,
    pub(crate) build: String,
    pub(crate) started_at: Timestamp,
    /// What was found and repaired at start-up.
    pub(crate) notices: Vec<String>,
    /// All VMs are being stopped: none may start.
    pub(crate) draining: AtomicBool,
    /// Set once the daemon goes down.
    pub(crate) shutdown: watch::Sender<bool>,
}
