//! The network on the wire: NAT, published ports, joins, names.

use crate::daemon::Mode;
use banger_core::id::VmId;
use banger_core::name::VmName;
use banger_core::publish::{Protocol, PublishedPort};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;

/// The instance's network as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NetworkStatus {
    /// How the daemon gets what only root may do.
    pub mode: Mode,
    /// How guests with NAT get out.
    pub way_out: WayOut,
    /// All VMs that are not in the trash, by name.
    pub vms: Vec<VmNetwork>,
    /// Packets that were dropped, by reason, since the rules were loaded.
    pub dropped: BTreeMap<String, u64>,
    /// How often somebody else changed the instance's rules and they were put back.
    pub repairs: u64,
}

/// How guests with NAT get out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum WayOut {
    /// No running VM has NAT, so there is none.
    Closed,
    /// It is there.
    Open {
        /// The host's devices that it leaves by, or `pasta`.
        by: Vec<String>,
        /// Somebody else's rules that close it all the same.
        closed_by: Vec<ClosedForward>,
    },
    /// It could not be made.
    Failed {
        /// Why.
        why: String,
        /// What helps.
        #[serde(default)]
        hints: Vec<String>,
    },
}

/// A chain of somebody else's that drops what guests send out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ClosedForward {
    /// Which, and whose.
    pub chain: String,
    /// The commands, run as root, that let guests through.
    pub remedy: String,
}

/// The network of one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmNetwork {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: VmName,
    /// Its address.
    pub address: Ipv4Addr,
    /// It runs.
    pub live: bool,
    /// It may reach the internet when it runs.
    pub nat: bool,
    /// The kernel lets it reach the internet now.
    pub nat_now: bool,
    /// With NAT it may reach private networks as well.
    #[serde(default)]
    pub nat_private: bool,
    /// The kernel lets it reach private networks now.
    #[serde(default)]
    pub nat_private_now: bool,
    /// Its published ports.
    pub ports: Vec<VmPort>,
    /// The VMs it is joined with, by name.
    pub joins: Vec<VmName>,
}

/// A published port as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmPort {
    /// Which leads where.
    #[serde(flatten)]
    pub port: PublishedPort,
    /// The host listens there now.
    pub open: bool,
    /// TCP connections, or UDP senders, now.
    pub connections: u32,
    /// Why it is not open although the VM runs.
    pub problem: Option<String>,
}

/// A port to publish.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct PublishPort(pub PublishedPort);

impl Default for PublishPort {
    fn default() -> Self {
        Self(PublishedPort {
            protocol: Protocol::Tcp,
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            guest_port: NonZeroU16::MIN,
        })
    }
}

/// A port to close: protocol and place on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClosePort {
    /// TCP or UDP.
    #[serde(default)]
    pub protocol: Protocol,
    /// Where the host listens.
    #[schemars(with = "String")]
    pub listen: SocketAddr,
}

impl Default for ClosePort {
    fn default() -> Self {
        Self {
            protocol: Protocol::Tcp,
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        }
    }
}

/// The VM to join with, or to leave.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinVm {
    /// The other one, by name, id or prefix.
    pub other: String,
}

/// The name server as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DnsStatus {
    /// What guests ask.
    #[schemars(with = "Option<String>")]
    pub guests: Option<SocketAddr>,
    /// What the host can ask.
    #[schemars(with = "Option<String>")]
    pub host: Option<SocketAddr>,
    /// Whether, and how, the host's own programs find the names.
    pub host_names: String,
    /// The file that holds all names, for other tools.
    pub records_file: String,
    /// All names.
    pub records: Vec<DnsRecord>,
    /// What was asked, by outcome.
    pub counters: BTreeMap<String, u64>,
}

/// A name and where it leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DnsRecord {
    /// The whole name, as `calm-otter.vm`.
    pub name: String,
    /// Its address.
    pub address: Ipv4Addr,
}
