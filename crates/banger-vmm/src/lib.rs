//! VMMs: the [`driver::Vmm`] trait with its two drivers, and the shim that is the parent of every VMM.

pub mod driver;
pub mod firecracker;
pub mod protocol;
pub mod qemu;
pub mod version;
