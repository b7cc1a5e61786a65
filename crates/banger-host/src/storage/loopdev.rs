//! Loop devices by their ioctls. All of ours end with their last user: the kernel detaches them when nobody has them
//! open any more, neither a process nor a table of device-mapper.

use super::dm::Number;
use linux_raw_sys::loop_device::{
    LO_FLAGS_AUTOCLEAR, LO_FLAGS_READ_ONLY, LOOP_CONFIGURE, LOOP_CTL_GET_FREE, LOOP_GET_STATUS64,
    LOOP_SET_CAPACITY, loop_config, loop_info64,
};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Getter, Ioctl, IoctlOutput, NoArg, Opcode, Setter, ioctl};
use std::ffi::c_void;
use std::path::PathBuf;

const CONTROL: &str = "/dev/loop-control";
/// The driver's number, for ever.
const MAJOR: u32 = 7;
/// How often another process may take the free device before us.
const ATTEMPTS: u32 = 64;

/// A loop device could not be made, found or changed.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// The kernel has no loop devices, or they are not loaded.
    #[error("this kernel has no loop devices: as root run `modprobe loop` (CONFIG_BLK_DEV_LOOP)")]
    Missing,
    /// They may not be used.
    #[error("no permission to use `{CONTROL}`")]
    NoPermission,
    /// The kernel refuses.
    #[error("cannot {action} a loop device")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// Why.
        #[source]
        source: Errno,
    },
    /// A tag is longer than a loop device can carry.
    #[error("`{0}` is too long for a loop device")]
    TooLong(String),
}

fn refused(action: &'static str) -> impl FnOnce(Errno) -> LoopError {
    move |source| LoopError::Refused { action, source }
}

/// Held by whoever makes, looks for or removes what stands on loop devices, in any process of the host.
#[derive(Debug)]
pub struct Turn {
    control: OwnedFd,
}

impl Turn {
    /// Waits for the turn.
    ///
    /// # Errors
    /// The kernel has no loop devices, or we may not use them.
    pub fn take() -> Result<Self, LoopError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let control =
            rustix::fs::open(CONTROL, flags, Mode::empty()).map_err(|errno| match errno {
                Errno::NOENT | Errno::NODEV | Errno::NXIO => LoopError::Missing,
                Errno::ACCESS | Errno::PERM => LoopError::NoPermission,
                errno => LoopError::Refused {
                    action: "look for",
                    source: errno,
                },
            })?;
        loop {
            match rustix::fs::flock(&control, FlockOperation::LockExclusive) {
                Ok(()) => return Ok(Self { control }),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(refused("take the turn for")(errno)),
            }
        }
    }
}

/// An open loop device. It is detached when this and all its other users are gone.
#[derive(Debug)]
pub struct LoopDevice {
    device: OwnedFd,
    /// Its number, as tables of device-mapper name it.
    pub number: Number,
}

impl LoopDevice {
    /// Attaches `file` to a free loop device that carries `tag`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn attach(
        turn: &Turn,
        file: BorrowedFd<'_>,
        tag: &str,
        read_only: bool,
    ) -> Result<Self, LoopError> {
        let tag = tag_bytes(tag)?;
        for _ in 0..ATTEMPTS {
            let minor = free(&turn.control).map_err(refused("find"))?;
            let device = open(minor, read_only).map_err(refused("open"))?;
            match configure(&device, file, tag, read_only) {
                Ok(()) => return Self::new(device),
                // Somebody else was faster.
                Err(Errno::BUSY) => {}
                Err(errno) => return Err(refused("attach a file to")(errno)),
            }
        }
        Err(refused("find")(Errno::BUSY))
    }

    /// The loop device of `file` that carries `tag`, if there is one.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn find(
        _turn: &Turn,
        file: BorrowedFd<'_>,
        tag: &str,
        read_only: bool,
    ) -> Result<Option<Self>, LoopError> {
        let tag = tag_bytes(tag)?;
        let facts = rustix::fs::fstat(file).map_err(refused("compare"))?;
        let wanted = (kernel_number(facts.st_dev), facts.st_ino);
        for minor in attached().map_err(refused("list"))? {
            // It may be gone by now, or somebody's who lets nobody look.
            let Ok(device) = open(minor, read_only) else {
                continue;
            };
            if let Ok(info) = status(&device)
                && (info.lo_device, info.lo_inode) == wanted
                && info.lo_file_name == tag
                && (info.lo_flags & LO_FLAGS_READ_ONLY as u32 != 0) == read_only
            {
                return Self::new(device).map(Some);
            }
        }
        Ok(None)
    }

    /// The loop device with that number, if it carries `tag`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn tagged(number: Number, tag: &str) -> Result<Option<Self>, LoopError> {
        if number.major != MAJOR {
            return Ok(None);
        }
        let device = open(number.minor, false).map_err(refused("open"))?;
        let info = status(&device).map_err(refused("look at"))?;
        if info.lo_file_name != tag_bytes(tag)? {
            return Ok(None);
        }
        Self::new(device).map(Some)
    }

    fn new(device: OwnedFd) -> Result<Self, LoopError> {
        let number = Number::of(&device).map_err(refused("look at"))?;
        Ok(Self { device, number })
    }

    /// Has the kernel see that the file has grown.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn take_size(&self) -> Result<(), LoopError> {
        take_size(&self.device).map_err(refused("grow"))
    }

    /// Its size in sectors of 512 bytes.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn sectors(&self) -> Result<u64, LoopError> {
        let end = rustix::fs::seek(&self.device, rustix::fs::SeekFrom::End(0));
        end.map(|bytes| bytes / 512).map_err(refused("measure"))
    }
}

