//! Snapshots of images, as root makes them for a user.
//!
//! ```text
//!   image (read-only) -- loop, shared by all VMs of the image --+
//!                                                 zeros --------+-- origin --+
//!   overlay.img ------- loop, of the VM alone ---- copy on write ------------+-- snapshot: the VM's root
//! ```
//!
//! The origin is the image with zeros after it, so that the snapshot has room for new data. Nothing counts users: a
//! loop device ends when no table of device-mapper uses it any more.

use super::dm::{self, Control, Device, DmError, Number, Target};
use super::loopdev::{LoopDevice, LoopError, Turn};
use super::snapshot_files::{self as files, FileError};
use crate::op::{HostAnswer, HostOp, OwnedKind, OwnedObject, SnapshotState};
use banger_core::id::{InstanceId, VmId};
use rustix::fd::BorrowedFd;
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// What is copied at once on a first write, in sectors: a block of the guest's filesystem.
pub const CHUNK_SECTORS: u64 = 8;

/// How large a snapshot may be, in sectors: 64 TiB.
pub const MAX_SECTORS: u64 = 1 << 37;
/// The most snapshots that one user, other than root, may have at a time.
pub const MAX_SNAPSHOTS: usize = 256;
/// How long a stranger that looks at a device, as `lsblk` does, may keep it open.
const CLOSED_WITHIN: Duration = Duration::from_secs(5);
/// How often it is looked whether that one is done.
const AGAIN: Duration = Duration::from_millis(10);

