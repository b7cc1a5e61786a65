//! Sizes that are valid by construction. `2G` always means 2 GiB.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Why a text or number is not an acceptable size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// The text cannot be read as a size.
    #[error("`{}` is not a size; write a number with K, M, G or T, such as 8G", .0.escape_debug())]
    Unreadable(String),
    /// The number of vCPUs is out of range.
    #[error("{0} vCPUs asked for; 1 to 16 are allowed")]
    Vcpus(u64),
    /// The amount of memory is out of range.
    #[error("{0} MiB of memory asked for; 128 to 32768 MiB are allowed")]
    Memory(u64),
    /// The size of a disk or overlay is out of range.
    #[error("a disk of {0} bytes asked for; 64 MiB to 16 TiB are allowed")]
    Disk(u64),
    /// The limit of CPU time is out of range.
    #[error("a limit of {0} % of one CPU asked for; 10 to 10000 are allowed")]
    CpuLimit(u64),
    /// The text cannot be read as a limit of CPU time.
    #[error("`{}` is not a limit; write per cent of one CPU, such as 150%, or none", .0.escape_debug())]
    UnreadableLimit(String),
}

/// Reads `8G`, `512M`, `64K`, `1T`, `8GiB`, or a plain number of `unit` bytes. All units are powers of 1024.
pub fn parse_bytes(text: &str, unit: u64) -> Result<u64, SizeError> {
    let error = || SizeError::Unreadable(text.to_owned());
    let trimmed = text.trim();
    let digits = trimmed
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(trimmed.len());
    let (number, suffix) = trimmed.split_at(digits);
    let number: u64 = number.parse().map_err(|_| error())?;
    let suffix = suffix.trim().to_ascii_lowercase();
    let suffix = suffix
        .strip_suffix("ib")
        .or_else(|| suffix.strip_suffix('b'))
        .unwrap_or(&suffix);
    let factor = match suffix {
        "" => unit,
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        "t" => 1 << 40,
        _ => return Err(error()),
    };
    number.checked_mul(factor).ok_or_else(error)
}

macro_rules! bounded {
    ($(#[$doc:meta])* $name:ident($inner:ty), $range:expr, $error:path) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        #[serde(try_from = "u64", into = "u64")]
        #[schemars(with = "u64")]
        pub struct $name($inner);

        impl $name {
            /// Checks `value` against the allowed range.
            pub fn new(value: u64) -> Result<Self, SizeError> {
                if $range.contains(&value) { Ok(Self(value as $inner)) } else { Err($error(value)) }
            }

            /// The number itself.
            pub const fn get(self) -> $inner {
                self.0
            }
        }

        impl TryFrom<u64> for $name {
            type Error = SizeError;
            fn try_from(value: u64) -> Result<Self, SizeError> {
                Self::new(value)
            }
        }

        impl From<$name> for u64 {
            fn from(value: $name) -> u64 {
                u64::from(value.0)
            }
        }
    };
}

bounded!(
    /// A number of virtual CPUs, 1 to 16.
    VcpuCount(u8), (1..=16), SizeError::Vcpus
);
bounded!(
    /// An amount of guest memory in MiB, 128 to 32768.
    MemoryMib(u32), (128..=32768), SizeError::Memory
);
bounded!(
    /// The size of a disk or overlay in bytes, 64 MiB to 16 TiB.
    DiskBytes(u64), ((64 << 20)..=(16 << 40)), SizeError::Disk
);

bounded!(
    /// How much CPU time a VM may take, in per cent of one CPU, 10 to 10000.
    CpuLimit(u32), (10..=10_000), SizeError::CpuLimit
);

impl CpuLimit {
    /// Reads `150%` or `150`; `none` is no limit.
    pub fn parse(text: &str) -> Result<Option<Self>, SizeError> {
        if text == "none" {
            return Ok(None);
        }
        let digits = text.strip_suffix('%').unwrap_or(text);
        let number = digits.bytes().all(|byte| byte.is_ascii_digit());
        let number = number.then(|| digits.parse().ok()).flatten();
        let number = number.ok_or_else(|| SizeError::UnreadableLimit(text.to_owned()))?;
        Self::new(number).map(Some)
    }
}

impl std::fmt::Display for CpuLimit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}%", self.0)
    }
}

impl MemoryMib {
    /// Reads `1024` (MiB) or `2G`.
    pub fn parse(text: &str) -> Result<Self, SizeError> {
        Self::new(parse_bytes(text, 1 << 20)? >> 20)
    }
}

impl DiskBytes {
    /// Reads `8G`, or a plain number of bytes.
    pub fn parse(text: &str) -> Result<Self, SizeError> {
        Self::new(parse_bytes(text, 1)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_powers_of_1024() {
        assert_eq!(parse_bytes("2G", 1), Ok(2 << 30));
        assert_eq!(parse_bytes("2GiB", 1), Ok(2 << 30));
        assert_eq!(parse_bytes("2gb", 1), Ok(2 << 30));
        assert_eq!(parse_bytes(" 512 M ", 1), Ok(512 << 20));
        assert_eq!(MemoryMib::parse("1024").map(MemoryMib::get), Ok(1024));
        assert_eq!(MemoryMib::parse("2G").map(MemoryMib::get), Ok(2048));
    }

    #[test]
    fn nonsense_and_overflow_are_refused() {
        for bad in ["", "G", "2X", "-1", "1.5G", "99999999999T", "2 G G", "١G"] {
            assert!(
                matches!(parse_bytes(bad, 1), Err(SizeError::Unreadable(_))),
                "{bad}"
            );
        }
    }

    #[test]
    fn limits_are_in_per_cent() {
        let parsed = |text: &str| CpuLimit::parse(text).map(|limit| limit.map(CpuLimit::get));
        assert_eq!(parsed("150%"), Ok(Some(150)));
        assert_eq!(parsed("10"), Ok(Some(10)));
        assert_eq!(parsed("none"), Ok(None));
        assert_eq!(parsed("9%"), Err(SizeError::CpuLimit(9)));
        assert_eq!(parsed("10001%"), Err(SizeError::CpuLimit(10_001)));
        for bad in ["", "%", "1.5", "-20%", "20%%", "+20", "None", "20 %"] {
            let error = SizeError::UnreadableLimit(bad.to_owned());
            assert_eq!(parsed(bad), Err(error), "{bad}");
        }
        assert_eq!(CpuLimit::new(20).unwrap().to_string(), "20%");
    }

    #[test]
    fn bounds_are_inclusive() {
        assert_eq!(VcpuCount::new(0), Err(SizeError::Vcpus(0)));
        assert!(VcpuCount::new(1).is_ok() && VcpuCount::new(16).is_ok());
        assert_eq!(VcpuCount::new(17), Err(SizeError::Vcpus(17)));
        assert_eq!(MemoryMib::new(64), Err(SizeError::Memory(64)));
        assert_eq!(MemoryMib::parse("40000"), Err(SizeError::Memory(40000)));
        assert!(MemoryMib::new(128).is_ok() && MemoryMib::new(32768).is_ok());
    }
}
