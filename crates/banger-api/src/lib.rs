//! The API between clients and the daemon: wire types by noun, errors, paths, the client and the OpenAPI document.
//!
//! Wire types may hold whatever a client sends; the daemon converts them to core's checked types in one place.

pub mod client;
pub mod daemon;
pub mod endpoint;
pub mod error;
pub mod event;
pub mod host;
pub mod image;
pub mod kernel;
pub mod network;
pub mod openapi;
pub mod operation;
pub mod paths;
pub mod unit;
pub mod version;
pub mod vm;
