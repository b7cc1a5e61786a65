//! Errors as clients see them: a stable code, a message, causes and hints. CLI and TUI render the same text from one.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $exit:literal, $explain:literal;)+) => {
        /// What kind of error it is. The names never change.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
        pub enum ErrorCode {
            $($(#[$doc])* #[serde(rename = $name)] $variant,)+
        }

        impl ErrorCode {
            /// All codes.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The code's stable name.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// The exit code that the CLI ends with.
            pub const fn exit_code(self) -> u8 {
                match self { $(Self::$variant => $exit,)+ }
            }

            /// What `banger explain` prints.
            pub const fn explanation(self) -> &'static str {
                match self { $(Self::$variant => $explain,)+ }
            }
        }
    };
}

codes! {
    /// The request cannot be read or holds a value that is not allowed.
    InvalidRequest = "invalid-request", 2,
        "The request holds a value that is not allowed: a bad name, a size out of range, an unknown field. The message names the value and what is allowed. Nothing was changed.";
    /// No VM, image, kernel or operation goes by that name.
    NotFound = "not-found", 4,
        "Nothing goes by that name, id or prefix. `banger vm list`, `banger image list` and `banger kernel list` show what there is.";
    /// A prefix means several things.
    Ambiguous = "ambiguous", 4,
        "A prefix of a name or id fits several things. The message lists them; type more of the one that is meant.";
    /// The name is taken.
    NameTaken = "name-taken", 5,
        "Another VM, image or kernel already has that name. Names are unique among what is not in the trash.";
    /// The phase of the VM does not allow it.
    WrongPhase = "wrong-phase", 5,
        "A VM's phase decides which verbs it takes: a running VM cannot be resized, a stopped one cannot be paused. The hint names the verb that helps. `banger vm show NAME` prints the phase.";
    /// A process of the VM is alive but does not answer: kill it first.
    Unreachable = "unreachable", 5,
        "The VM's lock is held, so a process of it is alive, but its shim does not answer. Nothing may be started on its disks until that process is gone. `banger vm kill NAME` ends it.";
    /// Something still uses it.
    InUse = "in-use", 5,
        "An image or kernel is pinned by VMs, also by those in the trash. The message lists them.";
    /// Something else has what was asked for, or changed it meanwhile.
    Conflict = "conflict", 5,
        "Something else has what was asked for, or got there first: the object was changed since it was read, a port of the host is taken, or the same thing is being made by another request. The message names it, and the hint says what to do. Nothing was changed.";
    /// The operation was cancelled.
    Cancelled = "cancelled", 130,
        "The operation was cancelled before it was done. Nothing half done is left.";
    /// Waiting took longer than allowed; nothing was undone.
    TimedOut = "timed-out", 6,
        "What was waited for did not happen in time. Nothing was undone: the VM runs on. `banger vm logs NAME` and `banger vm why NAME` tell what it is doing.";
    /// The host lacks a program or device.
    HostUnfit = "host-unfit", 7,
        "This host lacks something: a program, a device node, a right. The message names it and the hint says how to get it. `banger doctor` checks everything at once.";
    /// No driver can run the VM.
    NoDriver = "no-driver", 7,
        "No VMM was found that can run the VM. QEMU (package qemu-system-x86) runs everywhere; Firecracker needs a working KVM. `banger driver list` shows what was found.";
    /// The host's disk is full.
    NoSpace = "no-space", 8,
        "The host's filesystem has too little room. Nothing was left half made. Free some space and repeat the command.";
    /// A file cannot be used.
    BadFile = "bad-file", 9,
        "A file cannot be read, or is not what it should be: a kernel that is no kernel, an archive with the wrong checksum, a disk that is not the VM's. The message names the file and what was found in it.";
    /// The VM could not be started.
    StartFailed = "start-failed", 10,
        "The VM could not be started. It is stopped again, nothing of it is left on the host, and it can be started again. `banger vm why NAME` tells the steps, `banger vm logs --vmm NAME` what the VMM said.";
    /// The database was written by a newer banger.
    NewerSchema = "newer-schema", 11,
        "The state was written by a newer banger. It was not touched. Install that version or a newer one.";
    /// The daemon is going down.
    ShuttingDown = "shutting-down", 3,
        "The daemon is going down and takes no new work. VMs run on. The next command starts a new daemon.";
    /// The daemon cannot be reached or started.
    DaemonUnreachable = "daemon-unreachable", 3,
        "The daemon does not answer and could not be started. `banger daemon logs` shows why; `banger daemon start` tries again.";
    /// A fault of banger itself or of the host that has no better code.
    Internal = "internal", 1,
        "Something failed that should not have. `banger daemon logs` tells more. Nothing acknowledged is lost.";
}

impl std::str::FromStr for ErrorCode {
    type Err = ();
    fn from_str(name: &str) -> Result<Self, ()> {
        Self::ALL
            .iter()
            .copied()
            .find(|code| code.name() == name)
            .ok_or(())
    }
}

/// An error on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, thiserror::Error)]
#[error("{message}")]
pub struct ErrorBody {
    /// What kind of error it is.
    pub code: ErrorCode,
    /// What failed, naming its subject.
    pub message: String,
    /// Why, the nearest cause first.
    #[serde(default)]
    pub causes: Vec<String>,
    /// What to do next.
    #[serde(default)]
    pub hints: Vec<String>,
}

impl ErrorBody {
    /// An error without causes and hints.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            causes: Vec::new(),
            hints: Vec::new(),
        }
    }

    /// Adds a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// Adds `error` and its sources as causes.
    #[must_use]
    pub fn caused_by(mut self, error: &(dyn std::error::Error + 'static)) -> Self {
        let mut next = Some(error);
        while let Some(cause) = next {
            let text = cause.to_string();
            if self.causes.last() != Some(&text) {
                self.causes.push(text);
            }
            next = cause.source();
        }
        self
    }

    /// The error whose message is that of `error`, and whose causes are its sources.
    pub fn from_error(code: ErrorCode, error: &(dyn std::error::Error + 'static)) -> Self {
        let body = Self::new(code, error.to_string());
        match error.source() {
            Some(source) => body.caused_by(source),
            None => body,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_an_explanation_and_a_failing_exit_code() {
        for code in ErrorCode::ALL {
            assert!(
                code.exit_code() != 0 && code.explanation().len() > 40,
                "{code:?}"
            );
            assert_eq!(code.name().parse(), Ok(*code));
            assert_eq!(serde_json::to_value(code).unwrap(), code.name());
        }
    }
}
