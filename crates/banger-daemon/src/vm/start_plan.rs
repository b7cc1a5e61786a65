//! The plan of a start: steps, each announced and noted in the journal. Some of them run side by side. The plan undoes
//! nothing: after a failure its caller tears down ([`super::teardown::unwind`]).

use super::boot_material::{Opened, open_files, write_boot};
use super::files::{self, VmFiles};
use super::link::Link;
use super::{AttemptFile, scope};
use crate::blocking::blocking;
use crate::crash::{Side, point};
use crate::images::store_error;
use crate::network::{Lease, network_error};
use crate::record::VmRecord;
use crate::world::World;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_core::name::VmName;
use banger_core::phase::StartStep;
use banger_host::systemd::Systemd;
use banger_vmm::launch::{self, SpawnError, Waiting};
use banger_vmm::lock::{Locked, try_lock};
use banger_vmm::protocol::{Descriptor, Launch, Launched, Status};
use banger_vmm::sandbox::Applied;
use std::os::fd::AsFd;
use std::process::Child;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// A start that succeeded: the VMM runs.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) attempt: AttemptFile,
    pub(super) link: Link,
    pub(super) status: Status,
    pub(super) shim: Child,
}

/// A start that did not.
#[derive(Debug)]
pub(super) struct StartError {
    pub(super) step: StartStep,
    pub(super) error: ErrorBody,
    pub(super) cancelled: bool,
}

/// A shim that waits for its launch, and what became of its cgroup.
struct Placed {
    waiting: Result<Waiting, SpawnError>,
    cgroup: Option<Applied>,
}

/// What a start works on.
pub(super) struct StartPlan {
    pub(super) world: Arc<World>,
    /// As it is once [`StartPlan::run`] has stored it.
    pub(super) record: Arc<VmRecord>,
    /// The VM was not to run until now: nothing runs, and nobody is answered, before the row says that it is.
    pub(super) desired_is_new: bool,
    pub(super) asked_at: Instant,
    pub(super) steps: watch::Sender<StartStep>,
    pub(super) cancel: CancellationToken,
}

impl StartPlan {
    fn files(&self) -> VmFiles {
        VmFiles::of(&self.world.paths, self.record.id)
    }

    /// Runs all steps. After an error the host still holds what was made: the caller tears down.
    pub(super) async fn run(self) -> Result<Started, StartError> {
        // A program's start takes time: by when it is known what the shim is to do, it waits for it.
        let program = self.world.programs.shim.clone();
        let waiting = tokio::task::spawn_blocking(move || launch::spawn(&program));
        let lock = self.step(StartStep::TakeLock, self.take_lock()).await?;
        // They wait for different things: the disk, the network's actor, files, systemd. Each is waited for, also after
        // another has failed, so that a teardown meets nothing half done.
        let (stored, lease, boot, placed) = tokio::join!(
            async {
                match self.desired_is_new {
                    true => {
                        self.step(StartStep::StoreDesired, self.store_desired())
                            .await
                    }
                    false => Ok(()),
                }
            },
            self.step(StartStep::LeasePort, self.lease_port()),
            async {
                let opened = self.step(StartStep::OpenFiles, self.open_files()).await?;
                self.step(StartStep::WriteBoot, self.write_boot(&opened))
                    .await
            },
            self.place(waiting)
        );
        let ((), lease, (attempt, launched), placed) = (stored?, lease?, boot?, placed?);
        let shim = self
            .step(
                StartStep::LaunchShim,
                self.launch(placed, lock, lease, launched),
            )
            .await?;
        let connected = self.step(StartStep::ProveLife, self.prove_life()).await;
        match connected {
            Ok((link, status)) => Ok(Started {
                attempt,
                link,
                status,
                shim,
            }),
            Err(error) => {
                reap(shim);
                Err(error)
            }
        }
    }

    async fn step<T>(
        &self,
        step: StartStep,
        work: impl Future<Output = Result<T, ErrorBody>>,
    ) -> Result<T, StartError> {
        self.steps.send_replace(step);
        if self.cancel.is_cancelled() {
            return Err(StartError {
                step,
                error: start_cancelled(&self.record.name),
                cancelled: true,
            });
        }
        point("start", step.name(), Side::Before);
        let begun = Instant::now();
        let outcome = work.await;
        let took = begun.elapsed();
        let message = match &outcome {
            Ok(_) => step.name().to_owned(),
            Err(error) => format!("{} failed: {}", step.name(), error.message),
        };
        super::actor::note(&self.world, self.record.id, "start", message, Some(took));
        point("start", step.name(), Side::After);
        outcome.map_err(|error| StartError {
            step,
            error,
            cancelled: false,
        })
    }

    /// Makes it durable that the VM is to run.
    async fn store_desired(&self) -> Result<(), ErrorBody> {
        let stored = self.world.store.update_vm((*self.record).clone()).await;
        stored.map_err(|error| store_error(&error))
    }

