//! VMMs: the [`driver::Vmm`] trait with its two drivers, and the shim that is the parent of every VMM.

pub mod client;
pub mod console;
pub mod driver;
pub mod exit;
pub mod firecracker;
pub mod launch;
pub mod lock;
pub mod process;
pub mod protocol;
pub mod qemu;
pub mod sandbox;
pub mod shim;
pub mod socket;
pub mod version;
