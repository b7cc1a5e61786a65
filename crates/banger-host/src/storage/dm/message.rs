//! What device-mapper's ioctls read and write: a `struct dm_ioctl`, tables and lists after it. No system call is made
//! here.

use super::{Device, DmError, Number, Target};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode};
use std::ffi::c_void;

/// `struct dm_ioctl`, to the end of its padding.
const HEADER_BYTES: usize = 312;
/// `struct dm_target_spec`.
const TARGET_BYTES: usize = 40;
/// Room for what the kernel answers: a few targets of one line each.
const ANSWER_BYTES: usize = 64 * 1024;
const NAME_BYTES: usize = 128;
const UUID_BYTES: usize = 129;

const BUFFER_FULL: u32 = 1 << 8;

/// A `struct dm_ioctl` with room for data, aligned as the kernel has it.
pub(super) struct Message {
    words: Vec<u64>,
}

impl Message {
    pub(super) fn new(
        name: &str,
        uuid: &str,
        flags: u32,
        cookie: u32,
        data: &[u8],
    ) -> Result<Self, DmError> {
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

/// A message as the argument of the ioctl with this number.
pub(super) struct Request<'a, const CODE: u32>(pub(super) &'a mut Message);

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
pub(super) struct Answer {
    message: Message,
    name: String,
}

impl Answer {
    /// What the kernel made of `message`, which was about `name`.
    ///
    /// # Errors
    /// It did not fit.
    pub(super) fn new(message: Message, name: String) -> Result<Self, DmError> {
        if message.word(28) & BUFFER_FULL != 0 {
            return Err(DmError::Answer(name));
        }
        Ok(Self { message, name })
    }

    fn wrong(&self) -> DmError {
        DmError::Answer(self.name.clone())
    }

    pub(super) fn device(&self) -> Result<Device, DmError> {
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

    pub(super) fn targets(&self) -> Result<Vec<Target>, DmError> {
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

    pub(super) fn dependencies(&self) -> Result<Vec<Number>, DmError> {
        let start = self.start();
        let count = self.message.word(start) as usize;
        if start + 8 + count.saturating_mul(8) > self.limit() {
            return Err(self.wrong());
        }
        let number = |index| Number::from_kernel(self.message.long(start + 8 + index * 8));
        Ok((0..count).map(number).collect())
    }
}

/// The table as the kernel reads it: each line says how far the next one is.
pub(super) fn encode_table(table: &[Target]) -> Result<Vec<u8>, DmError> {
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
}
