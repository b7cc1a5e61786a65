//! QEMU: its command line, its version and its control protocol QMP.

pub mod args;
pub mod qmp;
pub mod version;

pub use args::Qemu;
