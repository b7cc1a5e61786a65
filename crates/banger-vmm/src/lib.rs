//! VMMs: the [`driver::Vmm`] trait with its two drivers, and the shim that is the parent of every VMM.

pub mod protocol;
