//! Banger on a machine whose first process is systemd, as a person's own is. `cargo xtask test` runs these inside the
//! test host; elsewhere they are ignored.
//!
//! The machine is booted three times with what was written kept: each boot runs the tests of its module, in the
//! order of their names. They follow one person, `otter`, from the installation to its end. Those of `neighbours` have
//! a machine of their own, since others' packet filters are not left as they were found.

#![expect(clippy::unwrap_used, reason = "all of this is a test")]

#[path = "systemd/boot_1.rs"]
mod boot_1;
#[path = "systemd/boot_2.rs"]
mod boot_2;
#[path = "systemd/boot_3.rs"]
mod boot_3;
#[path = "systemd/host.rs"]
mod host;
#[path = "inside/mod.rs"]
mod inside;
#[path = "systemd/internet.rs"]
mod internet;
#[path = "systemd/login.rs"]
mod login;
#[path = "systemd/neighbours.rs"]
mod neighbours;
