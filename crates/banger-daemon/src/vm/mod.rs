//! One VM: its actor, which alone changes its phase, and what the actor does to the host.
//!
//! ```text
//!   registry --Message--> actor --decide--> start (a plan of steps) --> shim
//!                           ^                stop (ask, wait, end)
//!                           +---- link (events of the shim) ----------> teardown
//! ```

pub(crate) mod actor;
mod boot_material;
pub(crate) mod changing;
mod deleting;
mod ending;
pub(crate) mod files;
mod link;
mod recover;
pub(crate) mod scope;
mod start_plan;
mod starting;
mod stop_reason;
pub(crate) mod teardown;

use crate::images::ImageRecord;
use crate::record::VmRecord;
use crate::world::World;
use banger_api::error::ErrorBody;
use banger_api::vm::{Attempt, BootTimes};
use banger_core::decide::Request;
use banger_core::id::{KernelId, VmId};
use banger_core::name::VmName;
use banger_core::phase::{GoingDown, Phase};
use banger_core::size::DiskBytes;
use banger_core::spec::{Driver, Storage, VmSpecPatch};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};

/// Requests that may wait for one VM.
const INBOX: usize = 32;

/// What is published of a VM; `revision` grows with every change.
#[derive(Debug, Clone)]
pub(crate) struct View {
    pub(crate) record: Arc<VmRecord>,
    pub(crate) phase: Phase,
    pub(crate) revision: u64,
    pub(crate) attempt: Option<Attempt>,
    pub(crate) boot: Option<BootTimes>,
    /// Record and files were removed permanently.
    pub(crate) purged: bool,
}

/// A change of a VM.
#[derive(Debug, Clone, Default)]
pub(crate) struct Change {
    pub(crate) patch: VmSpecPatch,
    /// Another name; whoever asks has made sure that it is free.
    pub(crate) name: Option<VmName>,
    /// Another image, which the VM's actor pins; its overlay is thrown away.
    pub(crate) image: Option<Box<ImageRecord>>,
    /// Another kernel, which the VM's actor pins.
    pub(crate) kernel: Option<KernelId>,
    /// A larger overlay.
    pub(crate) overlay_bytes: Option<DiskBytes>,
    /// A larger work disk.
    pub(crate) disk_bytes: Option<DiskBytes>,
    /// The generation that the change is based on.
    pub(crate) generation: Option<u64>,
}

impl Change {
    /// The request that it comes with.
    pub(crate) fn request(&self) -> Request {
        Request::Set {
            live: self.patch.is_live()
                && self.image.is_none()
                && self.kernel.is_none()
                && self.overlay_bytes.is_none()
                && self.disk_bytes.is_none(),
        }
    }
}

/// A request with what belongs to it.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    pub(crate) request: Request,
    /// How long a stop may take.
    pub(crate) timeout: Duration,
    /// For [`Request::Set`].
    pub(crate) change: Change,
    /// For [`Request::Reset`]: another storage driver, and why.
    pub(crate) storage: Option<(Storage, String)>,
    /// For [`Request::Undelete`]: the name from now on.
    pub(crate) name: Option<VmName>,
    /// For a purge that nobody asked of this very VM: only if it has been in the trash since then or before.
    pub(crate) trashed_until: Option<Timestamp>,
    /// For [`Request::Pause`] and [`Request::Resume`]: asked by the daemon, because the host has no room, or has it
    /// again.
    pub(crate) for_room: bool,
    /// For [`Request::Stop`] and [`Request::Kill`]: not for good, but because of this.
    pub(crate) going_down: Option<GoingDown>,
}

impl Ask {
    /// How long a guest may take to shut down.
    pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(30);

    pub(crate) fn new(request: Request) -> Self {
        Self {
            request,
            timeout: Self::STOP_TIMEOUT,
            change: Change::default(),
            storage: None,
            name: None,
            trashed_until: None,
            for_room: false,
            going_down: None,
        }
    }
}

/// The answer to an [`Ask`].
pub(crate) type Answer = Result<View, ErrorBody>;

#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) ask: Ask,
    pub(crate) reply: oneshot::Sender<Answer>,
}

/// The way to a VM's actor.
#[derive(Debug, Clone)]
pub(crate) struct Handle {
    pub(crate) id: VmId,
    inbox: mpsc::Sender<Message>,
    pub(crate) view: watch::Receiver<View>,
}

impl Handle {
    /// Of a VM without an actor.
    #[cfg(test)]
    pub(crate) fn deaf(id: VmId, view: watch::Receiver<View>) -> Self {
        let (inbox, _) = mpsc::channel(1);
        Self { id, inbox, view }
    }

    /// Asks, and waits for the answer.
    pub(crate) async fn ask(&self, ask: Ask) -> Answer {
        use banger_api::error::ErrorCode;
        let gone = || ErrorBody::new(ErrorCode::NotFound, format!("the VM {} is gone", self.id));
        let (reply, answer) = oneshot::channel();
        self.inbox
            .send(Message { ask, reply })
            .await
            .map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// The latest view.
    pub(crate) fn latest(&self) -> View {
        self.view.borrow().clone()
    }
}

/// `run/attempt.json`: the volatile facts of one run, void after a reboot of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AttemptFile {
    /// Identifies the run.
    pub(crate) attempt: String,
    /// The boot of the host in which it was made.
    pub(crate) boot_id: String,
    pub(crate) driver: Driver,
    pub(crate) accelerator: String,
    pub(crate) reason: String,
    pub(crate) generation: u64,
    pub(crate) started_at: Timestamp,
    /// Between the request and the VMM's exec, in milliseconds.
    pub(crate) lead_ms: u64,
}

impl AttemptFile {
    /// Stands for an attempt whose file is gone or cannot be read.
    fn unknown(world: &World, record: &VmRecord) -> Self {
        Self {
            attempt: String::new(),
            boot_id: world.boot_id.clone(),
            driver: Driver::Qemu,
            accelerator: String::new(),
            reason: "found running".to_owned(),
            generation: record.generation,
            started_at: Timestamp::now(),
            lead_ms: 0,
        }
    }

    fn is_known(&self) -> bool {
        !self.attempt.is_empty()
    }

    fn to_api(&self) -> Attempt {
        Attempt {
            driver: self.driver,
            accelerator: self.accelerator.clone(),
            reason: self.reason.clone(),
            vmm_pid: None,
            shim_pid: None,
            sandbox: Vec::new(),
            sandbox_missing: Vec::new(),
            generation: self.generation,
        }
    }
}
