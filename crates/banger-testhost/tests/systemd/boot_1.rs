//! The first boot: from the installation to the first reboot.

#[path = "installed.rs"]
mod installed;
#[path = "names.rs"]
mod names;
#[path = "session.rs"]
mod session;
#[path = "then_reboot.rs"]
mod then_reboot;
