//! The plan of a start: steps in order, each announced, each with a way back by total teardown.

use super::files::{self, VmFiles, io_error};
use super::link::Link;
use super::{AttemptFile, teardown};
use crate::crash::{Side, point};
use crate::drivers::{Chosen, accelerator_name};
use crate::images::{build_error, store_error};
use crate::keys;
use crate::network::{Lease, network_error};
use crate::record::VmRecord;
use crate::storage::{self, Layer, RootDrive};
use crate::world::World;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_core::phase::StartStep;
use banger_guest::boot_config::{BootConfig, Drive, DriveRole, Network};
use banger_host::storage::replace_unsynced;
use banger_image::image::ImageManifest;
use banger_image::kernel;
use banger_image::kernel::KernelManifest;
use banger_vmm::driver::{DriveConfig, MachineConfig, NicConfig, Plan};
use banger_vmm::launch::{self, SpawnError, Waiting};
use banger_vmm::lock::{LockError, Locked, try_lock};
use banger_vmm::protocol::{Descriptor, Launch, Launched, Ring, Status};
use banger_vmm::qemu::args::find_firmware;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Child;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// What the console may take on disk, in bytes.
const CONSOLE_BYTES: u64 = 4 << 20;
/// What the VMM's log may take on disk, in bytes.
const LOG_BYTES: u64 = 1 << 20;
/// What the VMM's metrics may take on disk, in bytes.
const METRICS_BYTES: u64 = 256 << 10;
/// The guest's vsock address. Firecracker's vsock is a Unix socket, so it need not be unique on the host.
const CID: u32 = 3;
/// Where a work disk is mounted.
const DISK_AT: &str = "/data";

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

/// Whether the row says already that the VM is to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// It does.
    Stored,
    /// It is stored while the first steps are done: nothing runs, and nobody is answered, before it is durable.
    New,
}

/// What a start works on.
pub(super) struct StartPlan {
    pub(super) world: Arc<World>,
    /// As it is once [`StartPlan::run`] has stored it.
    pub(super) record: Arc<VmRecord>,
    /// Whether it is to be stored: the wish that the VM runs is a new one.
    pub(super) wish: Wish,
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
        // The three wait for different things: the disk, the network's actor, files. Each is waited for, also after
        // another has failed, so that a teardown meets nothing half done.
        let (stored, lease, boot) = tokio::join!(
            self.store_wish(),
            self.step(StartStep::LeasePort, self.lease_port()),
            async {
                let opened = self.step(StartStep::OpenFiles, self.open_files()).await?;
                self.step(StartStep::WriteBoot, self.write_boot(&opened))
                    .await
            }
        );
        let ((), lease, (attempt, launched)) = (stored?, lease?, boot?);
        let shim = self
            .step(
                StartStep::LaunchShim,
                self.launch(waiting, lock, lease, launched),
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
            let error = ErrorBody::new(
                ErrorCode::Cancelled,
                format!("the start of `{}` was cancelled", self.record.name),
            );
            return Err(StartError {
                step,
                error,
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

    /// Makes the wish that the VM runs durable.
    async fn store_wish(&self) -> Result<(), StartError> {
        if self.wish == Wish::Stored {
            return Ok(());
        }
        point("start", "desired", Side::Before);
        let stored = self.world.store.update_vm((*self.record).clone()).await;
        point("start", "desired", Side::After);
        stored.map_err(|error| StartError {
            step: StartStep::StoreDesired,
            error: store_error(&error),
            cancelled: false,
        })
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

    async fn launch(
        &self,
        waiting: JoinHandle<Result<Waiting, SpawnError>>,
        lock: Locked,
        lease: Lease,
        prepared: Launch,
    ) -> Result<Child, ErrorBody> {
        let waiting = waiting
            .await
            .map_err(|error| ErrorBody::from_error(ErrorCode::Internal, &error))?;
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
                    Err(failed(format!("the shim of `{name}` is gone")))
                }
                Ok((Launched::Failed { error, stderr }, _)) => {
                    let mut body = failed(format!("the VMM of `{name}` did not start"));
                    body.causes.push(error);
                    body.causes
                        .extend(stderr.lines().rev().take(3).map(str::to_owned));
                    Err(body)
                }
                Err(error) => {
                    Err(failed(format!("the shim of `{name}` did not start")).caused_by(&error))
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
                    format!("the shim of `{}` does not answer", self.record.name),
                )
                .caused_by(&error)
            })
    }
}

/// Waits for a shim that has ended or is about to.
pub(super) fn reap(mut shim: Child) {
    tokio::task::spawn_blocking(move || shim.wait());
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ErrorBody> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| ErrorBody::from_error(ErrorCode::Internal, &error))
}

/// What a VM boots from, all of it checked.
#[derive(Debug, Clone)]
struct Opened {
    root: RootDrive,
    kernel: PathBuf,
    initrd: PathBuf,
    modules: PathBuf,
    modules_uuid: String,
    init: String,
}

