//! What the first process of the test host is.

/// The first process of the test host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Init {
    /// A shell script that mounts what is needed, runs the command and turns the machine off.
    #[default]
    Shell,
    /// systemd, with logind, udev, dbus and systemd-resolved, and the command as a service. A command that makes the
    /// file `/run/testhost/next` with `reboot` or `reset` in it has the machine rebooted in order or at once after
    /// its end, and is run again; `TESTHOST_BOOT` tells it the number of the boot, from 1.
    Systemd,
}
