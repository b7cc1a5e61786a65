//! Who this guest is: the files, the clock and the random pool of one particular VM.

use super::rooted::Root;
use super::{Reporter, generators, hostkey, network, text};
use crate::sys;
use banger_guest::boot_config::BootConfig;
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use std::fs::OpenOptions;
use std::io;
use std::net::Ipv4Addr;

/// Where images keep ssh servers.
const SSH_SERVERS: [&str; 8] = [
    "usr/sbin/sshd",
    "usr/bin/sshd",
    "usr/local/sbin/sshd",
    "sbin/sshd",
    "usr/sbin/dropbear",
    "usr/bin/dropbear",
    "usr/local/sbin/dropbear",
    "sbin/dropbear",
];
/// Where images keep systemd.
const SYSTEMD: [&str; 2] = ["usr/lib/systemd/systemd", "lib/systemd/systemd"];
/// Directories of system unit files from which an older image may mount drives that it no longer has.
const UNIT_DIRECTORIES: [&str; 3] = [
    "etc/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
];

/// Whether the image brings an ssh server.
pub(crate) fn has_ssh_server(root: &Root) -> bool {
    SSH_SERVERS.iter().any(|path| root.is_file(path))
}

/// Writes all of it. What fails is reported and the rest still done.
pub(crate) fn write(
    root: &Root,
    config: &BootConfig,
    root_is_overlay: bool,
    report: &mut Reporter,
) {
    report.check("cannot seed the random pool", seed_random(&config.seed));
    report.check("cannot set the clock", set_clock(config.time));
    let name = config.hostname.as_bytes();
    report.check(
        "cannot set the host name",
        rustix::system::sethostname(name),
    );
    let address = config.network.as_ref().map(|network| network.address);
    let dns: &[Ipv4Addr] = config.network.as_ref().map_or(&[], |network| &network.dns);
    let mut files = Files { root, report };
    files.write(
        "etc/hostname",
        format!("{}\n", config.hostname).as_bytes(),
        0o644,
    );
    let hosts = text::hosts(&files.read("etc/hosts"), &config.hostname, address);
    files.write("etc/hosts", hosts.as_bytes(), 0o644);
    if !dns.is_empty() {
        files.write("etc/resolv.conf", text::resolv_conf(dns).as_bytes(), 0o644);
    }
    match text::machine_id(&config.vm_id) {
        Some(id) => files.write("etc/machine-id", id.as_bytes(), 0o444),
        None => files
            .report
            .warn("the VM's id is not one that /etc/machine-id can hold"),
    }
    files.host_keys(config);
    files.authorized_keys(&config.authorized_keys);
    if let Some(network) = &config.network {
        files.network_managers(&network.mac);
    }
    // The directory of run-time units is how programs tell that systemd is PID 1: none is made for another init.
    let has_systemd = SYSTEMD.iter().any(|path| root.is_file(path));
    if has_systemd {
        files.keep_modules_mounted();
    }
    files.stale_mounts(root_is_overlay);
    if has_systemd {
        files.mask_idle_generators();
    }
}

fn seed_random(seed: &str) -> io::Result<()> {
    let seed = text::seed(seed).ok_or_else(|| io::Error::other("the seed is not 32 bytes"))?;
    sys::credit_entropy(OpenOptions::new().write(true).open("/dev/urandom")?, seed)
}

/// Sets the clock forward, never back: without a clock of its own a guest starts in 1970.
fn set_clock(time: i64) -> io::Result<()> {
    if clock_gettime(ClockId::Realtime).tv_sec < time {
        let time = Timespec {
            tv_sec: time,
            tv_nsec: 0,
        };
        clock_settime(ClockId::Realtime, time)?;
    }
    Ok(())
}

struct Files<'a> {
    root: &'a Root,
    report: &'a mut Reporter,
}

