//! What a VM boots from: its files opened and checked, and what the VMM and the guest are given, written into `run/`.

use super::AttemptFile;
use super::files::{self, VmFiles, io_error};
use crate::drivers::{Chosen, accelerator_name};
use crate::images::build_error;
use crate::keys;
use crate::record::VmRecord;
use crate::storage::{self, Layer, RootDrive};
use crate::world::World;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_core::spec::DriverChoice;
use banger_guest::boot_config::{BootConfig, Drive, DriveRole, Network};
use banger_host::storage::replace_unsynced;
use banger_image::image::ImageManifest;
use banger_image::kernel;
use banger_image::kernel::KernelManifest;
use banger_vmm::driver::{Accelerator, DriveConfig, MachineConfig, NicConfig, Plan};
use banger_vmm::protocol::{Launch, Ring};
use banger_vmm::qemu::args::find_firmware;
use std::path::{Path, PathBuf};
use std::time::Instant;
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

/// What a VM boots from, all of it checked.
#[derive(Debug, Clone)]
pub(super) struct Opened {
    root: RootDrive,
    kernel: PathBuf,
    initrd: PathBuf,
    modules: PathBuf,
    modules_uuid: String,
    init: String,
}

/// Checks all that the VM boots from, and has its storage driver attach the layer.
pub(super) fn open_files(
    world: &World,
    record: &VmRecord,
    files: &VmFiles,
) -> Result<Opened, ErrorBody> {
    let missing = |what: &str, id: String| {
        ErrorBody::new(
            ErrorCode::NotFound,
            format!("the {what} {id} of VM `{}` is gone", record.name),
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

/// Writes config drive, VMM configuration and attempt file. Answers the attempt, and what the shim is to start.
pub(super) fn write_boot(
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
        .choose(record.spec.driver, Some(&opened.kernel))
        .map_err(|error| match record.spec.driver {
            DriverChoice::Auto => error,
            asked if asked == world.config.driver.choice => error,
            asked => error.hint(format!(
                "VM `{0}` is set to {1}: `banger vm start {0} --driver auto` lets another VMM run it",
                record.name,
                asked.name()
            )),
        })?;
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
        cgroup: None,
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

fn write_new(path: &Path, bytes: &[u8]) -> Result<(), ErrorBody> {
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
        drives.push(drive(DriveRole::Overlay, path.clone(), uuid, false, true));
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
    accelerator: Accelerator,
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
