//! What the daemon and a shim say to each other, and the files a shim leaves.
//!
//! **Launch.** The daemon spawns `banger-shim` with a `SOCK_SEQPACKET` socket as standard input and sends one
//! message: a [`Launch`] as JSON, with descriptors in the order of [`Launch::descriptors`]. The shim answers on the
//! same socket with one [`Launched`], and both close it. If the daemon dies before it has sent, the shim reads the
//! end of file and exits; the lock it never got is free.
//!
//! **Afterwards** the shim listens on [`Launch::shim_socket`] (`SOCK_STREAM`). A client sends [`Command`]s and
//! receives [`Reply`]s and [`Event`]s, one JSON object a line ([`FromShim`]). Every client first receives a
//! [`FromShim::Status`]. Several clients may be connected; events go to all, and a client that does not read is
//! dropped.

use crate::sandbox::{Applied, Sandbox};
use banger_core::spec::Driver;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A descriptor that goes with a [`Launch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Descriptor {
    /// `vm.lock`, locked. The VMM inherits it: the lock is free when, and only when, shim and VMM are dead.
    Lock,
    /// The write end of the namespace keeper's pipe. The VMM inherits it too.
    Keepalive,
    /// The user namespace to enter (only where the daemon is not root).
    UserNamespace,
    /// The network namespace to enter.
    NetworkNamespace,
}

/// A file that a shim writes as a bounded ring: when `path` has grown past half of `max_bytes` it is renamed to
/// `path.1` (replacing it) and begun anew, so the two together never exceed `max_bytes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ring {
    /// The newer half.
    pub path: PathBuf,
    /// The limit of both halves together, in bytes.
    pub max_bytes: u64,
}

/// How the shim reaches its VMM and the guest's agent; it is the only client of each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "driver", rename_all = "kebab-case")]
pub enum Control {
    /// QEMU: QMP on one socket, the agent's virtio-serial port on another. QEMU listens on both.
    Qemu {
        /// The QMP socket.
        qmp_socket: PathBuf,
        /// The agent's socket.
        agent_socket: PathBuf,
    },
    /// Firecracker: HTTP on its API socket. The guest's agent connects out, so the shim listens on
    /// `<vsock_socket>_<port>`.
    Firecracker {
        /// The API socket.
        api_socket: PathBuf,
        /// The vsock device's socket.
        vsock_socket: PathBuf,
        /// The FIFO that its log goes to; the shim makes it, and writes what comes to [`Launch::log`].
        log_pipe: PathBuf,
        /// The FIFO that its metrics go to; the shim makes it, and writes what comes to [`Launch::metrics`].
        metrics_pipe: PathBuf,
    },
}

impl Control {
    /// The driver that this controls.
    pub const fn driver(&self) -> Driver {
        match self {
            Self::Qemu { .. } => Driver::Qemu,
            Self::Firecracker { .. } => Driver::Firecracker,
        }
    }
}

/// Everything a shim needs to start one VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// The VM's id.
    pub vm: String,
    /// The attempt's id; it comes back in [`Status`] and [`Exit`].
    pub attempt: String,
    /// The descriptors that come with this message, in this order.
    pub descriptors: Vec<Descriptor>,
    /// The VMM.
    pub program: PathBuf,
    /// Its arguments (without the program itself).
    pub args: Vec<String>,
    /// How to reach it.
    pub control: Control,
    /// What it may reach.
    pub sandbox: Sandbox,
    /// What became of [`Layer::Cgroup`](crate::sandbox::Layer::Cgroup), where there is somebody to ask for it.
    #[serde(default)]
    pub cgroup: Option<Applied>,
    /// The shim's own socket. Sockets are bound and connected through `/proc/self/fd` of their folder, so that
    /// their length does not matter.
    pub shim_socket: PathBuf,
    /// What the VMM prints on standard output: the guest's console.
    pub console: Ring,
    /// What the VMM prints on standard error, and the shim's own log.
    pub log: Ring,
    /// What the VMM counts, one JSON object a line, where it tells ([`Control::Firecracker`]).
    pub metrics: Ring,
    /// Where [`Exit`] is written.
    pub exit_file: PathBuf,
}

/// The shim's answer to a [`Launch`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Launched {
    /// The VMM gave its first proof of life: QMP answered, or Firecracker's API did.
    Running {
        /// The VMM's process id, for display only.
        vmm_pid: i32,
        /// The shim's own.
        shim_pid: i32,
        /// What became of each layer of its sandbox.
        sandbox: Vec<Applied>,
    },
    /// It did not; everything is gone again.
    Failed {
        /// What failed, naming the program.
        error: String,
        /// The last lines that the VMM printed on standard error.
        stderr: String,
    },
}

/// Times of a boot, in milliseconds since the VMM's exec as seen by the shim; `None` where not reached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootTimes {
    /// The VMM's first proof of life.
    pub vmm_up: Option<u64>,
    /// `banger-init` runs.
    pub kernel: Option<u64>,
    /// `banger-init` has handed over.
    pub banger_init: Option<u64>,
    /// The agent runs.
    pub agent: Option<u64>,
    /// sshd listens.
    pub ssh: Option<u64>,
    /// The guest said ready.
    pub ready: Option<u64>,
}