fn open_files(world: &World, record: &VmRecord, files: &VmFiles) -> Result<Opened, ErrorBody> {
    let missing = |what: &str, id: String| {
        ErrorBody::new(
            ErrorCode::NotFound,
            format!("the {what} {id} of `{}` is gone", record.name),
        )
        .hint(format!("`banger {what} list` shows those that are there"))
    };
    let image = world
        .images
        .by_id::<ImageManifest>(record.spec.image)
        .ok_or_else(|| missing("image", record.spec.image.to_string()))?
        .manifest;
    let kernel = world
        .images
        .by_id::<KernelManifest>(record.spec.kernel)
        .ok_or_else(|| missing("kernel", record.spec.kernel.to_string()))?
        .manifest;
    let kernel_folder = world.images.folder::<KernelManifest>(kernel.id);
    kernel::refresh_initrd(&kernel_folder, &world.programs.init)
        .map_err(|error| build_error(&error))?;
    let layer = Layer::of(world, record, files)?;
    let root = world.storage.driver(record.spec.storage).open(&layer)?;
    if let (Some(uuid), Some(bytes)) = (record.disk_uuid, record.spec.disk_bytes) {
        storage::open_disk(&layer, &files.disk(), uuid, bytes.get())?;
    }
    let opened = Opened {
        root,
        kernel: kernel_folder.join(kernel::VMLINUX),
        initrd: kernel_folder.join(kernel::INITRD),
        modules: kernel_folder.join(kernel::MODULES_IMAGE),
        modules_uuid: kernel.modules_uuid,
        init: image.init,
    };
    for path in [
        &layer.image,
        &opened.kernel,
        &opened.initrd,
        &opened.modules,
    ] {
        std::fs::File::open(path).map_err(|error| io_error("open", path, &error))?;
    }
    Ok(opened)
}

fn write_boot(
    world: &World,
    record: &VmRecord,
    files: &VmFiles,
    opened: &Opened,
    asked_at: Instant,
) -> Result<(AttemptFile, Launch), ErrorBody> {
    let Chosen {
        vmm,
        accelerator,
        reason,
    } = world
        .drivers
        .choose(record.spec.driver, Some(&opened.kernel))?;
    let run = files.run();
    // What an earlier attempt left is void: the lock is ours.
    match std::fs::remove_dir_all(&run) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(io_error("remove", &run, &error));
        }
        _ => {}
    }
    let vmm_folder = files.vmm_folder();
    files::make_folder(&vmm_folder).map_err(|error| io_error("make", &vmm_folder, &error))?;
    let (drives, drives_in_guest) = drives(record, files, opened).into_iter().unzip();
    let config = boot_config(world, record, opened, drives_in_guest)?;
    let drive = config
        .to_drive()
        .map_err(|error| ErrorBody::from_error(ErrorCode::Internal, &error))?;
    write_new(&files.config_drive(), &drive)?;
    let machine = machine(record, files, opened, drives, accelerator);
    let plan = vmm
        .plan(&machine)
        .map_err(|error| ErrorBody::from_error(ErrorCode::StartFailed, &error))?;
    for (path, bytes) in &plan.files {
        write_new(path, bytes)?;
    }
    let attempt = AttemptFile {
        attempt: Uuid::now_v7().to_string(),
        boot_id: world.boot_id.clone(),
        driver: vmm.driver(),
        accelerator: accelerator_name(accelerator).to_owned(),
        reason,
        generation: record.generation,
        started_at: jiff::Timestamp::now(),
        lead_ms: u64::try_from(asked_at.elapsed().as_millis()).unwrap_or(u64::MAX),
    };
    let json = serde_json::to_vec(&attempt).expect("an attempt is plain data");
    replace_unsynced(&files.attempt(), &json, 0o600)
        .map_err(|error| io_error("write", &files.attempt(), &error))?;
    if let Err(error) = record.mirror(&files.folder, Some(mirrored_plan(&plan))) {
        tracing::warn!(vm = %record.id, %error, "vm.json was not written");
    }
    let launch = Launch {
        vm: record.id.to_string(),
        attempt: attempt.attempt.clone(),
        descriptors: Vec::new(),
        program: plan.program,
        args: plan.args,
        control: plan.control,
        sandbox: plan.sandbox,
        shim_socket: files.shim_socket(),
        console: Ring {
            path: files.console(),
            max_bytes: CONSOLE_BYTES,
        },
        log: Ring {
            path: files.vmm_log(),
            max_bytes: LOG_BYTES,
        },
        metrics: Ring {
            path: files.metrics(),
            max_bytes: METRICS_BYTES,
        },
        exit_file: files.exit(),
    };
    Ok((attempt, launch))
}

