//! Device-mapper by its ioctls: devices of our own are made, looked at and removed by their uuid. udev is told to
//! leave them alone: it neither probes nor names them.

use linux_raw_sys::ioctl::{
    DM_DEV_CREATE, DM_DEV_REMOVE, DM_DEV_STATUS, DM_DEV_SUSPEND, DM_LIST_DEVICES, DM_TABLE_DEPS,
    DM_TABLE_LOAD, DM_TABLE_STATUS, DM_VERSION,
};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};
use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The control node, which udev makes where there is one.
const CONTROL: &str = "/dev/mapper/control";
/// The number of device-mapper among the miscellaneous devices, for ever.
const CONTROL_DEVICE: (u32, u32) = (10, 236);
/// `struct dm_ioctl`, to the end of its padding.
const HEADER_BYTES: usize = 312;
/// `struct dm_target_spec`.
const TARGET_BYTES: usize = 40;
/// Room for what the kernel answers: a few targets of one line each, or all devices of a machine.
const ANSWER_BYTES: usize = 64 * 1024;
const NAME_BYTES: usize = 128;
const UUID_BYTES: usize = 129;

const READ_ONLY: u32 = 1;
const BUFFER_FULL: u32 = 1 << 8;
const NO_FLUSH: u32 = 1 << 11;

/// What udev is told by the upper half of the cookie: no rules of device-mapper, of subsystems, for `/dev/disk`, or
/// of others. As libdevmapper's `DM_UDEV_DISABLE_*_FLAG`.
const LEAVE_ALONE: u32 = 0xf << 16;

/// How long a stranger that looks at a device, as `lsblk` does, may keep it open.
const CLOSED_WITHIN: Duration = Duration::from_secs(5);

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

    /// Removes the device with `uuid`; no error if there is none. Waits a while for one that is open.
    ///
    /// # Errors
    /// It stays open, or the kernel refuses.
    pub fn remove(&self, uuid: &str) -> Result<(), DmError> {
        let deadline = Instant::now() + CLOSED_WITHIN;
        loop {
            match self.ask::<DM_DEV_REMOVE>("remove", By::Uuid(uuid), 0, LEAVE_ALONE, &[]) {
                Ok(_)
                | Err(DmError::Refused {
                    source: Errno::NXIO,
                    ..
                }) => return Ok(()),
                // The kernel has no event for the close by whoever looks at it.
                Err(DmError::Refused {
                    source: Errno::BUSY,
                    ..
                }) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
                Err(error) => return Err(error),
            }
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

    /// The uuids of all devices that have one.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn uuids(&self) -> Result<Vec<String>, DmError> {
        let answer = self.ask::<DM_LIST_DEVICES>("list", By::Nothing, 0, 0, &[])?;
        let mut uuids = Vec::new();
        for name in answer.names()? {
            // One may go while we look.
            if let Some(device) = self.look(By::Name(&name))?
                && !device.uuid.is_empty()
            {
                uuids.push(device.uuid);
            }
        }
        Ok(uuids)
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
        let answer = Answer { message, name };
        if answer.message.word(28) & BUFFER_FULL != 0 {
            return Err(DmError::Answer(answer.name));
        }
        Ok(answer)
    }
}

/// Makes a node of our own for as long as it takes to open it.
fn open_by_number(flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = PathBuf::from(format!("/dev/.banger-device-mapper-{}", std::process::id()));
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
    let Ok(devices) = std::fs::read_dir("/sys/block") else {
        return Vec::new();
    };
    devices
        .flatten()
        .filter_map(|device| std::fs::read_to_string(device.path().join("dm/uuid")).ok())
        .map(|uuid| uuid.trim_end().to_owned())
        .collect()
}

/// A `struct dm_ioctl` with room for data, aligned as the kernel has it.
struct Message {
    words: Vec<u64>,
}

