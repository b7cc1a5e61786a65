//! The instance's network: its namespace, what is in it, and the veth that joins it to the host.

pub mod addresses;
pub mod connect;
pub mod conntrack;
mod dns_sockets;
pub mod host;
pub mod keeper;
pub mod links;
pub mod namespace;
pub(crate) mod needed;
pub mod nft;
pub mod pasta;
pub mod publish;
pub mod resolver_starts;
pub mod routing;
mod ruleset;
pub mod seqpacket;
pub mod tap;
pub mod watch;