/// The raw configuration given to the VMM, for `vm.json`.
fn mirrored_plan(plan: &Plan) -> serde_json::Value {
    let files: serde_json::Map<String, serde_json::Value> = plan
        .files
        .iter()
        .map(|(path, bytes)| {
            let content = serde_json::from_slice(bytes)
                .unwrap_or_else(|_| String::from_utf8_lossy(bytes).into_owned().into());
            (path.display().to_string(), content)
        })
        .collect();
    serde_json::json!({ "program": plan.program, "args": plan.args, "files": files })
}

fn write_new(path: &std::path::Path, bytes: &[u8]) -> Result<(), ErrorBody> {
    replace_unsynced(path, bytes, 0o600).map_err(|error| io_error("write", path, &error))
}

/// The machine's drives in the guest's order: what the VMM opens, and what the guest does with it.
fn drives(record: &VmRecord, files: &VmFiles, opened: &Opened) -> Vec<(DriveConfig, Drive)> {
    let drive = |role, path, uuid, read_only, grow| {
        let in_guest = Drive {
            role,
            uuid,
            read_only,
            grow,
            mount_at: (role == DriveRole::Disk).then(|| DISK_AT.to_owned()),
        };
        (DriveConfig { path, read_only }, in_guest)
    };
    let root = &opened.root;
    let root_uuid = Some(root.uuid.clone());
    let modules_uuid = Some(opened.modules_uuid.clone());
    let mut drives = vec![
        drive(
            DriveRole::Root,
            root.path.clone(),
            root_uuid,
            !root.own,
            root.own,
        ),
        drive(
            DriveRole::Modules,
            opened.modules.clone(),
            modules_uuid,
            true,
            false,
        ),
        drive(DriveRole::Config, files.config_drive(), None, true, false),
    ];
    if let Some((path, uuid)) = &root.overlay {
        let uuid = Some(uuid.to_string());
        drives.push(drive(DriveRole::Overlay, path.clone(), uuid, false, false));
    }
    if let Some(uuid) = record.disk_uuid {
        let uuid = Some(uuid.to_string());
        drives.push(drive(DriveRole::Disk, files.disk(), uuid, false, true));
    }
    drives
}

fn machine(
    record: &VmRecord,
    files: &VmFiles,
    opened: &Opened,
    drives: Vec<DriveConfig>,
    accelerator: banger_vmm::driver::Accelerator,
) -> MachineConfig {
    MachineConfig {
        id: record.id.to_string(),
        name: record.name.to_string(),
        vcpus: record.spec.vcpus.get().into(),
        memory_mib: record.spec.memory_mib.get().into(),
        kernel: opened.kernel.clone(),
        initrd: opened.initrd.clone(),
        kernel_args: Vec::new(),
        drives,
        nic: Some(NicConfig {
            tap: record.id.tap_name(),
            mac: record.id.mac().to_string(),
        }),
        run_dir: files.vmm_folder(),
        accelerator,
        cid: CID,
        firmware: find_firmware(),
    }
}

fn boot_config(
    world: &World,
    record: &VmRecord,
    opened: &Opened,
    drives: Vec<Drive>,
) -> Result<BootConfig, ErrorBody> {
    let seed: [u8; 32] =
        keys::random().map_err(|error| ErrorBody::from_error(ErrorCode::Internal, &error))?;
    let pool = world.instance.pool;
    Ok(BootConfig {
        hostname: record.name.to_string(),
        vm_id: record.id.as_uuid().simple().to_string(),
        authorized_keys: vec![world.authorized_key.clone()],
        host_key: record.host_key.clone(),
        host_key_public: record.host_key_public.clone(),
        network: Some(Network {
            mac: record.id.mac().to_string(),
            address: record.address,
            prefix: pool.guests().prefix(),
            gateway: pool.gateway(),
            dns: vec![pool.gateway()],
        }),
        seed: seed.iter().map(|byte| format!("{byte:02x}")).collect(),
        time: jiff::Timestamp::now().as_second(),
        drives,
        init: opened.init.clone(),
    })
}

/// After a failed start: no process and no port of it is left. The attempt's folder stays until the reason is recorded.
///
/// # Errors
/// A process of the VM does not die.
pub(super) async fn unwind(
    world: &Arc<World>,
    record: &VmRecord,
) -> Result<Vec<String>, LockError> {
    let lock = VmFiles::of(&world.paths, record.id).lock();
    let path = lock.clone();
    let ended = tokio::task::spawn_blocking(move || {
        teardown::end_processes(&path, std::time::Duration::ZERO)
    });
    let _lock = ended.await.unwrap_or_else(|_| Err(LockError::Held(lock)))?;
    let closed = teardown::close_storage(world, record, "unwind").await;
    let released = teardown::release_port(world, record.id, "unwind").await;
    Ok(closed.into_iter().chain(released).collect())
}