/// The tags of all attached loop devices, as far as we may look.
///
/// # Errors
/// The kernel refuses.
pub fn tags() -> Result<Vec<String>, LoopError> {
    let mut tags = Vec::new();
    for minor in attached().map_err(refused("list"))? {
        let info = open(minor, true).and_then(|device| status(&device));
        if let Ok(info) = info {
            let name = info.lo_file_name.split(|&byte| byte == 0).next();
            tags.push(String::from_utf8_lossy(name.unwrap_or_default()).into_owned());
        }
    }
    Ok(tags)
}

/// The numbers of those that have a file.
fn attached() -> Result<Vec<u32>, Errno> {
    let folder = std::fs::read_dir("/sys/block")
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    let mut minors: Vec<u32> = folder
        .flatten()
        .filter(|entry| entry.path().join("loop/backing_file").exists())
        .filter_map(|entry| {
            entry
                .file_name()
                .to_str()?
                .strip_prefix("loop")?
                .parse()
                .ok()
        })
        .collect();
    minors.sort_unstable();
    Ok(minors)
}

fn open(minor: u32, read_only: bool) -> Result<OwnedFd, Errno> {
    let mode = if read_only {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    };
    let path = PathBuf::from(format!("/dev/loop{minor}"));
    rustix::fs::open(path, mode | OFlags::CLOEXEC, Mode::empty())
}

/// `dev` as the kernel shows the numbers of filesystems in a loop device's status.
fn kernel_number(dev: u64) -> u64 {
    let (major, minor) = (
        u64::from(rustix::fs::major(dev)),
        u64::from(rustix::fs::minor(dev)),
    );
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

fn tag_bytes(tag: &str) -> Result<[u8; 64], LoopError> {
    let mut bytes = [0; 64];
    // The kernel ends it with a NUL of its own.
    if tag.len() >= bytes.len() {
        return Err(LoopError::TooLong(tag.to_owned()));
    }
    bytes[..tag.len()].copy_from_slice(tag.as_bytes());
    Ok(bytes)
}

fn configure(
    device: &OwnedFd,
    file: BorrowedFd<'_>,
    tag: [u8; 64],
    read_only: bool,
) -> Result<(), Errno> {
    let mut flags = LO_FLAGS_AUTOCLEAR as u32;
    if read_only {
        flags |= LO_FLAGS_READ_ONLY as u32;
    }
    let config = loop_config {
        fd: file.as_raw_fd().cast_unsigned(),
        block_size: 0,
        info: loop_info64 {
            lo_device: 0,
            lo_inode: 0,
            lo_rdevice: 0,
            lo_offset: 0,
            lo_sizelimit: 0,
            lo_number: 0,
            lo_encrypt_type: 0,
            lo_encrypt_key_size: 0,
            lo_flags: flags,
            lo_file_name: tag,
            lo_crypt_name: [0; 64],
            lo_encrypt_key: [0; 32],
            lo_init: [0; 2],
        },
        __reserved: [0; 8],
    };
    set_config(device, config)
}

#[expect(
    unsafe_code,
    reason = "the ioctl that attaches a file to a loop device"
)]
fn set_config(device: &OwnedFd, config: loop_config) -> Result<(), Errno> {
    // SAFETY: `LOOP_CONFIGURE` reads a `struct loop_config`.
    unsafe {
        ioctl(
            device,
            Setter::<{ LOOP_CONFIGURE }, loop_config>::new(config),
        )
    }
}

#[expect(unsafe_code, reason = "the ioctl that tells of a loop device")]
fn status(device: &OwnedFd) -> Result<loop_info64, Errno> {
    // SAFETY: `LOOP_GET_STATUS64` fills a `struct loop_info64`.
    unsafe { ioctl(device, Getter::<{ LOOP_GET_STATUS64 }, loop_info64>::new()) }
}

