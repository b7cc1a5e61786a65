//! Makes images and kernel bundles, and the empty filesystems that VMs start from.
//!
//! Everything is built in a staging folder that the caller gives and then moves into its store with [`publish`].
//! No package's or image's content ever touches a path of the host: archives are read entry by entry and fed to an
//! ext4 writer, nothing is mounted and no tree is unpacked. Calls block; long ones report through
//! [`Context::progress`] and stop when [`Context::cancel`] is set.

pub mod context;
pub mod error;
pub mod image;
pub mod kernel;
pub mod store;
pub mod template;

mod apt;
mod ext4;
mod run;
mod tree;
mod unpack;

pub use context::{Context, Progress};
pub use error::BuildError;
pub use store::{publish, remove};
