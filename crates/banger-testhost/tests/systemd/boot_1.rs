//! The first boot: from the installation to the first reboot.

#[path = "installed.rs"]
mod installed;