#[expect(
    unsafe_code,
    reason = "the ioctl that measures a loop device's file again"
)]
fn take_size(device: &OwnedFd) -> Result<(), Errno> {
    // SAFETY: `LOOP_SET_CAPACITY` takes no argument.
    unsafe { ioctl(device, NoArg::<{ LOOP_SET_CAPACITY }>::new()) }
}

/// The number of a loop device without a file, made if there is none.
#[expect(unsafe_code, reason = "the ioctl that finds a free loop device")]
fn free(control: &OwnedFd) -> Result<u32, Errno> {
    // SAFETY: `LOOP_CTL_GET_FREE` takes no argument and touches no memory of ours.
    let minor = unsafe { ioctl(control.as_fd(), GetFree) }?;
    u32::try_from(minor).map_err(|_| Errno::RANGE)
}

/// `LOOP_CTL_GET_FREE` answers by its return value, which no ready-made pattern hands on.
struct GetFree;

#[expect(unsafe_code, reason = "an ioctl that answers by its return value")]
// SAFETY: there is no argument, and the output is the return value alone.
unsafe impl Ioctl for GetFree {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        Opcode::from(LOOP_CTL_GET_FREE)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    /// The turn, or nothing, said, on a machine that has no loop devices for us.
    fn turn(test: &str) -> Option<Turn> {
        match Turn::take() {
            Ok(turn) => Some(turn),
            Err(error) => {
                eprintln!("SKIPPED: {test}: {error}");
                None
            }
        }
    }

    fn file(bytes: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        file
    }

    fn tag(test: &str) -> String {
        format!("BANGER-test-{}-{test}", std::process::id())
    }

    #[test]
    fn a_device_is_shared_by_its_file_and_tag_and_ends_with_its_last_user() {
        let Some(turn) = turn("a_device_is_shared_by_its_file_and_tag_and_ends_with_its_last_user")
        else {
            return;
        };
        let (image, tag) = (file(1 << 20), tag("shared"));
        let find = || LoopDevice::find(&turn, image.as_fd(), &tag, true).unwrap();
        assert!(find().is_none());
        let first = LoopDevice::attach(&turn, image.as_fd(), &tag, true).unwrap();
        let second = find().unwrap();
        assert_eq!(first.number, second.number);
        assert_eq!(first.sectors().unwrap(), 2048);
        let other = file(1 << 20);
        let other = LoopDevice::find(&turn, other.as_fd(), &tag, true).unwrap();
        assert!(other.is_none());
        assert!(
            LoopDevice::tagged(first.number, "another")
                .unwrap()
                .is_none()
        );
        drop(first);
        assert!(tags().unwrap().contains(&tag));
        drop(second);
        assert!(!tags().unwrap().contains(&tag));
    }

    #[test]
    fn a_device_takes_the_new_size_of_its_file() {
        let Some(turn) = turn("a_device_takes_the_new_size_of_its_file") else {
            return;
        };
        let (cow, tag) = (file(1 << 20), tag("grown"));
        let device = LoopDevice::attach(&turn, cow.as_fd(), &tag, false).unwrap();
        cow.set_len(3 << 20).unwrap();
        device.take_size().unwrap();
        assert_eq!(device.sectors().unwrap(), 3 * 2048);
        let again = LoopDevice::tagged(device.number, &tag).unwrap().unwrap();
        assert_eq!(again.number, device.number);
    }

    #[test]
    fn a_read_only_device_takes_no_writes() {
        let Some(turn) = turn("a_read_only_device_takes_no_writes") else {
            return;
        };
        let mut image = file(1 << 20);
        image.write_all(b"image").unwrap();
        let tag = tag("read-only");
        let device = LoopDevice::attach(&turn, image.as_fd(), &tag, true).unwrap();
        let path = format!("/dev/loop{}", device.number.minor);
        let written = std::fs::OpenOptions::new()
            .write(true)
            .open(path)
            .and_then(|device| device.write_all_at(b"other", 0));
        assert!(written.is_err());
        let mut content = [0; 5];
        image.read_exact_at(&mut content, 0).unwrap();
        assert_eq!(&content, b"image");
    }

    #[test]
    fn a_tag_that_would_be_cut_is_refused() {
        assert!(matches!(
            tag_bytes(&"x".repeat(64)),
            Err(LoopError::TooLong(_))
        ));
        assert!(tag_bytes(&"x".repeat(63)).is_ok());
    }

    #[test]
    fn numbers_of_filesystems_are_compared_in_the_kernels_form() {
        assert_eq!(kernel_number(rustix::fs::makedev(254, 3)), 254 << 8 | 3);
        assert_eq!(
            kernel_number(rustix::fs::makedev(7, 261)),
            0x10_0000 | 7 << 8 | 5
        );
    }
}