impl Files<'_> {
    fn write(&mut self, path: &str, bytes: &[u8], mode: u32) {
        let written = self.root.write(path, bytes, mode);
        self.report.check(&format!("cannot write /{path}"), written);
    }

    /// What is there now, as far as it is text.
    fn read(&self, path: &str) -> String {
        let bytes = self.root.read(path).unwrap_or_default();
        String::from_utf8(bytes).unwrap_or_default()
    }

    fn host_keys(&mut self, config: &BootConfig) {
        let public = format!("{}\n", config.host_key_public.trim_end());
        if self.root.is_directory("etc/ssh") {
            self.write(
                "etc/ssh/ssh_host_ed25519_key",
                config.host_key.as_bytes(),
                0o600,
            );
            self.write("etc/ssh/ssh_host_ed25519_key.pub", public.as_bytes(), 0o644);
        }
        let has_dropbear = self.root.is_directory("etc/dropbear")
            || SSH_SERVERS
                .iter()
                .any(|path| path.ends_with("dropbear") && self.root.is_file(path));
        if has_dropbear {
            match hostkey::to_dropbear(&config.host_key) {
                Ok(key) => self.write("etc/dropbear/dropbear_ed25519_host_key", &key, 0o600),
                Err(error) => self.report.warn(error),
            }
        }
    }

    fn authorized_keys(&mut self, keys: &[String]) {
        let path = "root/.ssh/authorized_keys";
        if let Err(error) = self.root.ensure_directory("root", 0o700) {
            self.report.warn(format_args!("cannot make /root: {error}"));
        }
        let prepared = self
            .root
            .ensure_directory("root/.ssh", 0o700)
            .and_then(|_| self.root.set_directory_mode("root/.ssh", 0o700));
        self.report.check("cannot make /root/.ssh", prepared);
        let text = text::with_block(&self.read(path), keys);
        self.write(path, text.as_bytes(), 0o600);
    }

    /// Tells whoever manages networks in the image that `eth0` is set up already.
    fn network_managers(&mut self, mac: &str) {
        let name = network::NAME;
        let unmanaged = format!("[Match]\nMACAddress={mac}\n\n[Link]\nUnmanaged=yes\n");
        self.write(
            "run/systemd/network/00-banger.network",
            unmanaged.as_bytes(),
            0o644,
        );
        // Else udev would want to name it after its slot.
        let keep =
            format!("[Match]\nMACAddress={mac}\n\n[Link]\nName={name}\nMACAddressPolicy=none\n");
        self.write("run/systemd/network/00-banger.link", keep.as_bytes(), 0o644);
        let keyfile = format!("[keyfile]\nunmanaged-devices=interface-name:{name}\n");
        self.write(
            "run/NetworkManager/conf.d/00-banger.conf",
            keyfile.as_bytes(),
            0o644,
        );
        self.write("run/cloud-init/disabled", b"", 0o644);
        if self.root.is_directory("etc/cloud") {
            self.write("etc/cloud/cloud-init.disabled", b"", 0o644);
        }
    }

    /// Leaves the modules to systemd's very last round of unmounting: until then udev reads them, and a unit that
    /// cannot be stopped is reported as failed at every shutdown.
    fn keep_modules_mounted(&mut self) {
        for prefix in ["usr-lib-modules", "lib-modules"] {
            let path = format!("run/systemd/system/{prefix}-.mount.d/50-banger.conf");
            self.write(&path, b"[Unit]\nDefaultDependencies=no\n", 0o644);
        }
    }

    /// Spares systemd's start the generators that would find nothing.
    fn mask_idle_generators(&mut self) {
        let idle = generators::idle(self.root, &UNIT_DIRECTORIES);
        for name in &idle {
            let mask = format!("{}/{name}", generators::MASKS);
            let masked = self.root.symlink(&mask, "/dev/null");
            self.report
                .check(&format!("cannot mask the generator {name}"), masked);
        }
        self.write(
            "run/tmpfiles.d/banger.conf",
            generators::unmask(&idle).as_bytes(),
            0o644,
        );
    }

    /// Takes away mounts of drives that older images had and this VM does not.
    fn stale_mounts(&mut self, root_is_overlay: bool) {
        for unit in ["home.mount", "var.mount"] {
            let stale = UNIT_DIRECTORIES.iter().any(|directory| {
                text::is_stale_mount_unit(&self.read(&format!("{directory}/{unit}")))
            });
            if stale {
                // This directory outranks /etc/systemd/system, /run/systemd/system would not.
                let mask = format!("run/systemd/system.control/{unit}");
                let masked = self.root.symlink(&mask, "/dev/null");
                self.report
                    .check(&format!("cannot mask the unit {unit}"), masked);
            }
        }
        if let Some(fstab) = text::fstab(&self.read("etc/fstab"), root_is_overlay) {
            self.write("etc/fstab", fstab.as_bytes(), 0o644);
        }
    }
}
