//! DNS messages as bytes: the little of it that is needed. A query with one question is read, a reply with at most one
//! record is written, and the answer of another server is walked through but never rewritten.
//!
//! All input comes from guests or from the network, so every read is checked, and nothing grows with what it says.

pub(crate) mod answer;
pub(crate) mod name;
pub(crate) mod query;
pub(crate) mod reply;

/// Length of the header that begins every message, in bytes.
pub(crate) const HEADER: usize = 12;
/// The largest UDP message without EDNS, in bytes.
pub(crate) const UDP_WITHOUT_EDNS: usize = 512;
/// The largest UDP message that is ever sent, in bytes: it fits into one IPv6 packet of the smallest size.
pub(crate) const UDP_MOST: usize = 1232;
/// The class of the internet, the only one that anybody uses.
pub(crate) const CLASS_IN: u16 = 1;

/// Bits of the header's second word.
pub(crate) mod flag {
    pub(crate) const RESPONSE: u16 = 0x8000;
    pub(crate) const OPCODE: u16 = 0x7800;
    pub(crate) const AUTHORITATIVE: u16 = 0x0400;
    pub(crate) const TRUNCATED: u16 = 0x0200;
    pub(crate) const RECURSION_DESIRED: u16 = 0x0100;
    pub(crate) const RECURSION_AVAILABLE: u16 = 0x0080;
    pub(crate) const AUTHENTIC_DATA: u16 = 0x0020;
    pub(crate) const CHECKING_DISABLED: u16 = 0x0010;
    pub(crate) const CODE: u16 = 0x000f;
}

/// Types of records.
pub(crate) mod kind {
    pub(crate) const A: u16 = 1;
    pub(crate) const NS: u16 = 2;
    pub(crate) const CNAME: u16 = 5;
    pub(crate) const SOA: u16 = 6;
    pub(crate) const PTR: u16 = 12;
    pub(crate) const AAAA: u16 = 28;
    pub(crate) const DNAME: u16 = 39;
    pub(crate) const OPT: u16 = 41;
    pub(crate) const SVCB: u16 = 64;
    pub(crate) const HTTPS: u16 = 65;
}

/// Response codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    NoError,
    Malformed,
    ServerFailure,
    NoName,
    Refused,
    /// An EDNS version that is not known. It needs an OPT record for its upper bits.
    BadVersion,
}

impl Code {
    pub(crate) const fn number(self) -> u16 {
        match self {
            Self::NoError => 0,
            Self::Malformed => 1,
            Self::ServerFailure => 2,
            Self::NoName => 3,
            Self::Refused => 5,
            Self::BadVersion => 16,
        }
    }
}

/// The bytes are not what they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed;

/// The two bytes at `at`, as a number.
pub(crate) fn word(message: &[u8], at: usize) -> Result<u16, Malformed> {
    match message.get(at..at + 2) {
        Some(&[high, low]) => Ok(u16::from_be_bytes([high, low])),
        _ => Err(Malformed),
    }
}
