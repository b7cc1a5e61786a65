//! Finding the drives and proving that each is the one that the host meant, before anything is mounted.

use super::{Fatal, uevents};
use banger_guest::boot_config::{BootConfig, Drive, DriveRole, MAX_DRIVE_BYTES};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

/// How long a drive may take to appear.
const APPEAR_LIMIT: Duration = Duration::from_secs(10);
/// Where in the attachment order the config drive is.
const CONFIG_INDEX: usize = 2;

/// The role in words.
pub(crate) fn word(role: DriveRole) -> &'static str {
    match role {
        DriveRole::Root => "root",
        DriveRole::Modules => "modules",
        DriveRole::Config => "config",
        DriveRole::Overlay => "overlay",
        DriveRole::Disk => "work disk",
    }
}

/// The device of the drive at `index` of the attachment order.
pub(crate) fn device(index: usize) -> PathBuf {
    let letter = char::from(b'a' + index.min(25) as u8);
    PathBuf::from(format!("/dev/vd{letter}"))
}

/// What banger needs to know of an ext4 superblock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Superblock {
    /// The filesystem's UUID, lower case, with hyphens.
    pub(crate) uuid: String,
    /// Bytes in a block.
    pub(crate) block_bytes: u64,
    /// Blocks in the filesystem.
    pub(crate) blocks: u64,
}

/// Where the superblock starts on a drive.
const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK_BYTES: usize = 1024;

impl Superblock {
    /// Reads a superblock; `None` if these bytes are not an ext4 one.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; SUPERBLOCK_BYTES] = bytes.first_chunk()?;
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        if bytes[0x38..0x3a] != [0x53, 0xef] {
            return None;
        }
        // 64 KiB is the largest block that ext4 knows.
        let block_bytes = (word(0x18) <= 6).then(|| 1024 << word(0x18))?;
        const INCOMPAT_64BIT: u32 = 0x80;
        let high = if word(0x60) & INCOMPAT_64BIT != 0 {
            word(0x150)
        } else {
            0
        };
        let mut uuid = String::with_capacity(36);
        for (index, byte) in bytes[0x68..0x78].iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                uuid.push('-');
            }
            uuid.push_str(&format!("{byte:02x}"));
        }
        Some(Self {
            uuid,
            block_bytes,
            blocks: u64::from(high) << 32 | u64::from(word(0x04)),
        })
    }
}

/// Opens a drive, waiting for it to appear.
fn open(role: DriveRole, index: usize) -> Result<File, Fatal> {
    let path = device(index);
    let open = || File::open(&path).ok();
    uevents::wait_for(APPEAR_LIMIT, open).ok_or_else(|| {
        Fatal(format!(
            "the {} drive {} did not appear within {} s",
            word(role),
            path.display(),
            APPEAR_LIMIT.as_secs()
        ))
    })
}

/// Reads the config drive.
pub(crate) fn read_config() -> Result<BootConfig, Fatal> {
    let file = open(DriveRole::Config, CONFIG_INDEX)?;
    let mut bytes = Vec::with_capacity(4096);
    file.take(MAX_DRIVE_BYTES as u64)
        .read_to_end(&mut bytes)
        .map_err(|error| Fatal(format!("cannot read the config drive: {error}")))?;
    BootConfig::from_drive(&bytes).map_err(|error| Fatal(error.to_string()))
}

/// A drive that holds what the host said it holds.
#[derive(Debug, Clone)]
pub(crate) struct Checked {
    /// What the host said.
    pub(crate) drive: Drive,
    /// Its device.
    pub(crate) device: PathBuf,
    /// Its filesystem.
    pub(crate) superblock: Superblock,
}

/// The checked drives by role.
#[derive(Debug)]
pub(crate) struct Drives {
    pub(crate) root: Checked,
    pub(crate) modules: Option<Checked>,
    pub(crate) overlay: Option<Checked>,
    pub(crate) disk: Option<Checked>,
}

/// Checks every drive against what the host said it must hold.
pub(crate) fn check(config: &BootConfig) -> Result<Drives, Fatal> {
    let mut found: Vec<Checked> = Vec::with_capacity(config.drives.len());
    for (index, drive) in config.drives.iter().enumerate() {
        let Some(expected) = &drive.uuid else {
            continue;
        };
        let device = device(index);
        let file = open(drive.role, index)?;
        let mut bytes = [0; SUPERBLOCK_BYTES];
        let superblock = file
            .read_exact_at(&mut bytes, SUPERBLOCK_AT)
            .ok()
            .and_then(|()| Superblock::parse(&bytes));
        let superblock = match superblock {
            Some(superblock) if superblock.uuid == *expected => superblock,
            other => {
                let holds = other.map_or_else(
                    || "no ext4 filesystem".to_owned(),
                    |superblock| format!("filesystem {}", superblock.uuid),
                );
                return Err(Fatal(format!(
                    "the {} drive {} must hold filesystem {expected} but holds {holds}",
                    word(drive.role),
                    device.display()
                )));
            }
        };
        found.push(Checked {
            drive: drive.clone(),
            device,
            superblock,
        });
    }
    let take = |role: DriveRole| {
        found
            .iter()
            .find(|checked| checked.drive.role == role)
            .cloned()
    };
    Ok(Drives {
        root: take(DriveRole::Root)
            .ok_or_else(|| Fatal("the config drive names no root drive".to_owned()))?,
        modules: take(DriveRole::Modules),
        overlay: take(DriveRole::Overlay),
        disk: take(DriveRole::Disk),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock() -> Vec<u8> {
        let mut bytes = vec![0; SUPERBLOCK_BYTES];
        bytes[0x38..0x3a].copy_from_slice(&[0x53, 0xef]);
        bytes[0x18] = 2;
        bytes[0x04] = 7;
        for (index, byte) in bytes[0x68..0x78].iter_mut().enumerate() {
            *byte = 0xa0 + index as u8;
        }
        bytes
    }

    #[test]
    fn a_superblock_gives_its_uuid_block_size_and_length() {
        assert_eq!(
            Superblock::parse(&superblock()),
            Some(Superblock {
                uuid: "a0a1a2a3-a4a5-a6a7-a8a9-aaabacadaeaf".to_owned(),
                block_bytes: 4096,
                blocks: 7,
            })
        );
    }

    #[test]
    fn the_high_half_of_the_length_counts_only_with_the_64bit_feature() {
        let mut bytes = superblock();
        bytes[0x150] = 1;
        assert_eq!(Superblock::parse(&bytes).unwrap().blocks, 7);
        bytes[0x60] = 0x80;
        assert_eq!(Superblock::parse(&bytes).unwrap().blocks, (1 << 32) + 7);
    }

    #[test]
    fn bytes_without_the_magic_or_with_an_absurd_block_size_are_no_superblock() {
        assert_eq!(Superblock::parse(&[0; 1024]), None);
        assert_eq!(Superblock::parse(&superblock()[..1000]), None);
        let mut absurd = superblock();
        absurd[0x18] = 63;
        assert_eq!(Superblock::parse(&absurd), None);
    }

    #[test]
    fn drives_are_named_in_attachment_order() {
        assert_eq!(device(0), PathBuf::from("/dev/vda"));
        assert_eq!(device(4), PathBuf::from("/dev/vde"));
    }
}