    async fn take_lock(&self) -> Result<Locked, ErrorBody> {
        let files = self.files();
        blocking(move || try_lock(&files.lock()))
            .await?
            .map_err(|error| files::lock_error(&self.record.name, "start", &error))
    }

    async fn open_files(&self) -> Result<Opened, ErrorBody> {
        let (world, record, files) = (
            Arc::clone(&self.world),
            Arc::clone(&self.record),
            self.files(),
        );
        blocking(move || open_files(&world, &record, &files)).await?
    }

    async fn lease_port(&self) -> Result<Lease, ErrorBody> {
        let leased = self.world.network.lease(self.record.port_plan()).await;
        let lease = leased.map_err(|error| network_error(&error))?;
        for problem in &lease.problems {
            let why = banger_host::error_chain(problem);
            super::actor::note(&self.world, self.record.id, "network", why, None);
        }
        Ok(lease)
    }

    async fn write_boot(&self, opened: &Opened) -> Result<(AttemptFile, Launch), ErrorBody> {
        let world = Arc::clone(&self.world);
        let (record, files, opened, asked_at) = (
            Arc::clone(&self.record),
            self.files(),
            opened.clone(),
            self.asked_at,
        );
        blocking(move || write_boot(&world, &record, &files, &opened, asked_at)).await?
    }

    /// Puts the waiting shim into a scope of its own, where there is a systemd; without one, and without a limit to
    /// enforce, this is no step.
    async fn place(
        &self,
        waiting: JoinHandle<Result<Waiting, SpawnError>>,
    ) -> Result<Placed, StartError> {
        let waiting = waiting.await.map_err(|error| StartError {
            step: StartStep::LaunchShim,
            error: ErrorBody::from_error(ErrorCode::Internal, &error),
            cancelled: false,
        })?;
        let systemd = Systemd::nearest();
        let shim = waiting.as_ref().ok().and_then(Waiting::pid);
        let cgroup = match shim {
            Some(shim) if systemd.is_some() || self.record.spec.cpu_limit.is_some() => {
                let (instance, record) = (self.world.instance.id, Arc::clone(&self.record));
                let make = blocking(move || scope::make(systemd.as_ref(), instance, &record, shim));
                self.step(StartStep::MakeScope, async { make.await? })
                    .await?
            }
            // That the shim did not start is reported by the step that needs it.
            _ => None,
        };
        Ok(Placed { waiting, cgroup })
    }

    async fn launch(
        &self,
        Placed { waiting, cgroup }: Placed,
        lock: Locked,
        lease: Lease,
        prepared: Launch,
    ) -> Result<Child, ErrorBody> {
        let name = self.record.name.clone();
        blocking(move || {
            let mut roles = vec![Descriptor::Lock, Descriptor::Keepalive];
            let mut descriptors = vec![lock.as_fd(), lease.keepalive.as_fd()];
            if let Some(user) = &lease.user_namespace {
                roles.push(Descriptor::UserNamespace);
                descriptors.push(user.as_fd());
            }
            roles.push(Descriptor::NetworkNamespace);
            descriptors.push(lease.network_namespace.as_fd());
            let launch = Launch {
                descriptors: roles,
                cgroup,
                ..prepared
            };
            let failed = |message: String| {
                ErrorBody::new(ErrorCode::StartFailed, message).hint(format!(
                    "`banger vm logs --vmm {name}` shows what the VMM said"
                ))
            };
            let launched = waiting.and_then(|waiting| waiting.launch(&launch, &descriptors));
            match launched {
                Ok((Launched::Running { .. }, Some(child))) => Ok(child),
                Ok((Launched::Running { .. }, None)) => {
                    Err(failed(format!("the shim of VM `{name}` is gone")))
                }
                Ok((Launched::Failed { error, stderr }, _)) => {
                    let mut body = failed(format!("the VMM of VM `{name}` did not start"));
                    body.causes.push(error);
                    body.causes
                        .extend(stderr.lines().rev().take(3).map(str::to_owned));
                    Err(body)
                }
                Err(error) => {
                    Err(failed(format!("the shim of VM `{name}` did not start")).caused_by(&error))
                }
            }
        })
        .await?
    }

    async fn prove_life(&self) -> Result<(Link, Status), ErrorBody> {
        Link::connect(&self.files().shim_socket())
            .await
            .map_err(|error| {
                ErrorBody::new(
                    ErrorCode::StartFailed,
                    format!("the shim of VM `{}` does not answer", self.record.name),
                )
                .caused_by(&error)
            })
    }
}

/// The answer to who asked for a start that was cancelled.
pub(super) fn start_cancelled(name: &VmName) -> ErrorBody {
    let message = format!("the start of VM `{name}` was cancelled");
    ErrorBody::new(ErrorCode::Cancelled, message)
}

/// Waits for a shim that has ended or is about to.
pub(super) fn reap(mut shim: Child) {
    tokio::task::spawn_blocking(move || shim.wait());
}
