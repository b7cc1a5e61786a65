//! The event stream: JSON lines that a client can resume after a break.

use crate::vm::Vm;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where a client has got to: `epoch.sequence`. A daemon begins a new epoch at each start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Cursor {
    /// Identifies one run of the daemon.
    pub epoch: u64,
    /// Counts that run's events from 1.
    pub sequence: u64,
}

impl std::fmt::Display for Cursor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.epoch, self.sequence)
    }
}

impl From<Cursor> for String {
    fn from(cursor: Cursor) -> String {
        cursor.to_string()
    }
}

/// The text is not `epoch.sequence`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not a cursor of the form epoch.sequence", .0.escape_debug())]
pub struct CursorError(String);

impl TryFrom<String> for Cursor {
    type Error = CursorError;
    fn try_from(text: String) -> Result<Self, CursorError> {
        let parsed = text
            .split_once('.')
            .and_then(|(epoch, sequence)| Some((epoch.parse().ok()?, sequence.parse().ok()?)));
        parsed
            .map(|(epoch, sequence)| Self { epoch, sequence })
            .ok_or(CursorError(text))
    }
}

/// Which events to send.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FollowEvents {
    /// Those after this cursor; without it, those from now on.
    pub after: Option<Cursor>,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Event {
    /// Its place in the stream.
    pub cursor: Cursor,
    /// What happened.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum EventKind {
    /// The stream begins here, at the cursor's place. With `missed`, events were lost: list again.
    Hello {
        /// Events before this one were missed.
        missed: bool,
    },
    /// A VM changed; this is all of it.
    VmChanged {
        /// The VM as it now is.
        vm: Box<Vm>,
    },
    /// A VM's record and files were removed permanently.
    VmPurged {
        /// Its id.
        id: banger_core::id::VmId,
    },
    /// Images or kernels changed: list them again.
    ImagesChanged,
}
