//! A device-mapper snapshot of the image: the image below, what the VM writes in a file of its own.
//!
//! The kernel invalidates a snapshot permanently when its copy-on-write file is full or cannot be written. So the room
//! in that file is reserved on the host before the kernel sees it, it grows long before it is full
//! ([`Snapshot::tend`]), and where it cannot grow the VM is paused.

use super::{
    Layer, Owner, RootDrive, StorageDriver, StorageFacts, made_over_another, make_durable,
    remove_if_there,
};
use crate::vm::files::io_error;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_core::id::{InstanceId, VmId};
use banger_core::watermark::{
    CowVerdict, UNLIMITED_WRITES, cow, cow_first, cow_most, cow_must_pause, cow_next_check_ms,
    cow_safe_ms,
};
use banger_host::host_side::HostSide;
use banger_host::op::{HostAnswer, HostOp, SnapshotState};
use banger_host::storage::{
    StorageError, create_sparse, ops, preallocate, write_at_start, write_in_place,
};
use banger_image::template;
use std::collections::{BTreeSet, HashSet};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use uuid::Uuid;

const SECTOR: u64 = 512;
/// How a copy-on-write file begins; after that come zeros, which hold no chunk. The kernel would write the same, but so
/// a file that lost its content is told from one that is fresh.
const HEADER: [u8; 16] = *b"SnAp\x01\0\0\0\x01\0\0\0\x08\0\0\0";
const MAGIC: std::ops::Range<usize> = 0..4;
const _: () = assert!(HEADER[12] as u64 == ops::CHUNK_SECTORS);

/// Where udev is told what to leave alone.
const RULES: [&str; 5] = [
    "/etc/udev/rules.d",
    "/run/udev/rules.d",
    "/usr/local/lib/udev/rules.d",
    "/usr/lib/udev/rules.d",
    "/lib/udev/rules.d",
];
/// The file that tells it.
const RULES_FILE: &str = "60-banger.rules";
/// There while udev runs.
const UDEV: &str = "/run/udev/control";

/// Snapshots, made by whoever was found to do what needs root when the daemon came up.
#[derive(Debug)]
pub(crate) struct Snapshot {
    side: Option<Arc<HostSide>>,
    /// Looked at only when it is asked for: it may load a module.
    possible: OnceLock<Result<(), String>>,
}

impl StorageDriver for Snapshot {
    fn judge(&self, facts: &StorageFacts) -> Result<String, String> {
        facts.own_blocks.clone()?;
        self.possible.get_or_init(|| self.look()).clone()?;
        Ok("snapshot, this host has device-mapper".to_owned())
    }

    fn create(&self, layer: &Layer) -> Result<(), ErrorBody> {
        let (path, first) = (&layer.file, cow_first(device_bytes(layer)?));
        let file = create_sparse(path, 0, 0o600).map_err(|error| storage_error(&error))?;
        let filled = write_in_place(&file, path)
            .and_then(|()| preallocate(&file, path, first))
            .and_then(|()| write_at_start(&file, path, &HEADER));
        filled.map_err(|error| {
            // Without its room it is of no use; the first failure is what counts.
            let _ = std::fs::remove_file(path);
            storage_error(&error)
        })
    }

    fn open(&self, layer: &Layer) -> Result<RootDrive, ErrorBody> {
        made_over_another(layer)?;
        ensure_cow(self, layer)?;
        let image = open_file(OpenOptions::new().read(true), &layer.image)?;
        let cow = open_file(OpenOptions::new().read(true).write(true), &layer.file)?;
        let attach = HostOp::AttachSnapshot {
            instance: layer.owner.instance,
            vm: layer.owner.vm,
            sectors: device_bytes(layer)? / SECTOR,
        };
        let HostAnswer::Device { path } = self.ask(&attach, &[image.as_fd(), cow.as_fd()])? else {
            return Err(misunderstood());
        };
        let path = PathBuf::from(path);
        let whole = prove(layer, &path).and_then(|()| Ok(self.tend(layer).map(drop)?));
        if let Err(error) = whole {
            // The first failure is what counts; the start's own unwinding detaches it as well.
            let _ = self.close(&layer.owner);
            return Err(error);
        }
        Ok(RootDrive::own(path, layer))
    }

    /// The device is made larger when it is attached. Its copy-on-write file is at least as large as one begins, also
    /// that of a small snapshot.
    fn grow(&self, layer: &Layer) -> Result<(), ErrorBody> {
        let path = &layer.file;
        let file = open_file(OpenOptions::new().read(true).write(true), path)?;
        let has = file
            .metadata()
            .map_err(|error| io_error("read", path, &error))?
            .len();
        let first = cow_first(device_bytes(layer)?);
        if has < first {
            preallocate(&file, path, first).map_err(|error| storage_error(&error))?;
        }
        make_durable(path)
    }