/// A snapshot could not be made, found or removed.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Device-mapper refused.
    #[error(transparent)]
    Dm(#[from] DmError),
    /// A loop device refused.
    #[error(transparent)]
    Loop(#[from] LoopError),
    /// A descriptor is not what it should be.
    #[error(transparent)]
    File(#[from] FileError),
    /// The user has as many as anybody may have.
    #[error("uid {uid} has {limit} snapshots already, and nobody gets more")]
    TooMany {
        /// Whose.
        uid: u32,
        /// How many.
        limit: usize,
    },
    /// The snapshot would be smaller than its image.
    #[error("a snapshot of {asked} sectors is smaller than its image of {image}")]
    TooSmall {
        /// What was asked for.
        asked: u64,
        /// What the image has.
        image: u64,
    },
    /// The snapshot would be larger than any.
    #[error("a snapshot of {0} sectors is larger than {MAX_SECTORS}")]
    TooLarge(u64),
    /// The kernel made no node of it.
    #[error("the kernel made no `{0}`: is there a devtmpfs at /dev?")]
    NoNode(String),
    /// The node could not be given to its user.
    #[error("cannot give `{node}` to its user")]
    Give {
        /// The node.
        node: String,
        /// Why.
        #[source]
        source: Errno,
    },
    /// The operation is another one's.
    #[error("{0} is no operation on snapshots")]
    Other(&'static str),
}

/// The names of one VM's devices.
struct Names {
    snapshot: String,
    origin: String,
    image_tag: String,
    cow_tag: String,
}

impl Names {
    fn new(uid: u32, instance: InstanceId, vm: VmId) -> Self {
        let snapshot = format!("BANGER-{uid}-{instance}-{vm}");
        Self {
            origin: format!("{snapshot}-origin"),
            snapshot,
            image_tag: format!("BANGER-{uid}-{instance}-image"),
            cow_tag: format!("BANGER-{uid}-{vm}-cow"),
        }
    }
}

impl Names {
    fn are_seen(&self, uuids: &[String]) -> bool {
        let ours = |uuid: &String| *uuid == self.snapshot || *uuid == self.origin;
        uuids.iter().any(ours)
    }
}

/// Does one of the operations on snapshots for the user `uid`.
///
/// # Errors
/// The kernel refuses, a descriptor is not what it should be, or a device of somebody else is in the way.
pub fn perform(
    uid: u32,
    op: &HostOp,
    descriptors: &[BorrowedFd<'_>],
) -> Result<HostAnswer, SnapshotError> {
    match (op, descriptors) {
        (
            HostOp::AttachSnapshot {
                instance,
                vm,
                sectors,
            },
            &[image, cow],
        ) => {
            let device = attach(uid, &Names::new(uid, *instance, *vm), *sectors, image, cow)?;
            let path = device.node().display().to_string();
            Ok(HostAnswer::Device { path })
        }
        (HostOp::DetachSnapshot { instance, vm }, []) => {
            detach(&Names::new(uid, *instance, *vm))?;
            Ok(HostAnswer::Done)
        }
        (HostOp::GrowSnapshot { instance, vm }, []) => {
            let names = Names::new(uid, *instance, *vm);
            grow(&names).map(HostAnswer::Snapshot)
        }
        (HostOp::SnapshotStatus { instance, vm }, []) => {
            let names = Names::new(uid, *instance, *vm);
            state(&Control::open()?, &names).map(HostAnswer::Snapshot)
        }
        _ => Err(SnapshotError::Other(op.name())),
    }
}

/// The devices of `uid`: snapshots and their origins. However many devices a machine has, they are all seen.
pub fn list(uid: u32) -> Vec<OwnedObject> {
    let ours = dm::seen().into_iter().filter_map(|name| {
        let (instance, _) = parse(uid, &name)?;
        Some(OwnedObject {
            kind: OwnedKind::Snapshot,
            name,
            instance,
        })
    });
    let mut found: Vec<OwnedObject> = ours.collect();
    found.sort();
    found
}

/// The VMs of `uid` and `instance` that have a snapshot, or the rest of one, which everybody may see.
pub fn seen(uid: u32, instance: InstanceId) -> BTreeSet<VmId> {
    let ours = dm::seen().into_iter().filter_map(|uuid| parse(uid, &uuid));
    ours.filter(|(of, _)| *of == instance)
        .map(|(_, vm)| vm)
        .collect()
}

/// What the uuid of a snapshot's origin ends with.
const ORIGIN: &str = "-origin";

/// A loop device below a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct LoopBelow {
    /// Its name, as `loop3`.
    pub name: String,
    /// Its file, as the kernel shows it.
    pub file: String,
    /// Whether it is what the snapshot writes to, and not the image below it.
    pub is_written_to: bool,
    /// Whose snapshot stands on it.
    pub instance: InstanceId,
    /// That VM.
    pub vm: VmId,
}

impl LoopBelow {
    /// Its file has no name any more: who made it cannot find it again.
    pub fn is_unlinked(&self) -> bool {
        self.file.ends_with(" (deleted)")
    }
}

/// The loop devices below the snapshots of `uid`, once for each VM that has one of them. Everybody may see them.
pub fn loops(uid: u32) -> Vec<LoopBelow> {
    let below = dm::loops_below().into_iter();
    let ours = below.filter_map(|(uuid, name, file)| {
        let (instance, vm) = parse(uid, &uuid)?;
        Some(LoopBelow {
            name,
            file,
            is_written_to: !uuid.ends_with(ORIGIN),
            instance,
            vm,
        })
    });
    ours.collect()
}

fn parse(uid: u32, uuid: &str) -> Option<(InstanceId, VmId)> {
    let (of, instance, vm) = owner(uuid)?;
    (of == uid).then_some((instance, vm))
}

/// The user, instance and VM that a device with this uuid is for.
pub fn owner(uuid: &str) -> Option<(u32, InstanceId, VmId)> {
    const ID: usize = 36;
    let (uid, ids) = uuid.strip_prefix("BANGER-")?.split_once('-')?;
    let ids = ids.strip_suffix(ORIGIN).unwrap_or(ids);
    let (instance, vm) = (ids.get(..ID)?, ids.get(ID..)?.strip_prefix('-')?);
    Some((uid.parse().ok()?, instance.parse().ok()?, vm.parse().ok()?))
}

fn attach(
    uid: u32,
    names: &Names,
    sectors: u64,
    image: BorrowedFd<'_>,
    cow: BorrowedFd<'_>,
) -> Result<Device, SnapshotError> {
    if sectors > MAX_SECTORS {
        return Err(SnapshotError::TooLarge(sectors));
    }
    files::check_image(image, uid)?;
    files::check_cow(cow, uid)?;
    // What an earlier attempt left is void: whoever asks has the VM's lock.
    detach(names)?;
    let turn = Turn::take()?;
    let control = Control::open()?;
    refuse_too_many(uid)?;
    let image = match LoopDevice::find(&turn, image, &names.image_tag, true)? {
        Some(shared) => shared,
        None => LoopDevice::attach(&turn, image, &names.image_tag, true)?,
    };
    let image_sectors = image.sectors()?;
    if sectors < image_sectors {
        return Err(SnapshotError::TooSmall {
            asked: sectors,
            image: image_sectors,
        });
    }
    let cow = LoopDevice::attach(&turn, cow, &names.cow_tag, false)?;
    let origin = control.create(
        &names.origin,
        &names.origin,
        &origin_table(image.number, image_sectors, sectors),
        true,
    )?;
    let table = snapshot_table(origin.number, cow.number, sectors);
    let made = control
        .create(&names.snapshot, &names.snapshot, &table, false)
        .map_err(SnapshotError::from)
        .and_then(|device| give(uid, &device).map(|()| device));
    drop(turn);
    if made.is_err() {
        // The first failure is what counts.
        let _ = detach(names);
    }
    made
}

fn origin_table(image: Number, image_sectors: u64, sectors: u64) -> Vec<Target> {
    let mut table = vec![Target {
        start: 0,
        sectors: image_sectors,
        kind: "linear".to_owned(),
        text: format!("{image} 0"),
    }];
    if sectors > image_sectors {
        table.push(Target {
            start: image_sectors,
            sectors: sectors - image_sectors,
            kind: "zero".to_owned(),
            text: String::new(),
        });
    }
    table
}

fn snapshot_table(origin: Number, cow: Number, sectors: u64) -> Vec<Target> {
    vec![Target {
        start: 0,
        sectors,
        kind: "snapshot".to_owned(),
        text: format!("{origin} {cow} P {CHUNK_SECTORS}"),
    }]
}

/// Lets the user open the device's node.
fn give(uid: u32, device: &Device) -> Result<(), SnapshotError> {
    let node = device.node();
    let shown = node.display().to_string();
    if !node.exists() {
        return Err(SnapshotError::NoNode(shown));
    }
    if uid == 0 {
        return Ok(());
    }
    let owner = rustix::fs::Uid::from_raw(uid);
    rustix::fs::chown(&node, Some(owner), None).map_err(|source| SnapshotError::Give {
        node: shown,
        source,
    })
}

/// Takes apart what there is. The turn is not kept while a device is open: its user may never close it, and others
/// must not wait for that.
fn detach(names: &Names) -> Result<(), SnapshotError> {
    let control = match Control::open() {
        // Without device-mapper there is nothing to detach; but one that is there speaks against that.
        Err(DmError::Missing) if !names.are_seen(&dm::seen()) => return Ok(()),
        control => control?,
    };
    let deadline = Instant::now() + CLOSED_WITHIN;
    loop {
        let turn = Turn::take()?;
        let taken = take_apart(&control, names);
        drop(turn);
        match taken {
            // The kernel has no event for the close by whoever looks at it.
            Err(error) if error.is_busy() && Instant::now() < deadline => {
                std::thread::sleep(AGAIN);
            }
            taken => return Ok(taken?),
        }
    }
}

/// Snapshot before origin; the loop devices end with them.
fn take_apart(control: &Control, names: &Names) -> Result<(), DmError> {
    control.remove(&names.snapshot)?;
    control.remove(&names.origin)
}

/// Devices and their numbers are everybody's.
fn refuse_too_many(uid: u32) -> Result<(), SnapshotError> {
    let theirs = |uuid: &String| uuid.ends_with(ORIGIN) && parse(uid, uuid).is_some();
    let limit = MAX_SNAPSHOTS;
    if uid != 0 && dm::seen().iter().filter(|uuid| theirs(uuid)).count() >= limit {
        return Err(SnapshotError::TooMany { uid, limit });
    }
    Ok(())
}

fn grow(names: &Names) -> Result<SnapshotState, SnapshotError> {
    let control = Control::open()?;
    let below = match control.below(&names.snapshot) {
        Err(DmError::Refused {
            source: Errno::NXIO,
            ..
        }) => return Ok(SnapshotState::Absent),
        below => below?,
    };
    for number in below {
        if let Some(cow) = LoopDevice::tagged(number, &names.cow_tag)? {
            cow.take_size()?;
        }
    }
    state(&control, names)
}

fn state(control: &Control, names: &Names) -> Result<SnapshotState, SnapshotError> {
    let Some(status) = control.status(&names.snapshot)? else {
        return Ok(SnapshotState::Absent);
    };
    let line = status.first().map(|target| target.text.as_str());
    Ok(read_status(line.unwrap_or_default()))
}

/// Reads `used/total metadata`, all in sectors, or a word such as `Invalid`.
fn read_status(text: &str) -> SnapshotState {
    let numbers = text.split_once(' ').and_then(|(used, _)| {
        let (used, total) = used.split_once('/')?;
        Some((used.parse().ok()?, total.parse().ok()?))
    });
    match numbers {
        Some((used_sectors, total_sectors)) => SnapshotState::Valid {
            used_sectors,
            total_sectors,
        },
        None => SnapshotState::Lost {
            why: text.chars().take(64).collect(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        let id = |n| uuid::Uuid::from_u128(n);
        Names::new(
            u32::MAX,
            InstanceId::from_uuid(id(1)),
            VmId::from_uuid(id(2)),
        )
    }

    #[test]
    fn names_say_whose_they_are_and_fit() {
        let names = names();
        assert!(names.origin.len() < 128 && names.image_tag.len() < 64 && names.cow_tag.len() < 64);
        for uuid in [&names.snapshot, &names.origin] {
            let (instance, vm) = parse(u32::MAX, uuid).unwrap();
            assert_eq!(instance.as_uuid().as_u128(), 1);
            assert_eq!(vm.as_uuid().as_u128(), 2);
            assert_eq!(parse(0, uuid), None);
            assert!(names.are_seen(&["other".to_owned(), uuid.clone()]));
        }
        assert!(!names.are_seen(&[format!("{}-other", names.snapshot)]));
        assert_eq!(parse(0, "BANGER-0-é"), None);
        assert_eq!(parse(0, "LVM-something"), None);
    }

    #[test]
    fn a_snapshot_is_the_image_then_zeros_and_its_copy_on_write() {
        let number = |minor| Number { major: 7, minor };
        let origin = origin_table(number(3), 100, 300);
        assert_eq!(origin[0].text, "7:3 0");
        assert_eq!((origin[1].start, origin[1].sectors), (100, 200));
        assert_eq!(origin_table(number(3), 100, 100).len(), 1);
        let snapshot = snapshot_table(number(4), number(5), 300);
        assert_eq!(snapshot[0].text, "7:4 7:5 P 8");
    }

    #[test]
    fn a_status_is_read_as_the_kernel_writes_it() {
        assert_eq!(
            read_status("16/131072 16"),
            SnapshotState::Valid {
                used_sectors: 16,
                total_sectors: 131_072
            }
        );
        for lost in ["Invalid", "Overflow", "Merge failed", ""] {
            assert!(
                matches!(read_status(lost), SnapshotState::Lost { .. }),
                "{lost}"
            );
        }
    }

    #[test]
    fn an_operation_of_others_is_refused() {
        let error = perform(0, &HostOp::ListOwned {}, &[]).unwrap_err();
        assert_eq!(error.to_string(), "list-owned is no operation on snapshots");
        assert!(!names().snapshot.is_empty());
    }
}
