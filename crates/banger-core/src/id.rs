//! Ids, and every host-visible name that is derived from one.
//!
//! An id is a UUID of version 7. Its first 48 bits are the clock, so everything short is made from its last bits.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// Wraps a UUID made by the caller (ids need a clock and randomness, which core does not have).
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            /// The UUID itself.
            pub const fn as_uuid(&self) -> Uuid {
                self.0
            }

            /// The last `digits` (at most 16) hexadecimal digits of the id: its random part.
            pub fn tail(&self, digits: usize) -> String {
                let simple = self.0.simple().to_string();
                simple[simple.len() - digits.min(16)..].to_owned()
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, uuid::Error> {
                text.parse().map(Self)
            }
        }
    };
}

id_type!(
    /// Identifies a VM permanently.
    VmId
);
id_type!(
    /// Identifies an image; never changes and is never used again.
    ImageId
);
id_type!(
    /// Identifies a kernel bundle.
    KernelId
);
id_type!(
    /// Identifies an instance: one daemon's world.
    InstanceId
);

impl VmId {
    /// The name of the VM's TAP inside the instance's namespace: `bt` and twelve hexadecimal digits (14 of the
    /// 15 bytes that the kernel allows).
    pub fn tap_name(&self) -> String {
        format!("bt{}", self.tail(12))
    }

    /// The MAC of the VM's NIC: locally administered, unicast, the last five bytes of the id.
    pub fn mac(&self) -> MacAddress {
        let bytes = self.0.as_bytes();
        MacAddress([0x06, bytes[11], bytes[12], bytes[13], bytes[14], bytes[15]])
    }
}

impl InstanceId {
    /// The host's end of the instance's veth: `bv` and twelve hexadecimal digits.
    pub fn veth_name(&self) -> String {
        format!("bv{}", self.tail(12))
    }
}

/// An Ethernet address.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct MacAddress(pub [u8; 6]);

impl std::fmt::Display for MacAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> String {
        mac.to_string()
    }
}

/// The text is not six hexadecimal bytes joined by colons.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a MAC address")]
pub struct MacAddressError(String);

impl TryFrom<String> for MacAddress {
    type Error = MacAddressError;
    fn try_from(text: String) -> Result<Self, MacAddressError> {
        let parsed: Option<Vec<u8>> = text
            .split(':')
            .map(|part| {
                if part.len() == 2 {
                    u8::from_str_radix(part, 16).ok()
                } else {
                    None
                }
            })
            .collect();
        match parsed.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok()) {
            Some(bytes) => Ok(Self(bytes)),
            None => Err(MacAddressError(text)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a";

    #[test]
    fn host_names_come_from_the_random_end_of_the_id() {
        let id: VmId = ID.parse().unwrap();
        assert_eq!(id.tap_name(), "bt1f2e3d4c5b6a");
        assert!(id.tap_name().len() <= 15);
        assert_eq!(id.mac().to_string(), "06:2e:3d:4c:5b:6a");
    }

    #[test]
    fn a_mac_survives_a_round_trip_and_nonsense_does_not_parse() {
        let mac = ID.parse::<VmId>().unwrap().mac();
        assert_eq!(MacAddress::try_from(mac.to_string()), Ok(mac));
        for bad in [
            "",
            "06:2e:3d:4c:5b",
            "06:2e:3d:4c:5b:6a:00",
            "6:2e:3d:4c:5b:6a0",
            "zz:2e:3d:4c:5b:6a",
        ] {
            assert!(MacAddress::try_from(bad.to_owned()).is_err(), "{bad}");
        }
    }
}