    fn close(&self, owner: &Owner) -> Result<(), ErrorBody> {
        let uid = rustix::process::geteuid().as_raw();
        if !ops::seen(uid, owner.instance).contains(&owner.vm) {
            return Ok(());
        }
        self.ask(
            &HostOp::DetachSnapshot {
                instance: owner.instance,
                vm: owner.vm,
            },
            &[],
        )
        .map(drop)
    }
}

impl Snapshot {
    pub(super) fn new(side: Option<Arc<HostSide>>) -> Self {
        Self {
            side,
            possible: OnceLock::new(),
        }
    }

    /// Whether device-mapper makes snapshots for us, or why not.
    fn look(&self) -> Result<(), String> {
        let side = self
            .side
            .as_deref()
            .ok_or("it needs root, or `banger-helper`")?;
        let nobody = Uuid::nil();
        let status = HostOp::SnapshotStatus {
            instance: InstanceId::from_uuid(nobody),
            vm: VmId::from_uuid(nobody),
        };
        side.perform(&status, &[])
            .map_err(|error| banger_host::error_chain(&error))?;
        let told = RULES
            .iter()
            .any(|folder| Path::new(folder).join(RULES_FILE).exists());
        if Path::new(UDEV).exists() && !told {
            return Err(format!(
                "udev would name disks of the host by what images say: `{}/{RULES_FILE}` is missing, which \
             `sudo make install` puts there",
                RULES[2]
            ));
        }
        Ok(())
    }

    /// The VMs of an instance that have a snapshot attached.
    pub(crate) fn attached(&self, instance: InstanceId) -> BTreeSet<VmId> {
        ops::seen(rustix::process::geteuid().as_raw(), instance)
    }

    /// Detaches the snapshots of an instance's VMs that are not `known`: their records are gone. Answers what could not
    /// be detached.
    pub(crate) fn sweep(
        &self,
        instance: InstanceId,
        known: &HashSet<VmId>,
    ) -> Vec<(VmId, ErrorBody)> {
        self.attached(instance)
            .into_iter()
            .filter(|vm| !known.contains(vm))
            .filter_map(|vm| {
                tracing::warn!(%vm, "a snapshot without a VM is detached");
                let closed = self.close(&Owner { instance, vm });
                closed.err().map(|error| (vm, error))
            })
            .collect()
    }

    /// Looks how full the copy-on-write file is, and grows it in time.
    ///
    /// # Errors
    /// The kernel has dropped the snapshot, or cannot be asked.
    pub(crate) fn tend(&self, layer: &Layer) -> Result<Tended, Untended> {
        let Owner { instance, vm } = layer.owner;
        let most = cow_most(device_bytes(layer)?);
        let (used, size) = self.state(layer, &HostOp::SnapshotStatus { instance, vm })?;
        let CowVerdict::Grow(to) = cow(used, size, most) else {
            return Ok(Tended::new(used, size));
        };
        let file = open_file(OpenOptions::new().read(true).write(true), &layer.file)?;
        if let Err(error) = preallocate(&file, &layer.file, to) {
            if !error.is_no_space() {
                let error = banger_host::error_chain(&error);
                tracing::warn!(vm = %layer.name, error, "a copy-on-write file cannot grow");
            }
            // Whatever the reason is: what finds no room is lost with all that was written before.
            return Ok(Tended {
                must_pause: cow_must_pause(used, size),
                ..Tended::new(used, size)
            });
        }
        let (used, size) = self.state(layer, &HostOp::GrowSnapshot { instance, vm })?;
        Ok(Tended {
            must_pause: cow_must_pause(used, size),
            grown_to: Some(size),
            ..Tended::new(used, size)
        })
    }

    /// The bytes that are used of the copy-on-write file, and its size.
    fn state(&self, layer: &Layer, op: &HostOp) -> Result<(u64, u64), Untended> {
        let lost = |why: &str| {
            let error = ErrorBody::new(
                ErrorCode::Internal,
                format!("the kernel has no snapshot of VM `{}`: {why}", layer.name),
            );
            Untended::Lost(error.hint("what was written is in the copy-on-write file; keep it"))
        };
        match self.ask(op, &[])? {
            HostAnswer::Snapshot(SnapshotState::Valid {
                used_sectors,
                total_sectors,
            }) => Ok((used_sectors * SECTOR, total_sectors * SECTOR)),
            HostAnswer::Snapshot(SnapshotState::Absent) => Err(lost("it is not attached")),
            HostAnswer::Snapshot(SnapshotState::Lost { why }) => Err(lost(&why)),
            _ => Err(misunderstood().into()),
        }
    }