/// What a shim knows of its VM now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The VM's id.
    pub vm: String,
    /// The attempt's id.
    pub attempt: String,
    /// The VMM's process id.
    pub vmm_pid: i32,
    /// The shim's.
    pub shim_pid: i32,
    /// The VMM's driver.
    pub driver: Driver,
    /// The vCPUs are paused.
    pub paused: bool,
    /// They were paused, by the VMM or by [`Verb::PauseForRoom`], because the host has no room.
    pub disk_full: bool,
    /// The guest said ready.
    pub ready: bool,
    /// The agent is connected.
    pub agent: bool,
    /// The boot's times.
    pub boot: BootTimes,
    /// What became of each layer of the VMM's sandbox. A shim of before there was one tells of none.
    #[serde(default)]
    pub sandbox: Vec<Applied>,
}

/// What a client asks of a shim. `id` comes back in the [`Reply`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Chosen by the client.
    pub id: u64,
    /// What to do.
    #[serde(flatten)]
    pub verb: Verb,
}

/// The verbs of a [`Command`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case")]
pub enum Verb {
    /// Reply with nothing but success.
    Ping,
    /// Ask the guest to shut down: by its agent, else by the VMM's button.
    Shutdown,
    /// Pause the vCPUs.
    Pause,
    /// Pause the vCPUs because the host has no room: [`Status::disk_full`] is then true.
    PauseForRoom,
    /// Let them run on.
    Resume,
    /// Send the VMM SIGTERM.
    Terminate,
    /// Send the VMM SIGKILL.
    Kill,
}

/// The answer to one [`Command`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The command's id.
    pub id: u64,
    /// What went wrong, if anything.
    pub error: Option<String>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The status changed.
    Changed,
    /// The VMM has ended; the exit file is written and the shim ends next.
    Exited {
        /// The same as in the exit file.
        exit: Exit,
    },
    /// The guest warned; bounded, escaped text.
    GuestWarning {
        /// What it said.
        text: String,
    },
}

/// A line from a shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum FromShim {
    /// First of all, and with every [`Event::Changed`].
    Status(Status),
    /// An answer.
    Reply(Reply),
    /// An event.
    Event(Event),
}

/// What ended a guest, as the VMM and the agent told it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LastEvent {
    /// Nothing was heard.
    None,
    /// The guest powered off.
    GuestPoweroff,
    /// The guest reset itself.
    GuestReboot,
    /// The guest's kernel panicked.
    GuestPanic,
    /// A client asked the shim to end the VMM ([`Verb::Terminate`] or [`Verb::Kill`]).
    Ended,
}

/// `exit.json`: how a VMM ended. Written to a temporary name and renamed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// The VM's id.
    pub vm: String,
    /// The attempt's id.
    pub attempt: String,
    /// The VMM's exit code, if it exited.
    pub code: Option<i32>,
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
    /// The last thing heard of the guest.
    pub last_event: LastEvent,
    /// [`Verb::Shutdown`] had been asked for.
    pub shutdown_asked: bool,
    /// When, in milliseconds since 1970.
    pub at_unix_ms: i64,
    /// The last lines that the VMM printed on standard error (at most 2 KiB).
    pub stderr: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn returns<T>(value: &T, json: serde_json::Value)
    where
        T: Serialize + for<'a> Deserialize<'a> + PartialEq + std::fmt::Debug,
    {
        assert_eq!(serde_json::to_value(value).unwrap(), json);
        let text = serde_json::to_string(value).unwrap();
        assert!(!text.contains('\n'));
        assert_eq!(&serde_json::from_str::<T>(&text).unwrap(), value);
    }

    fn exit() -> Exit {
        Exit {
            vm: "v".to_owned(),
            attempt: "a".to_owned(),
            code: Some(0),
            signal: None,
            last_event: LastEvent::GuestPoweroff,
            shutdown_asked: true,
            at_unix_ms: 5,
            stderr: "two\nlines".to_owned(),
        }
    }

    #[test]
    fn commands_are_flat_objects() {
        for (verb, word) in [
            (Verb::Ping, "ping"),
            (Verb::Shutdown, "shutdown"),
            (Verb::Pause, "pause"),
            (Verb::PauseForRoom, "pause-for-room"),
            (Verb::Resume, "resume"),
            (Verb::Terminate, "terminate"),
            (Verb::Kill, "kill"),
        ] {
            returns(&Command { id: 7, verb }, json!({ "id": 7, "verb": word }));
        }
    }

    #[test]
    fn every_line_from_a_shim_comes_back_as_it_went() {
        returns(
            &FromShim::Event(Event::Changed),
            json!({ "type": "event", "event": "changed" }),
        );
        returns(
            &FromShim::Event(Event::GuestWarning {
                text: "t".to_owned(),
            }),
            json!({ "type": "event", "event": "guest-warning", "text": "t" }),
        );
        returns(
            &FromShim::Reply(Reply { id: 1, error: None }),
            json!({ "type": "reply", "id": 1, "error": null }),
        );
        returns(
            &FromShim::Event(Event::Exited { exit: exit() }),
            json!({ "type": "event", "event": "exited", "exit": {
                "vm": "v", "attempt": "a", "code": 0, "signal": null,
                "last_event": "guest-poweroff", "shutdown_asked": true, "at_unix_ms": 5,
                "stderr": "two\nlines",
            } }),
        );
        let status = Status {
            vm: "v".to_owned(),
            attempt: "a".to_owned(),
            vmm_pid: 2,
            shim_pid: 1,
            driver: Driver::Qemu,
            paused: false,
            disk_full: false,
            ready: true,
            agent: true,
            boot: BootTimes::default(),
            sandbox: vec![Applied {
                layer: crate::sandbox::Layer::Landlock,
                missing: Some("too old".to_owned()),
            }],
        };
        let line = serde_json::to_string(&FromShim::Status(status.clone())).unwrap();
        assert_eq!(
            serde_json::from_str::<FromShim>(&line).unwrap(),
            FromShim::Status(status)
        );
    }
}
