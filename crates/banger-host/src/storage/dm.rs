//! Device-mapper by its ioctls: devices of our own are made, looked at and removed by their uuid. udev is told to
//! leave them alone: it neither probes nor names them.

mod message;

use linux_raw_sys::ioctl::{
    DM_DEV_CREATE, DM_DEV_REMOVE, DM_DEV_STATUS, DM_DEV_SUSPEND, DM_TABLE_DEPS, DM_TABLE_LOAD,
    DM_TABLE_STATUS, DM_VERSION,
};
use message::{Answer, Message, Request, encode_table};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::ioctl;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// The control node, which udev makes where there is one.
const CONTROL: &str = "/dev/mapper/control";
/// The number of device-mapper among the miscellaneous devices, for ever.
const CONTROL_DEVICE: (u32, u32) = (10, 236);

/// Where the kernel shows all block devices.
const BLOCK: &str = "/sys/block";

const READ_ONLY: u32 = 1;
const NO_FLUSH: u32 = 1 << 11;

/// What udev is told by the upper half of the cookie: no rules of device-mapper, of subsystems, for `/dev/disk`, or
/// of others. As libdevmapper's `DM_UDEV_DISABLE_*_FLAG`.
const LEAVE_ALONE: u32 = 0xf << 16;

/// Device-mapper could not be used, or refused.
#[derive(Debug, thiserror::Error)]
pub enum DmError {
    /// The kernel has no device-mapper, or it is not loaded.
    #[error("this kernel has no device-mapper: as root run `modprobe dm_mod` (CONFIG_BLK_DEV_DM)")]
    Missing,
    /// It may not be used.
    #[error("no permission to use device-mapper, which only root has")]
    NoPermission,
    /// It could not be opened.
    #[error("cannot open `{CONTROL}`")]
    Open(#[source] Errno),
    /// The kernel refuses.
    #[error("device-mapper cannot {action} `{name}`")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// The device's name or uuid.
        name: String,
        /// Why.
        #[source]
        source: Errno,
    },
    /// A device of somebody else has the name.
    #[error("there is a device-mapper device `{0}` that is not ours; it was not touched")]
    Foreign(String),
    /// A name, uuid or table is longer than device-mapper allows.
    #[error("`{0}` is too long for device-mapper")]
    TooLong(String),
    /// The kernel's answer makes no sense.
    #[error("device-mapper answered something else about `{0}`")]
    Answer(String),
}

impl DmError {
    /// Whether the device is open, or in a table.
    pub const fn is_busy(&self) -> bool {
        matches!(
            self,
            Self::Refused {
                source: Errno::BUSY,
                ..
            }
        )
    }
}

/// One line of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Where it begins, in sectors of 512 bytes.
    pub start: u64,
    /// How long it is, in sectors.
    pub sectors: u64,
    /// Its kind, such as `linear`.
    pub kind: String,
    /// Its parameters, or its status.
    pub text: String,
}

/// What is known of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Its uuid, which may be empty.
    pub uuid: String,
    /// Its number.
    pub number: Number,
}

impl Device {
    /// The node that the kernel makes of it.
    pub fn node(&self) -> PathBuf {
        PathBuf::from(format!("/dev/dm-{}", self.number.minor))
    }
}

/// A block device's number, as tables name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Number {
    /// The driver.
    pub major: u32,
    /// Which of its devices.
    pub minor: u32,
}

impl Number {
    /// From the form that device-mapper's answers have.
    fn from_kernel(dev: u64) -> Self {
        // As the kernel's `huge_encode_dev`: 12 bits of major between the halves of the minor.
        Self {
            major: (dev >> 8 & 0xfff) as u32,
            minor: (dev & 0xff | dev >> 12 & 0xfff00) as u32,
        }
    }

    /// Of an open device.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn of(device: impl AsFd) -> Result<Self, Errno> {
        let number = rustix::fs::fstat(device)?.st_rdev;
        Ok(Self {
            major: rustix::fs::major(number),
            minor: rustix::fs::minor(number),
        })
    }
}

impl std::fmt::Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// How a device is found.
#[derive(Debug, Clone, Copy)]
enum By<'a> {
    Name(&'a str),
    Uuid(&'a str),
    Nothing,
}

impl By<'_> {
    fn text(&self) -> String {
        match self {
            Self::Name(text) | Self::Uuid(text) => (*text).to_owned(),
            Self::Nothing => "any device".to_owned(),
        }
    }
}

/// An open control node.
#[derive(Debug)]
pub struct Control {
    node: OwnedFd,
}

