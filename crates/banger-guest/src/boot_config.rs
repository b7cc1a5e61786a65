//! The config drive: how a guest learns who it is.
//!
//! A raw, read-only drive of at most [`MAX_DRIVE_BYTES`]: [`MAGIC`] (8 bytes), the JSON's length and its CRC-32C
//! (both `u32`, little-endian), then the JSON of a [`BootConfig`], then zeros up to a multiple of 4096 bytes.
//!
//! The order of drives is the contract of every VMM driver: [`DriveRole::Root`], [`DriveRole::Modules`],
//! [`DriveRole::Config`], then those of [`DriveRole::Overlay`] and [`DriveRole::Disk`] that the VM has.

use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

/// The first bytes of a config drive.
pub const MAGIC: [u8; 8] = *b"BANGERC1";
/// The largest config drive, header included.
pub const MAX_DRIVE_BYTES: usize = 64 * 1024;
const HEADER_BYTES: usize = 16;
const BLOCK_BYTES: usize = 4096;

/// What a drive is for. Drives are attached in the order of the variants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DriveRole {
    /// The image, read-only, or the VM's own copy of it.
    Root,
    /// `/usr/lib/modules/<release>`, read-only.
    Modules,
    /// The config drive itself.
    Config,
    /// The VM's own layer over a read-only root.
    Overlay,
    /// The VM's work disk.
    Disk,
}

/// One attached drive and what it must hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// What it is for.
    pub role: DriveRole,
    /// The UUID that its ext4 superblock must carry (lower case, with hyphens); `None` for the config drive.
    /// A drive with another UUID is an error, never a reason to format it.
    pub uuid: Option<String>,
    /// Whether it is attached and to be mounted read-only.
    pub read_only: bool,
    /// Grow its filesystem to the size of the drive after mounting it.
    pub grow: bool,
    /// Where it is mounted, for a work disk.
    pub mount_at: Option<String>,
}

/// The guest's one NIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// The MAC by which the NIC is found; it is then named `eth0`.
    pub mac: String,
    /// The guest's address.
    pub address: Ipv4Addr,
    /// Its on-link prefix length.
    pub prefix: u8,
    /// Its default gateway.
    pub gateway: Ipv4Addr,
    /// Name servers for `/etc/resolv.conf`; may be empty.
    pub dns: Vec<Ipv4Addr>,
}

/// Everything a guest must know to become one particular VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// The host name.
    pub hostname: String,
    /// The VM's id, for `/etc/machine-id` (its 32 hexadecimal digits).
    pub vm_id: String,
    /// Lines of root's `authorized_keys`.
    pub authorized_keys: Vec<String>,
    /// The ssh host key in OpenSSH's private format.
    pub host_key: String,
    /// Its public half, one line.
    pub host_key_public: String,
    /// The NIC; `None` leaves the guest without a network.
    pub network: Option<Network>,
    /// 32 bytes for the kernel's random pool, in hexadecimal.
    pub seed: String,
    /// The host's time in seconds since 1970 when this was written.
    pub time: i64,
    /// All drives, in the order in which they are attached.
    pub drives: Vec<Drive>,
    /// The image's init.
    pub init: String,
}

/// Why bytes are not a config drive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BootConfigError {
    /// The drive is shorter than it says or than a header.
    Truncated,
    /// The magic is missing.
    Magic,
    /// The length is larger than [`MAX_DRIVE_BYTES`] allows.
    TooLong(usize),
    /// The checksum does not match.
    Checksum,
    /// The JSON is not a boot config.
    Json(String),
}

impl std::fmt::Display for BootConfigError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Truncated => f.write_str("the config drive is truncated"),
            Self::Magic => f.write_str("the config drive does not start with its magic"),
            Self::TooLong(length) => {
                write!(f, "the config drive's JSON of {length} bytes is too long")
            }
            Self::Checksum => f.write_str("the config drive's checksum does not match"),
            Self::Json(error) => write!(f, "the config drive's JSON cannot be read: {error}"),
        }
    }
}

impl std::error::Error for BootConfigError {}

impl BootConfig {
    /// The bytes of the config drive: a multiple of 4096.
    pub fn to_drive(&self) -> Result<Vec<u8>, BootConfigError> {
        let json =
            serde_json::to_vec(self).map_err(|error| BootConfigError::Json(error.to_string()))?;
        if HEADER_BYTES + json.len() > MAX_DRIVE_BYTES {
            return Err(BootConfigError::TooLong(json.len()));
        }
        let mut drive = Vec::with_capacity(HEADER_BYTES + json.len() + BLOCK_BYTES);
        drive.extend_from_slice(&MAGIC);
        drive.extend_from_slice(&(json.len() as u32).to_le_bytes());
        drive.extend_from_slice(&crc32c::crc32c(&json).to_le_bytes());
        drive.extend_from_slice(&json);
        drive.resize(drive.len().next_multiple_of(BLOCK_BYTES), 0);
        Ok(drive)
    }

