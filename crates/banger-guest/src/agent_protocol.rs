//! What the agent in a guest and the shim say to each other: one JSON object a line, at most [`MAX_LINE_BYTES`].
//!
//! Under QEMU the line is a virtio-serial port named [`PORT_NAME`]; under Firecracker the agent connects to the
//! host's vsock port [`VSOCK_PORT`]. The host believes nothing of it: texts are bounded and escaped.

use serde::{Deserialize, Serialize};

/// The longest line, newline included.
pub const MAX_LINE_BYTES: usize = 4096;
/// The name of the virtio-serial port.
pub const PORT_NAME: &str = "banger.agent";
/// The vsock port on which the shim listens.
pub const VSOCK_PORT: u32 = 1024;

/// A stage of a guest's boot, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestStage {
    /// `banger-init` runs: the kernel is up.
    Init,
    /// `banger-init` is done and hands over to the image's init.
    ImageInit,
    /// The agent runs.
    Agent,
    /// Something listens on TCP port 22.
    Ssh,
}

/// How a guest ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestEnd {
    /// It powers off.
    Poweroff,
    /// It reboots.
    Reboot,
    /// It halts.
    Halt,
    /// It goes down, and the agent cannot tell how.
    Unknown,
}

/// What the agent says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum FromGuest {
    /// A stage was reached, at this time since the kernel's start.
    Stage {
        /// Which.
        stage: GuestStage,
        /// `/proc/uptime` at that moment, in milliseconds.
        uptime_ms: u64,
    },
    /// The guest can be used.
    Ready,
    /// The guest goes down.
    Bye {
        /// How.
        end: GuestEnd,
    },
    /// The answer to [`ToGuest::Ping`].
    Pong,
    /// Something went wrong in the guest that its owner should know.
    Warning {
        /// What, in the guest's words.
        text: String,
    },
}

/// What the agent is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ToGuest {
    /// Shut down in order.
    Poweroff,
    /// Set the clock (after a pause).
    SetClock {
        /// Nanoseconds since 1970.
        unix_ns: i64,
    },
    /// Answer [`FromGuest::Pong`].
    Ping,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_says_has_these_forms() {
        let forms = [
            (
                FromGuest::Stage {
                    stage: GuestStage::ImageInit,
                    uptime_ms: 1234,
                },
                r#"{"type":"stage","stage":"image-init","uptime_ms":1234}"#,
            ),
            (FromGuest::Ready, r#"{"type":"ready"}"#),
            (
                FromGuest::Bye {
                    end: GuestEnd::Poweroff,
                },
                r#"{"type":"bye","end":"poweroff"}"#,
            ),
            (FromGuest::Pong, r#"{"type":"pong"}"#),
            (
                FromGuest::Warning {
                    text: "a \"b\"".to_owned(),
                },
                r#"{"type":"warning","text":"a \"b\""}"#,
            ),
        ];
        for (message, form) in forms {
            assert_eq!(serde_json::to_string(&message).unwrap(), form);
            let back: FromGuest = serde_json::from_str(form).unwrap();
            assert_eq!(back, message);
        }
    }

    #[test]
    fn what_the_guest_is_told_has_these_forms() {
        let forms = [
            (ToGuest::Poweroff, r#"{"type":"poweroff"}"#),
            (
                ToGuest::SetClock { unix_ns: -1 },
                r#"{"type":"set-clock","unix_ns":-1}"#,
            ),
            (ToGuest::Ping, r#"{"type":"ping"}"#),
        ];
        for (message, form) in forms {
            assert_eq!(serde_json::to_string(&message).unwrap(), form);
            let back: ToGuest = serde_json::from_str(form).unwrap();
            assert_eq!(back, message);
        }
    }

    #[test]
    fn stages_are_ordered_as_they_are_reached() {
        assert!(GuestStage::Init < GuestStage::ImageInit);
        assert!(GuestStage::ImageInit < GuestStage::Agent);
        assert!(GuestStage::Agent < GuestStage::Ssh);
    }
}
