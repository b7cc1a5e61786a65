//! Messages for tests, made byte by byte, so that broken ones can be made, too.

use crate::wire::query::Question;
use crate::wire::{CLASS_IN, HEADER, UDP_MOST, kind};
use std::net::IpAddr;

/// The id of every query.
pub(crate) const ID: u16 = 0xbead;

/// A query to be.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    name: String,
    kind: u16,
    edns: Option<u16>,
}

pub(crate) fn query(name: &str, kind: u16) -> Asked {
    Asked {
        name: name.to_owned(),
        kind,
        edns: None,
    }
}

impl Asked {
    pub(crate) fn edns(mut self, size: u16) -> Self {
        self.edns = Some(size);
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let additional = u16::from(self.edns.is_some());
        for number in [ID, 0x0100, 1, 0, 0, additional] {
            bytes.extend(number.to_be_bytes());
        }
        push_name(&self.name, &mut bytes);
        for number in [self.kind, CLASS_IN] {
            bytes.extend(number.to_be_bytes());
        }
        if let Some(size) = self.edns {
            bytes.push(0);
            for number in [kind::OPT, size, 0, 0, 0] {
                bytes.extend(number.to_be_bytes());
            }
        }
        bytes
    }
}

fn push_name(name: &str, bytes: &mut Vec<u8>) {
    for label in name.trim_end_matches('.').split('.') {
        if !label.is_empty() {
            bytes.push(u8::try_from(label.len()).unwrap());
            bytes.extend(label.as_bytes());
        }
    }
    bytes.push(0);
}

/// Another server's answer.
#[derive(Debug, Clone)]
pub(crate) struct Answering(Vec<u8>);

impl Answering {
    /// An answer to `query` with no records, whatever else that asked.
    pub(crate) fn to(query: &[u8]) -> Self {
        let end = Question::read(query).unwrap().end;
        let mut bytes = query[..end].to_vec();
        bytes[2] |= 0x80;
        bytes[3] |= 0x80;
        bytes[6..HEADER].fill(0);
        Self(bytes)
    }

    pub(crate) fn address(self, address: &str) -> Self {
        match address.parse().unwrap() {
            IpAddr::V4(address) => self.record(kind::A, &address.octets()),
            IpAddr::V6(address) => self.record(kind::AAAA, &address.octets()),
        }
    }

    pub(crate) fn alias(self, target: &str) -> Self {
        let mut data = Vec::new();
        push_name(target, &mut data);
        self.record(kind::CNAME, &data)
    }

    /// A record for HTTPS that hints at addresses.
    pub(crate) fn service(self, hints: &[&str]) -> Self {
        let mut data = vec![0, 1, 0];
        for hint in hints {
            let (key, octets) = match hint.parse().unwrap() {
                IpAddr::V4(address) => (4, address.octets().to_vec()),
                IpAddr::V6(address) => (6, address.octets().to_vec()),
            };
            data.extend([0, key, 0, u8::try_from(octets.len()).unwrap()]);
            data.extend(octets);
        }
        self.record(kind::HTTPS, &data)
    }

    pub(crate) fn record(mut self, kind: u16, data: &[u8]) -> Self {
        self.0[7] += 1;
        self.push(kind, data);
        self
    }

    /// A record after the answers, which must all be there already.
    pub(crate) fn additional(mut self, address: &str) -> Self {
        self.0[11] += 1;
        match address.parse().unwrap() {
            IpAddr::V4(address) => self.push(kind::A, &address.octets()),
            IpAddr::V6(address) => self.push(kind::AAAA, &address.octets()),
        }
        self
    }

    fn push(&mut self, kind: u16, data: &[u8]) {
        for number in [0xc00c, kind, CLASS_IN, 0, 60] {
            self.0.extend(number.to_be_bytes());
        }
        self.0
            .extend(u16::try_from(data.len()).unwrap().to_be_bytes());
        self.0.extend(data);
    }

    pub(crate) fn code(mut self, code: u8) -> Self {
        self.0[3] |= code;
        self
    }

    pub(crate) fn truncated(mut self) -> Self {
        self.0[2] |= 2;
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        assert!(self.0.len() < 10 * UDP_MOST);
        self.0.clone()
    }
}