    /// Reads a config drive. Bytes after the JSON are ignored.
    pub fn from_drive(drive: &[u8]) -> Result<Self, BootConfigError> {
        let header: &[u8; HEADER_BYTES] = drive.first_chunk().ok_or(BootConfigError::Truncated)?;
        if header[..8] != MAGIC {
            return Err(BootConfigError::Magic);
        }
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let length = word(8) as usize;
        if HEADER_BYTES + length > MAX_DRIVE_BYTES {
            return Err(BootConfigError::TooLong(length));
        }
        let json = drive
            .get(HEADER_BYTES..HEADER_BYTES + length)
            .ok_or(BootConfigError::Truncated)?;
        if crc32c::crc32c(json) != word(12) {
            return Err(BootConfigError::Checksum);
        }
        serde_json::from_slice(json).map_err(|error| BootConfigError::Json(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> BootConfig {
        let drive = |role, uuid: Option<&str>| Drive {
            role,
            uuid: uuid.map(str::to_owned),
            read_only: role != DriveRole::Disk,
            grow: false,
            mount_at: None,
        };
        BootConfig {
            hostname: "calm-otter".to_owned(),
            vm_id: "0192f3a4-1111-7222-8333-444455556666".to_owned(),
            authorized_keys: vec!["ssh-ed25519 AAAA me".to_owned()],
            host_key: "private".to_owned(),
            host_key_public: "public".to_owned(),
            network: Some(Network {
                mac: "02:00:00:00:00:01".to_owned(),
                address: Ipv4Addr::new(172, 16, 0, 2),
                prefix: 20,
                gateway: Ipv4Addr::new(172, 16, 0, 1),
                dns: vec![Ipv4Addr::new(172, 16, 0, 1)],
            }),
            seed: "00".repeat(32),
            time: 1_800_000_000,
            drives: vec![
                drive(
                    DriveRole::Root,
                    Some("a0a1a2a3-a4a5-a6a7-a8a9-aaabacadaeaf"),
                ),
                drive(DriveRole::Config, None),
            ],
            init: "/sbin/init".to_owned(),
        }
    }

    #[test]
    fn a_config_drive_reads_back_as_what_was_written() {
        let drive = config().to_drive().unwrap();
        assert_eq!(drive.len() % BLOCK_BYTES, 0);
        assert_eq!(BootConfig::from_drive(&drive).unwrap(), config());
    }

    #[test]
    fn bytes_after_the_json_are_ignored() {
        let mut drive = config().to_drive().unwrap();
        drive.extend_from_slice(b"whatever");
        assert_eq!(BootConfig::from_drive(&drive).unwrap(), config());
    }

    #[test]
    fn a_drive_cut_off_anywhere_is_an_error() {
        let drive = config().to_drive().unwrap();
        let length = drive
            .iter()
            .rposition(|byte| *byte != 0)
            .expect("the JSON is not empty");
        for end in 0..=length {
            let error = BootConfig::from_drive(&drive[..end]).unwrap_err();
            assert_eq!(error, BootConfigError::Truncated, "cut at {end}");
        }
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let drive = config().to_drive().unwrap();
        for at in [0, 7, 8, 12, 16, 100] {
            let mut changed = drive.clone();
            changed[at] ^= 1;
            BootConfig::from_drive(&changed).unwrap_err();
        }
    }

    #[test]
    fn a_drive_without_the_magic_is_refused_as_such() {
        let drive = [0; 4096];
        assert_eq!(BootConfig::from_drive(&drive), Err(BootConfigError::Magic));
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_it_is_believed() {
        let mut drive = config().to_drive().unwrap();
        drive[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        let error = BootConfig::from_drive(&drive).unwrap_err();
        assert_eq!(error, BootConfigError::TooLong(u32::MAX as usize));
    }

    #[test]
    fn the_largest_config_fits_and_one_byte_more_does_not() {
        let mut config = config();
        let json = serde_json::to_vec(&config).unwrap().len();
        let room = MAX_DRIVE_BYTES - HEADER_BYTES - json;
        config.hostname.push_str(&"x".repeat(room));
        let drive = config.to_drive().unwrap();
        assert_eq!(drive.len(), MAX_DRIVE_BYTES);
        assert_eq!(BootConfig::from_drive(&drive).unwrap(), config);
        config.hostname.push('x');
        let error = config.to_drive().unwrap_err();
        let length = MAX_DRIVE_BYTES - HEADER_BYTES + 1;
        assert_eq!(error, BootConfigError::TooLong(length));
    }

    #[test]
    fn json_that_is_no_boot_config_is_refused() {
        let json = br#"{"hostname":"x","surprise":1}"#;
        let mut drive = MAGIC.to_vec();
        drive.extend_from_slice(&(json.len() as u32).to_le_bytes());
        drive.extend_from_slice(&crc32c::crc32c(json).to_le_bytes());
        drive.extend_from_slice(json);
        let error = BootConfig::from_drive(&drive).unwrap_err();
        assert!(matches!(error, BootConfigError::Json(_)), "{error}");
    }
}