    fn ask(&self, op: &HostOp, descriptors: &[BorrowedFd<'_>]) -> Result<HostAnswer, ErrorBody> {
        let side = self.side.as_deref().ok_or_else(|| {
        ErrorBody::new(ErrorCode::HostUnfit, format!("{} needs root", op.name())).hint(
            "a daemon that finds `banger-helper` when it starts asks that; `--storage auto` needs neither",
        )
    })?;
        match side.perform(op, descriptors) {
            Ok((answer, _)) => Ok(answer),
            Err(error) => Err(ErrorBody::from_error(ErrorCode::Internal, &error)),
        }
    }
}

/// The size of the VM's root: the image and the new data that it may write.
fn device_bytes(layer: &Layer) -> Result<u64, ErrorBody> {
    Ok((layer.image_bytes()? + layer.overlay_bytes) / SECTOR * SECTOR)
}

/// A copy-on-write file that was never used, or is torn, is made again; one that may hold data is never touched.
fn ensure_cow(driver: &Snapshot, layer: &Layer) -> Result<(), ErrorBody> {
    use std::os::unix::fs::FileExt;
    let mut begins = [0; HEADER.len()];
    // It only grows: a smaller one is torn.
    let first = cow_first(device_bytes(layer)?);
    let read = File::open(&layer.file).and_then(|file| {
        file.read_exact_at(&mut begins, 0)?;
        Ok(file.metadata()?.len() >= first)
    });
    let error = match read {
        Ok(true) if begins[MAGIC] == HEADER[MAGIC] => return Ok(()),
        Ok(_) => ErrorBody::new(
            ErrorCode::BadFile,
            format!(
                "`{}` is not the copy-on-write file of VM `{}`",
                layer.file.display(),
                layer.name
            ),
        ),
        Err(error) => io_error("read", &layer.file, &error),
    };
    if layer.precious {
        return Err(error.hint("put the file back from a backup; nothing was changed"));
    }
    remove_if_there(&layer.file)?;
    driver.create(layer)
}

/// The device holds the image's filesystem, and the kernel has not dropped it.
fn prove(layer: &Layer, device: &Path) -> Result<(), ErrorBody> {
    let found =
        template::read_ext4_uuid(device).map_err(|error| crate::images::build_error(&error))?;
    if found.to_string() == layer.image_uuid {
        return Ok(());
    }
    Err(ErrorBody::new(
        ErrorCode::BadFile,
        format!(
            "`{}` is not over the image of VM `{}`: it carries the UUID {found}, not {}",
            layer.file.display(),
            layer.name,
            layer.image_uuid
        ),
    ))
}

/// How a snapshot's copy-on-write file is after it was tended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tended {
    /// When to look again, in milliseconds.
    pub(crate) next_check_ms: u64,
    /// For how many milliseconds the VM may write if nobody can look again.
    pub(crate) safe_ms: u64,
    /// The VM must not write now: there is no room for it.
    pub(crate) must_pause: bool,
    /// The file was grown to so many bytes.
    pub(crate) grown_to: Option<u64>,
}

impl Tended {
    /// As it was: there is room, and nothing was done.
    fn new(used: u64, size: u64) -> Self {
        Self {
            next_check_ms: cow_next_check_ms(used, size, UNLIMITED_WRITES),
            safe_ms: cow_safe_ms(used, size, UNLIMITED_WRITES),
            must_pause: false,
            grown_to: None,
        }
    }
}

/// A snapshot could not be tended.
#[derive(Debug)]
pub(crate) enum Untended {
    /// The kernel has none: nothing helps.
    Lost(ErrorBody),
    /// It may be filling, and nobody knows.
    Unknown(ErrorBody),
}

impl From<ErrorBody> for Untended {
    fn from(error: ErrorBody) -> Self {
        Self::Unknown(error)
    }
}

impl From<Untended> for ErrorBody {
    fn from(error: Untended) -> Self {
        match error {
            Untended::Lost(error) | Untended::Unknown(error) => error,
        }
    }
}

fn misunderstood() -> ErrorBody {
    ErrorBody::new(
        ErrorCode::Internal,
        "the host's root side answered something else",
    )
}

fn open_file(options: &OpenOptions, path: &Path) -> Result<File, ErrorBody> {
    options
        .open(path)
        .map_err(|error| io_error("open", path, &error))
}

fn storage_error(error: &StorageError) -> ErrorBody {
    let code = if error.is_no_space() {
        ErrorCode::NoSpace
    } else {
        ErrorCode::Internal
    };
    let body = ErrorBody::from_error(code, error);
    if error.is_unsupported() {
        return body.hint(
            "a snapshot needs a filesystem that reserves room, as ext4, XFS and btrfs do; `--storage auto` does not",
        );
    }
    body
}
