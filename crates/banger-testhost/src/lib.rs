//! The test host: an emulated machine with a working KVM, for tests that the machine at hand cannot run.
//!
//! It is a Debian cloud kernel under QEMU's emulation, whose processor has SVM, so inside it KVM runs ordinary
//! guests. Its first process is a shell script or systemd ([`init`]). It is made from packages once ([`base`]) and
//! booted anew for each command ([`machine`]), with banger's programs and the tests' fixtures on a second drive
//! ([`drive`]). It has no network: the command is on that drive, what it writes comes out of virtio-serial ports. So it
//! needs no privilege, and nothing of it outlives its QEMU.
//!
//! ```text
//!   vda  root of the test host, shared, writes are thrown away
//!   vdb  /mnt, read-only: init, runner, command, bin/, lib/, fixtures/, suite
//!   virtio-serial  stdout, stderr, status
//! ```

pub mod base;
pub mod drive;
pub mod error;
pub mod fixtures;
pub mod init;
pub mod machine;
pub mod tree;

mod run;

pub use error::Error;

/// What the functions here return.
pub type Result<T> = std::result::Result<T, Error>;
