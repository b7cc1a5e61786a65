//! The DNS server inside the daemon. It is authoritative for `.vm` and for the way back from the addresses of an
//! instance's pool, for its guests and for the host; for guests with NAT it asks the host's own resolvers.
//!
//! It takes sockets that are bound already and a [`Zone`] that the daemon changes at will; it starts no process, opens
//! no port, and knows VMs by name and address alone.
//!
//! | question | guest without NAT | guest with NAT | host |
//! | --- | --- | --- | --- |
//! | `.vm`, addresses of the pool | answered | answered | answered |
//! | names of private networks (`.local`, `168.192.in-addr.arpa`) | refused | no such name | refused |
//! | names of the internet | refused | a resolver of the host is asked | refused |
//! | ANY, transfers, updates, classes but IN | refused | refused | refused |
//!
//! The resolvers' answers are passed on byte by byte or not at all: an answer that leads a public name to an address of
//! this host, of a private network or of a guest is refused. Nothing is remembered from one question to the next; the
//! host's resolver does that.
//!
//! The way of a message: `server` receives it, `service` counts it and keeps to the client's rate, `wire::query` reads
//! it, `route` decides, `wire::reply` writes, or `forward` asks and `wire::answer` judges what comes back. Messages are
//! read and written here rather than by a library: of DNS it is a small part, it must not allocate for what it refuses,
//! and answers must be passed on without being taken apart.

mod config;
mod forward;
mod limit;
mod private;
mod records;
mod resolvers;
mod route;
mod server;
mod service;
mod stats;
#[cfg(test)]
mod testing;
mod wire;
mod zone;

pub use config::{Config, Domain, DomainError, Rate, Resolvers};
pub use records::{RecordsError, records_json, replace_records};
pub use resolvers::{ResolversError, host_resolvers};
pub use route::Audience;
pub use server::{Listener, Server, ServerHandle, StartError};
pub use stats::Stats;
pub use zone::{Zone, ZoneEntry, ZoneError};
