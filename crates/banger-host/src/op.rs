//! The closed lists of typed operations: those that need root, and those that are done inside the instance's
//! namespace by `banger-netns`.
//!
//! `banger-netns` listens on a `SOCK_SEQPACKET` socket. A request is one message: a [`NamespaceRequest`] as JSON. The
//! reply is one message: a [`NamespaceReply`] as JSON, with descriptors where the operation says so. `banger-helper`
//! takes a [`HostRequest`] and answers with a [`HostReply`] in the same way.

mod host;

pub use host::{
    ClosedForward, HostAnswer, HostOp, HostReply, HostRequest, NatReport, OwnedKind, OwnedObject,
    ResolvedReport,
};

use banger_core::addr::Pool;
use banger_core::id::MacAddress;
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

/// The longest message in either direction.
pub const MAX_MESSAGE_BYTES: usize = 512 * 1024;
/// The bridge's name inside the namespace.
pub const BRIDGE: &str = "br0";
/// The veth's name inside the namespace.
pub const UPLINK: &str = "up0";

/// A VM's port of the bridge.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Port {
    /// The TAP's name: `bt` and twelve hexadecimal digits.
    pub tap: String,
    /// The only MAC that may send from it.
    pub mac: MacAddress,
    /// The only IPv4 address that may send from it.
    pub address: Ipv4Addr,
}

/// An operation inside the namespace. `Ensure…` measures first and changes only what differs; `Remove…` of what is
/// gone already is a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum NamespaceOp {
    /// Say who is there. Answers [`NamespaceAnswer::Hello`].
    Hello,
    /// Hand out the write end of the keeper's pipe (one descriptor). The keeper ends when all copies are closed.
    Keepalive,
    /// Hand out the namespaces: the network namespace, then the user namespace if there is one.
    Namespaces,
    /// Bring up loopback and bridge, set the sysctls, load the base ruleset if it is not whole.
    EnsureBase {
        /// The addresses.
        pool: Pool,
    },
    /// Give the namespace's end of the veth its address and a route to the host's end.
    EnsureUplink {
        /// The addresses.
        pool: Pool,
    },
    /// Make the TAP, put its element into the sets, then join it to the bridge (isolated) and enable it.
    EnsurePort(Port),
    /// Remove the TAP and its elements, by name alone.
    RemovePort {
        /// The TAP's name.
        tap: String,
    },
    /// List all ports. Answers [`NamespaceAnswer::Ports`].
    ListPorts,
    /// Connect to a guest. Hands out one connected socket.
    Connect {
        /// The guest's address.
        address: Ipv4Addr,
        /// The TCP port.
        port: u16,
        /// How long to try, in milliseconds.
        timeout_ms: u32,
    },
}

impl NamespaceOp {
    /// Its name, as in messages.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Keepalive => "keepalive",
            Self::Namespaces => "namespaces",
            Self::EnsureBase { .. } => "ensure-base",
            Self::EnsureUplink { .. } => "ensure-uplink",
            Self::EnsurePort(_) => "ensure-port",
            Self::RemovePort { .. } => "remove-port",
            Self::ListPorts => "list-ports",
            Self::Connect { .. } => "connect",
        }
    }
}

/// One message to `banger-netns`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceRequest {
    /// What to do.
    #[serde(flatten)]
    pub op: NamespaceOp,
}

/// What is there of a port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortState {
    /// The TAP's name, if a TAP with our prefix is there or an element names one.
    pub tap: String,
    /// The link exists.
    pub link: bool,
    /// What the sets allow it to send as.
    pub allowed: Option<(MacAddress, Ipv4Addr)>,
}

/// What an operation answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum NamespaceAnswer {
    /// Done.
    Done,
    /// Who is there.
    Hello {
        /// The keeper's process id.
        pid: i32,
        /// Its version.
        version: String,
        /// It lives in a user namespace.
        user_namespace: bool,
    },
    /// All ports.
    Ports {
        /// By TAP name.
        ports: Vec<PortState>,
    },
}

/// One message from `banger-netns`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceReply {
    /// The answer, or what went wrong (with its causes joined by `: `).
    pub result: Result<NamespaceAnswer, String>,
}