impl Message {
    fn new(name: &str, uuid: &str, flags: u32, cookie: u32, data: &[u8]) -> Result<Self, DmError> {
        if name.len() >= NAME_BYTES || uuid.len() >= UUID_BYTES {
            return Err(DmError::TooLong(format!("{name}{uuid}")));
        }
        let bytes = (HEADER_BYTES + data.len()).max(ANSWER_BYTES);
        let mut message = Self {
            words: vec![0; bytes.div_ceil(8)],
        };
        let size = message.words.len() * 8;
        let size = u32::try_from(size).map_err(|_| DmError::TooLong(name.to_owned()))?;
        // Version 4.0.0 is what every kernel of this millennium speaks.
        message.set_word(0, 4);
        message.set_word(12, size);
        message.set_word(16, HEADER_BYTES as u32);
        let targets = u32::from(!data.is_empty()) * count_targets(data);
        message.set_word(20, targets);
        message.set_word(28, flags);
        message.set_word(32, cookie);
        message.put(48, name.as_bytes());
        message.put(48 + NAME_BYTES, uuid.as_bytes());
        message.put(HEADER_BYTES, data);
        Ok(message)
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (offset, &byte) in bytes.iter().enumerate() {
            let (word, shift) = ((at + offset) / 8, (at + offset) % 8 * 8);
            self.words[word] = self.words[word] & !(0xff << shift) | u64::from(byte) << shift;
        }
    }

    fn set_word(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_le_bytes());
    }

    fn byte(&self, at: usize) -> u8 {
        let word = self.words.get(at / 8).copied().unwrap_or_default();
        (word >> (at % 8 * 8)) as u8
    }

    fn word(&self, at: usize) -> u32 {
        u32::from_le_bytes([0, 1, 2, 3].map(|offset| self.byte(at + offset)))
    }

    fn long(&self, at: usize) -> u64 {
        u64::from(self.word(at)) | u64::from(self.word(at + 4)) << 32
    }

    /// The text at `at`, up to its NUL or `limit`.
    fn text(&self, at: usize, limit: usize) -> String {
        let bytes: Vec<u8> = (at..at + limit)
            .map(|at| self.byte(at))
            .take_while(|&byte| byte != 0)
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

struct Request<'a, const CODE: u32>(&'a mut Message);

#[expect(
    unsafe_code,
    reason = "an ioctl whose argument is larger than its type says"
)]
// SAFETY: the pointer is to `data_size` bytes that are ours for the length of the call; nothing is returned from it.
unsafe impl<const CODE: u32> Ioctl for Request<'_, CODE> {
    type Output = ();
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        Opcode::from(CODE)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.0.words.as_mut_ptr().cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

/// The kernel's answer about `name`.
struct Answer {
    message: Message,
    name: String,
}

impl Answer {
    fn wrong(&self) -> DmError {
        DmError::Answer(self.name.clone())
    }

    fn device(&self) -> Result<Device, DmError> {
        Ok(Device {
            name: self.message.text(48, NAME_BYTES),
            uuid: self.message.text(48 + NAME_BYTES, UUID_BYTES),
            number: Number::from_kernel(self.message.long(40)),
        })
    }

    fn start(&self) -> usize {
        self.message.word(16) as usize
    }

    fn limit(&self) -> usize {
        self.message.words.len() * 8
    }

    fn targets(&self) -> Result<Vec<Target>, DmError> {
        let (start, count) = (self.start(), self.message.word(20));
        let mut targets = Vec::new();
        let mut at = start;
        for _ in 0..count {
            if at + TARGET_BYTES > self.limit() {
                return Err(self.wrong());
            }
            // From the first one, where the kernel speaks.
            let next = start + self.message.word(at + 20) as usize;
            let text_bytes = next.clamp(at + TARGET_BYTES, self.limit()) - at - TARGET_BYTES;
            targets.push(Target {
                start: self.message.long(at),
                sectors: self.message.long(at + 8),
                kind: self.message.text(at + 24, 16),
                text: self.message.text(at + TARGET_BYTES, text_bytes),
            });
            at = next;
        }
        Ok(targets)
    }

