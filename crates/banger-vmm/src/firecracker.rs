//! Firecracker: its configuration file, its API and its versions.

pub mod api;
pub mod config;
pub mod version;

pub use config::Firecracker;
