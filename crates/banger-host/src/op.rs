//! The closed lists of typed operations: those that need root, and those that are done inside the instance's
//! namespace by `banger-netns`.
//!
//! `banger-netns` listens on a `SOCK_SEQPACKET` socket. A request is one message: a [`NamespaceRequest`] as JSON. The
//! reply is one message: a [`NamespaceReply`] as JSON. Either carries descriptors where the operation says so.
//! `banger-helper` takes a [`HostRequest`] and answers with a [`HostReply`] in the same way.

mod host;

pub use host::{
    ClosedForward, HostAnswer, HostOp, HostReply, HostRequest, NatReport, OwnedKind, OwnedObject,
    ResolvedReport, SnapshotState, TOO_MANY_REQUESTS,
};

use banger_core::addr::Pool;
use banger_core::id::MacAddress;
pub use banger_core::publish::Protocol;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

/// The longest message in either direction.
pub const MAX_MESSAGE_BYTES: usize = 512 * 1024;
/// The bridge's name inside the namespace.
pub const BRIDGE: &str = "br0";
/// The name of the way out inside the namespace: the veth's end, or the device of `pasta`.
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

/// A port of the host that leads into a guest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Publication {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Where the host listens: with the protocol, what names it.
    pub listen: SocketAddr,
    /// The TAP of the guest; the publication ends with this port.
    pub tap: String,
    /// Where it leads: the address must be the one of the TAP's port.
    pub guest: SocketAddrV4,
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
    /// Masquerade what leaves by [`UPLINK`], which `pasta` has made (see [`crate::net::pasta::ensure`]). For a keeper
    /// in a user namespace only. Answers [`NamespaceAnswer::WayOut`].
    EnsureWayOut,
    /// Make the TAP, put its element into the sets, then join it to the bridge (isolated) and enable it.
    EnsurePort(Port),
    /// Remove the TAP and its elements, by name alone; with it go its publications, joins and way to the internet, and
    /// all connections of its guest.
    RemovePort {
        /// The TAP's name.
        tap: String,
    },
    /// List all ports. Answers [`NamespaceAnswer::Ports`].
    ListPorts,
    /// List which of [`BRIDGE`] and [`UPLINK`] are there and enabled. Answers [`NamespaceAnswer::Links`].
    ListLinks,
    /// Connect to a guest. Hands out one connected socket.
    Connect {
        /// The guest's address.
        address: Ipv4Addr,
        /// The TCP port.
        port: u16,
        /// How long to try, in milliseconds.
        timeout_ms: u32,
    },
    /// Let a guest that has a port reach the public internet, or no longer: then its connections there end too.
    SetNat {
        /// The guest's address.
        address: Ipv4Addr,
        /// Whether it may.
        on: bool,
    },
    /// List who reaches the internet. Answers [`NamespaceAnswer::Nat`].
    ListNat,
    /// Let a guest that has a port reach private networks as well, where it reaches the internet, or no longer: then
    /// its connections there end too.
    SetPrivate {
        /// The guest's address.
        address: Ipv4Addr,
        /// Whether it may.
        on: bool,
    },
    /// List who may reach private networks. Answers [`NamespaceAnswer::Nat`].
    ListPrivate,
    /// Let two guests that have ports reach each other, or no longer: then the connections between them end too.
    SetJoin {
        /// The address of one.
        one: Ipv4Addr,
        /// The address of the other.
        other: Ipv4Addr,
        /// Whether they may.
        on: bool,
    },
    /// List the joins. Answers [`NamespaceAnswer::Joins`].
    ListJoins,
    /// The host's own addresses, all of them: no guest reaches them, with or without NAT. (Private ones are closed
    /// anyway; naming them does no harm.)
    SetHostAddresses {
        /// The addresses.
        addresses: Vec<Ipv4Addr>,
    },
    /// Hand out new sockets for a DNS server, which do not block, at port 53 of the bridge's address: for guests UDP,
    /// then listening TCP, bound to the bridge; if the veth is there, then the same two for the host, bound to the
    /// veth. Answers [`NamespaceAnswer::DnsSockets`].
    DnsSockets,
    /// Lead a port of the host into a guest that has a port. Comes with one descriptor: a bound UDP socket, or a
    /// listening TCP socket. One that is there already with the same target is left as it is.
    Publish(Publication),
    /// Close it, and its connections. No error if it is gone already.
    Unpublish {
        /// TCP or UDP.
        protocol: Protocol,
        /// Where the host listens.
        listen: SocketAddr,
    },
    /// List the publications. Answers [`NamespaceAnswer::Published`].
    ListPublished,
    /// Count what was dropped, by reason. Answers [`NamespaceAnswer::Counters`].
    Counters,
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
            Self::EnsureWayOut => "ensure-way-out",
            Self::EnsurePort(_) => "ensure-port",
            Self::RemovePort { .. } => "remove-port",
            Self::ListPorts => "list-ports",
            Self::ListLinks => "list-links",
            Self::Connect { .. } => "connect",
            Self::SetNat { .. } => "set-nat",
            Self::ListNat => "list-nat",
            Self::SetPrivate { .. } => "set-private",
            Self::ListPrivate => "list-private",
            Self::SetJoin { .. } => "set-join",
            Self::ListJoins => "list-joins",
            Self::SetHostAddresses { .. } => "set-host-addresses",
            Self::DnsSockets => "dns-sockets",
            Self::Publish(_) => "publish",
            Self::Unpublish { .. } => "unpublish",
            Self::ListPublished => "list-published",
            Self::Counters => "counters",
        }
    }

    /// Whether it may leave anything in the namespace other than it was.
    pub const fn changes_something(&self) -> bool {
        !matches!(
            self,
            Self::Hello
                | Self::Keepalive
                | Self::Namespaces
                | Self::ListPorts
                | Self::ListLinks
                | Self::Connect { .. }
                | Self::ListNat
                | Self::ListPrivate
                | Self::ListJoins
                | Self::ListPublished
                | Self::Counters
        )
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

/// What is there of a publication.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicationState {
    /// What was asked for.
    #[serde(flatten)]
    pub publication: Publication,
    /// How many TCP connections, or UDP senders, it has now.
    pub connections: u32,
    /// How many it has had.
    pub served: u64,
    /// How many did not reach the guest, or found no room.
    pub failed: u64,
}