    fn dependencies(&self) -> Result<Vec<Number>, DmError> {
        let start = self.start();
        let count = self.message.word(start) as usize;
        if start + 8 + count.saturating_mul(8) > self.limit() {
            return Err(self.wrong());
        }
        let number = |index| Number::from_kernel(self.message.long(start + 8 + index * 8));
        Ok((0..count).map(number).collect())
    }

    fn names(&self) -> Result<Vec<String>, DmError> {
        let mut names = Vec::new();
        let mut at = self.start();
        loop {
            if at + 12 > self.limit() {
                return Err(self.wrong());
            }
            // The first record's number is 0 if there is no device at all.
            if self.message.long(at) == 0 {
                return Ok(names);
            }
            names.push(self.message.text(at + 12, NAME_BYTES));
            match self.message.word(at + 8) as usize {
                0 => return Ok(names),
                next => at += next,
            }
        }
    }
}

/// The table as the kernel reads it: each line says how far the next one is.
fn encode_table(table: &[Target]) -> Result<Vec<u8>, DmError> {
    let mut bytes = Vec::new();
    for target in table {
        if target.kind.len() >= 16 {
            return Err(DmError::TooLong(target.kind.clone()));
        }
        let length = (TARGET_BYTES + target.text.len() + 1).next_multiple_of(8);
        let next = u32::try_from(length).map_err(|_| DmError::TooLong(target.text.clone()))?;
        let start = bytes.len();
        bytes.extend(target.start.to_le_bytes());
        bytes.extend(target.sectors.to_le_bytes());
        bytes.extend(0_u32.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        bytes.extend(target.kind.as_bytes());
        bytes.resize(start + TARGET_BYTES, 0);
        bytes.extend(target.text.as_bytes());
        bytes.resize(start + length, 0);
    }
    Ok(bytes)
}

/// How many lines an encoded table has.
fn count_targets(table: &[u8]) -> u32 {
    let mut count = 0;
    let mut rest = table;
    while let Some(next) = rest.get(20..24) {
        count += 1;
        let next = u32::from_le_bytes([next[0], next[1], next[2], next[3]]);
        rest = rest.get(next as usize..).unwrap_or_default();
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Vec<Target> {
        let line = |start, sectors, kind: &str, text: &str| Target {
            start,
            sectors,
            kind: kind.to_owned(),
            text: text.to_owned(),
        };
        vec![
            line(0, 2048, "linear", "7:0 0"),
            line(2048, 1 << 40, "zero", ""),
        ]
    }

    #[test]
    fn a_table_is_written_as_the_kernel_reads_it_and_read_as_it_answers() {
        let encoded = encode_table(&table()).unwrap();
        assert_eq!(encoded.len() % 8, 0);
        assert_eq!(count_targets(&encoded), 2);
        let mut message = Message::new("name", "uuid", 0, 0, &encoded).unwrap();
        assert_eq!(message.word(20), 2);
        // In answers the distance counts from the first line on.
        let first = message.word(HEADER_BYTES + 20);
        let second = HEADER_BYTES + first as usize;
        message.set_word(second + 20, encoded.len() as u32);
        let answer = Answer {
            message,
            name: "name".to_owned(),
        };
        assert_eq!(answer.targets().unwrap(), table());
        let device = answer.device().unwrap();
        assert_eq!(
            (device.name.as_str(), device.uuid.as_str()),
            ("name", "uuid")
        );
    }

    #[test]
    fn an_answer_that_points_outside_itself_is_an_error() {
        let encoded = encode_table(&table()).unwrap();
        let mut message = Message::new("name", "", 0, 0, &encoded).unwrap();
        message.set_word(HEADER_BYTES + 20, u32::MAX);
        let answer = Answer {
            message,
            name: "name".to_owned(),
        };
        assert!(matches!(answer.targets(), Err(DmError::Answer(_))));
    }

    #[test]
    fn names_that_do_not_fit_are_refused_before_the_kernel_cuts_them() {
        let long = "x".repeat(200);
        for (name, uuid) in [(long.as_str(), ""), ("", long.as_str())] {
            assert!(matches!(
                Message::new(name, uuid, 0, 0, &[]),
                Err(DmError::TooLong(_))
            ));
        }
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