impl Control {
    /// Opens the control node; where nobody made one, by the number that it always has.
    ///
    /// # Errors
    /// The kernel has no device-mapper, or we may not use it.
    pub fn open() -> Result<Self, DmError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let node = match rustix::fs::open(CONTROL, flags, Mode::empty()) {
            Err(Errno::NOENT) => open_by_number(flags),
            opened => opened,
        };
        let node = node.map_err(|errno| match errno {
            Errno::NOENT | Errno::NODEV | Errno::NXIO => DmError::Missing,
            Errno::ACCESS | Errno::PERM => DmError::NoPermission,
            errno => DmError::Open(errno),
        })?;
        let control = Self { node };
        control.ask::<DM_VERSION>("open", By::Nothing, 0, 0, &[])?;
        Ok(control)
    }

    /// The device with `uuid`, if there is one.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn find(&self, uuid: &str) -> Result<Option<Device>, DmError> {
        self.look(By::Uuid(uuid))
    }

    fn look(&self, by: By<'_>) -> Result<Option<Device>, DmError> {
        match self.ask::<DM_DEV_STATUS>("look at", by, 0, 0, &[]) {
            Ok(answer) => answer.device().map(Some),
            Err(DmError::Refused {
                source: Errno::NXIO,
                ..
            }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a device with `table` and brings it into use. After an error nothing is left of it.
    ///
    /// # Errors
    /// A device of that name is there, or the kernel refuses the table.
    pub fn create(
        &self,
        name: &str,
        uuid: &str,
        table: &[Target],
        read_only: bool,
    ) -> Result<Device, DmError> {
        if let Some(there) = self.look(By::Name(name))?
            && there.uuid != uuid
        {
            return Err(DmError::Foreign(name.to_owned()));
        }
        let mode = if read_only { READ_ONLY } else { 0 };
        self.ask_named::<DM_DEV_CREATE>("make", name, uuid, mode)?;
        let by = By::Uuid(uuid);
        let made = encode_table(table)
            .and_then(|table| self.ask::<DM_TABLE_LOAD>("give a table to", by, mode, 0, &table))
            .and_then(|_| self.ask::<DM_DEV_SUSPEND>("start", by, mode, LEAVE_ALONE, &[]))
            .and_then(|_| {
                self.find(uuid)?
                    .ok_or_else(|| DmError::Answer(name.to_owned()))
            });
        if made.is_err() {
            // The first failure is what counts.
            let _ = self.remove(uuid);
        }
        made
    }

    /// Removes the device with `uuid`; no error if there is none.
    ///
    /// # Errors
    /// It is open ([`DmError::is_busy`]), or the kernel refuses.
    pub fn remove(&self, uuid: &str) -> Result<(), DmError> {
        match self.ask::<DM_DEV_REMOVE>("remove", By::Uuid(uuid), 0, LEAVE_ALONE, &[]) {
            Ok(_)
            | Err(DmError::Refused {
                source: Errno::NXIO,
                ..
            }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The status of each line of a device's table; `None` if there is no such device.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn status(&self, uuid: &str) -> Result<Option<Vec<Target>>, DmError> {
        self.targets(uuid, NO_FLUSH)
    }

    fn targets(&self, uuid: &str, flags: u32) -> Result<Option<Vec<Target>>, DmError> {
        match self.ask::<DM_TABLE_STATUS>("look at", By::Uuid(uuid), flags, 0, &[]) {
            Ok(answer) => answer.targets().map(Some),
            Err(DmError::Refused {
                source: Errno::NXIO,
                ..
            }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The devices below a device.
    ///
    /// # Errors
    /// There is no such device, or the kernel refuses.
    pub fn below(&self, uuid: &str) -> Result<Vec<Number>, DmError> {
        let answer = self.ask::<DM_TABLE_DEPS>("look below", By::Uuid(uuid), 0, 0, &[])?;
        answer.dependencies()
    }

    fn ask<const CODE: u32>(
        &self,
        action: &'static str,
        by: By<'_>,
        flags: u32,
        cookie: u32,
        data: &[u8],
    ) -> Result<Answer, DmError> {
        let (name, uuid) = match by {
            By::Name(name) => (name, ""),
            By::Uuid(uuid) => ("", uuid),
            By::Nothing => ("", ""),
        };
        let message = Message::new(name, uuid, flags, cookie, data)?;
        self.send::<CODE>(action, by.text(), message)
    }

    /// Only the making of a device gives both.
    fn ask_named<const CODE: u32>(
        &self,
        action: &'static str,
        name: &str,
        uuid: &str,
        flags: u32,
    ) -> Result<Answer, DmError> {
        let message = Message::new(name, uuid, flags, 0, &[])?;
        self.send::<CODE>(action, name.to_owned(), message)
    }

    #[expect(unsafe_code, reason = "the one ioctl of device-mapper's control node")]
    fn send<const CODE: u32>(
        &self,
        action: &'static str,
        name: String,
        mut message: Message,
    ) -> Result<Answer, DmError> {
        let request = Request::<CODE>(&mut message);
        // SAFETY: all ioctls of this node read and write a `struct dm_ioctl` of which `data_size` bytes are ours,
        // which `Message` has and says.
        let sent = unsafe { ioctl(&self.node, request) };
        sent.map_err(|source| DmError::Refused {
            action,
            name: name.clone(),
            source,
        })?;
        Answer::new(message, name)
    }
}

/// Makes a node of our own for as long as it takes to open it.
fn open_by_number(flags: OFlags) -> Result<OwnedFd, Errno> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    // Two threads must not take the node from each other.
    let (pid, nth) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = PathBuf::from(format!("/dev/.banger-device-mapper-{pid}-{nth}"));
    let (major, minor) = CONTROL_DEVICE;
    let number = rustix::fs::makedev(major, minor);
    let mode = Mode::RUSR | Mode::WUSR;
    match rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        FileType::CharacterDevice,
        mode,
        number,
    ) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    let opened = rustix::fs::open(&path, flags, Mode::empty());
    // It is ours and has done its work.
    let _ = std::fs::remove_file(Path::new(&path));
    opened
}

/// The uuids of all devices, which everybody may see.
pub fn seen() -> Vec<String> {
    seen_in(Path::new(BLOCK))
        .into_iter()
        .map(|(uuid, _)| uuid)
        .collect()
}

/// The loop devices that stand in the table of a device: its uuid, the loop device's name, and what the kernel says
/// of its file. Everybody may see this.
pub fn loops_below() -> Vec<(String, String, String)> {
    loops_in(Path::new(BLOCK))
}

/// The uuid of each device in a folder like `/sys/block`, and its own folder there.
fn seen_in(block: &Path) -> Vec<(String, PathBuf)> {
    let Ok(devices) = std::fs::read_dir(block) else {
        return Vec::new();
    };
    let device = |entry: std::fs::DirEntry| {
        let uuid = std::fs::read_to_string(entry.path().join("dm/uuid")).ok()?;
        Some((uuid.trim_end().to_owned(), entry.path()))
    };
    devices.flatten().filter_map(device).collect()
}

fn loops_in(block: &Path) -> Vec<(String, String, String)> {
    let mut found = Vec::new();
    for (uuid, folder) in seen_in(block) {
        let below = std::fs::read_dir(folder.join("slaves"));
        for entry in below.into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let file = block.join(&name).join("loop/backing_file");
            if let Ok(file) = std::fs::read_to_string(file) {
                found.push((uuid.clone(), name, file.trim_end_matches('\n').to_owned()));
            }
        }
    }
    found.sort_unstable();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loop_devices_are_found_below_the_devices_that_stand_on_them() {
        let block = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = block.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("dm-0/dm/uuid", "BANGER-0-origin\n");
        write("dm-0/slaves/loop3", "");
        write("dm-1/dm/uuid", "BANGER-0\n");
        write("dm-1/slaves/dm-0", "");
        write("dm-1/slaves/loop4", "");
        write("loop3/loop/backing_file", "/images/root.img\n");
        write("loop4/loop/backing_file", "/vms/overlay.img (deleted)\n");
        write("loop5/loop/backing_file", "/somebody/else\n");
        let found = loops_in(block.path());
        let found: Vec<[&str; 3]> = found
            .iter()
            .map(|(uuid, name, file)| [uuid.as_str(), name.as_str(), file.as_str()])
            .collect();
        assert_eq!(
            found,
            [
                ["BANGER-0", "loop4", "/vms/overlay.img (deleted)"],
                ["BANGER-0-origin", "loop3", "/images/root.img"],
            ]
        );
    }

    #[test]
    fn numbers_are_read_from_the_kernels_encoding() {
        let number = Number::from_kernel(254 << 8 | 3);
        assert_eq!(number.to_string(), "254:3");
        let number = Number::from_kernel(0x10_0000 | 7 << 8 | 5);
        assert_eq!(number.to_string(), "7:261");
    }

    #[test]
    fn device_mapper_finds_nothing_of_a_name_nobody_has_and_a_machine_without_it_says_so() {
        match Control::open() {
            Ok(control) => {
                let found = control.find("BANGER-no-such-device").unwrap();
                assert_eq!(found, None);
            }
            Err(error) => assert!(
                matches!(error, DmError::Missing | DmError::NoPermission),
                "{error:?}"
            ),
        }
    }
}