/// What a counter of the ruleset has seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// Packets.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
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
    /// What all guests share.
    Links {
        /// The names of the links, in order.
        links: Vec<String>,
    },
    /// Whether there is a way out.
    WayOut {
        /// `pasta`'s device is there, and is masqueraded.
        ready: bool,
    },
    /// Who reaches the internet.
    Nat {
        /// The guests' addresses, in order.
        addresses: Vec<Ipv4Addr>,
    },
    /// Who reaches whom.
    Joins {
        /// Each pair once, the lower address first, in order.
        joins: Vec<(Ipv4Addr, Ipv4Addr)>,
    },
    /// Sockets for a DNS server come with this.
    DnsSockets {
        /// Four sockets came: also the two for the host.
        host: bool,
    },
    /// All publications.
    Published {
        /// By protocol and place.
        publications: Vec<PublicationState>,
    },
    /// What was dropped.
    Counters {
        /// By the counter's name in the ruleset, as `sender_dropped`. A repair of the ruleset begins at nought again.
        dropped: BTreeMap<String, Dropped>,
        /// How often the keeper found the ruleset changed by somebody else, and loaded it again.
        repairs: u64,
    },
}

/// One message from `banger-netns`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceReply {
    /// The answer, or what went wrong (with its causes joined by `: `).
    pub result: Result<NamespaceAnswer, String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_looks_changes_nothing() {
        let looks = [
            NamespaceOp::Hello,
            NamespaceOp::ListPorts,
            NamespaceOp::ListLinks,
            NamespaceOp::ListNat,
            NamespaceOp::ListPrivate,
            NamespaceOp::ListJoins,
            NamespaceOp::ListPublished,
            NamespaceOp::Counters,
        ];
        for op in looks {
            assert!(!op.changes_something(), "{}", op.name());
        }
        let address = Ipv4Addr::new(172, 16, 0, 2);
        let changes = [
            NamespaceOp::SetNat { address, on: true },
            NamespaceOp::SetPrivate { address, on: true },
            NamespaceOp::EnsureWayOut,
        ];
        for op in changes {
            assert!(op.changes_something(), "{}", op.name());
        }
    }
}
