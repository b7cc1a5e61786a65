//! The daemon: one per user, owner of the VMs' records, parent of nothing that must outlive it.
//!
//! A request goes `server` → `registry` → a VM's actor (`vm`) → `decide` → a plan of steps → `host`, `network`,
//! `images` and the shim → `store`. Only a VM's actor changes its phase; only `store` speaks SQL.

mod blocking;
mod config;
mod convert;
mod create;
mod doctor;
mod drivers;
mod events;
mod host_boot;
mod images;
mod install;
mod instance;
mod keys;
mod ledger;
mod lifecycle;
mod log;
mod metrics;
mod names;
mod network;
mod notify;
mod operations;
mod reconcile;
mod record;
mod registry;
mod server;
mod startup;
mod storage;
mod store;
mod trash;
mod vm;
mod world;

use banger_host::crash;
pub use lifecycle::main;
