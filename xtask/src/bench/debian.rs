//! A Debian disk with the default image's packages, made as a person would make one: nothing is masked, and its
//! initramfs is its own. It is made once and kept.

use super::bare::BareVmm;
use super::home::{Home, store};
use crate::command::{command, run};
use crate::failure::{Failure, Result};
use crate::layout::root;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The guest's address, in a network of its own.
pub(super) const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 231, 0, 2);
/// The other end of its TAP.
pub(super) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 231, 0, 1);
const DISK_SIZE: &str = "4G";
/// What dpkg leaves out, as for the default image.
const LEFT_OUT: [&str; 5] = [
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
];

/// The disk, and what goes with it.
#[derive(Debug)]
pub(super) struct Debian {
    pub(super) disk: PathBuf,
    initrd: PathBuf,
    key: PathBuf,
}

/// A VMM that boots a copy of the disk.
#[derive(Debug)]
pub(super) struct DebianVmm {
    pub(super) vmm: BareVmm,
    /// The copy, which whoever starts the VMM makes.
    pub(super) disk: PathBuf,
}

impl Debian {
    /// Makes what is missing.
    pub(super) fn ensure(home: &Home) -> Result<Self> {
        let kernels = home.json(&["kernel", "list"])?;
        // `package linux-image-RELEASE VERSION`
        let source = kernels
            .as_array()
            .into_iter()
            .flatten()
            .find(|kernel| kernel["name"] == "default")
            .and_then(|kernel| kernel["source"].as_str())
            .unwrap_or_default();
        let package = source
            .split_whitespace()
            .find(|word| word.starts_with("linux-image-"))
            .ok_or_else(|| {
                Failure::new(format!("the default kernel is from no package: {source}"))
            })?;
        let recipe = root().join("crates/banger-image/recipes/debian/packages.apt");
        let recipe = std::fs::read_to_string(&recipe)
            .map_err(Failure::io(format!("cannot read `{}`", recipe.display())))?;
        let packages = packages(&recipe, package);
        let folder = store().join("debian");
        let made = Self {
            disk: folder.join("disk.img"),
            initrd: folder.join("initrd.img"),
            key: folder.join("key"),
        };
        let stamp = folder.join("made-of");
        if std::fs::read_to_string(&stamp).is_ok_and(|old| old == packages) {
            return Ok(made);
        }
        // An older one, or one that was broken off.
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder)
            .map_err(Failure::io(format!("cannot make `{}`", folder.display())))?;
        made.make(&folder, &packages)?;
        std::fs::write(&stamp, &packages)
            .map_err(Failure::io(format!("cannot write `{}`", stamp.display())))?;
        Ok(made)
    }

    fn make(&self, folder: &Path, packages: &str) -> Result<()> {
        run(command("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(&self.key))?;
        let public = self.key.with_extension("pub");
        let key = std::fs::read_to_string(&public)
            .map_err(Failure::io(format!("cannot read `{}`", public.display())))?;
        let archive = folder.join("tree.tar");
        let mut mmdebstrap = command("mmdebstrap");
        mmdebstrap
            .args(["--mode=unshare", "--variant=minbase", "--format=tar"])
            .arg(format!("--include={packages}"))
            .args(LEFT_OUT.map(|option| format!("--dpkgopt={option}")))
            .arg(format!("--customize-hook={}", customize(key.trim())))
            .args([suite()?.as_str(), "-"])
            .args(sources())
            // The ids that it runs as may not enter this folder.
            .current_dir("/")
            .stdout(
                std::fs::File::create(&archive)
                    .map_err(Failure::io(format!("cannot write `{}`", archive.display())))?,
            );
        run(&mut mmdebstrap)?;
        let tree = folder.join("tree");
        std::fs::create_dir(&tree)
            .map_err(Failure::io(format!("cannot make `{}`", tree.display())))?;
        run(command("tar")
            .args(["--numeric-owner", "-xpf"])
            .arg(&archive)
            .arg("-C")
            .arg(&tree))?;
        let initrd = std::fs::read_dir(tree.join("boot"))
            .map_err(Failure::io("cannot read the disk's /boot"))?
            .flatten()
            .find(|entry| {
                entry
                    .file_name()
                    .to_string_lossy()
                    .starts_with("initrd.img-")
            })
            .ok_or_else(|| Failure::new("Debian made no initramfs"))?;
        std::fs::copy(initrd.path(), &self.initrd)
            .map_err(Failure::io("cannot copy Debian's initramfs"))?;
        run(command("mke2fs")
            .args(["-q", "-t", "ext4", "-d"])
            .arg(&tree)
            .arg(&self.disk)
            .arg(DISK_SIZE))?;
        std::fs::remove_dir_all(&tree)
            .and_then(|()| std::fs::remove_file(&archive))
            .map_err(Failure::io("cannot remove what the disk was made from"))
    }

    /// Our VMM's command line with this disk and initramfs in the place of ours.
    pub(super) fn vmm(&self, ours: BareVmm) -> Result<DebianVmm> {
        let disk = ours.folder.join("disk.img");
        let args = debian_args(&ours.args, &self.initrd, &disk);
        Ok(DebianVmm {
            vmm: BareVmm { args, ..ours },
            disk,
        })
    }

    /// `ssh` into the guest.
    pub(super) fn ssh(&self, what: &str) -> Command {
        let mut ssh = command("ssh");
        ssh.args(["-F", "none", "-o", "StrictHostKeyChecking=no", "-o"])
            .args(["UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"])
            // As `banger vm ssh` does.
            .args(["-o", "PreferredAuthentications=publickey"])
            .args(["-o", "KexAlgorithms=^curve25519-sha256"])
            .args(["-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-i"])
            .arg(&self.key)
            .arg(format!("root@{ADDRESS}"))
            .arg(what);
        ssh
    }
}

/// The names in a recipe, and what makes a machine of its own of them.
fn packages(recipe: &str, kernel: &str) -> String {
    recipe
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .filter(|line| !line.is_empty())
        .chain([kernel, "initramfs-tools"])
        .collect::<Vec<_>>()
        .join(",")
}

/// What a person would still do to it: a name, a root filesystem, an address and a key.
fn customize(key: &str) -> String {
    format!(
        r#"set -e
echo debian > "$1/etc/hostname"
echo "/dev/vda / ext4 errors=remount-ro 0 1" > "$1/etc/fstab"
printf "[Match]\nName=e*\n[Network]\nAddress={ADDRESS}/24\nGateway={GATEWAY}\n" > "$1/etc/systemd/network/wired.network"
chroot "$1" systemctl --quiet enable systemd-networkd.service
chroot "$1" systemd-machine-id-setup
mkdir -m 700 -p "$1/root/.ssh"
echo "{key}" > "$1/root/.ssh/authorized_keys""#
    )
}

/// The host's suite.
fn suite() -> Result<String> {
    std::fs::read_to_string("/etc/os-release")
        .unwrap_or_default()
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .ok_or_else(|| Failure::new("/etc/os-release has no VERSION_CODENAME"))
}

/// The files that name the host's sources of packages.
fn sources() -> Vec<PathBuf> {
    let listed = std::fs::read_dir("/etc/apt/sources.list.d")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    std::iter::once(PathBuf::from("/etc/apt/sources.list"))
        .chain(listed)
        .filter(|path| path.is_file())
        .filter(|path| {
            path.extension()
                .is_some_and(|end| end == "list" || end == "sources")
        })
        .collect()
}

/// Keeps the machine; replaces the initramfs, and the drives by one.
fn debian_args(ours: &[String], initrd: &Path, disk: &Path) -> Vec<String> {
    let mut args = Vec::new();
    for pair in options(ours) {
        match pair.as_slice() {
            ["-initrd", _] => args.extend(["-initrd".into(), initrd.display().to_string()]),
            ["-append", line] => {
                args.extend(["-append".into(), format!("{line} root=/dev/vda rw")])
            }
            ["-drive", value] if value.contains("id=drive0,") => args.extend([
                "-drive".into(),
                format!(
                    "if=none,id=drive0,format=raw,cache=writeback,discard=unmap,file={}",
                    disk.display()
                ),
            ]),
            ["-drive", _] => {}
            ["-device", value]
                if value.contains("drive=drive") && !value.contains("drive=drive0,") => {}
            pair => args.extend(pair.iter().map(|word| (*word).to_owned())),
        }
    }
    args
}

/// The words of a command line as options, each with its value where it has one.
fn options(args: &[String]) -> Vec<Vec<&str>> {
    let mut options: Vec<Vec<&str>> = Vec::new();
    for word in args {
        match options.last_mut() {
            Some(option) if !word.starts_with('-') && option.len() == 1 => option.push(word),
            _ => options.push(vec![word]),
        }
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_stays_and_the_drives_become_one() {
        let words = |line: &str| -> Vec<String> { line.split('|').map(str::to_owned).collect() };
        let ours = words(
            "-nodefaults|-m|512M|-initrd|/a|-append|quiet|-drive|if=none,id=drive0,readonly=on,file=/r|\
             -device|virtio-blk-pci,drive=drive0,addr=0x2|-drive|if=none,id=drive1,file=/m|\
             -device|virtio-blk-pci,drive=drive1,addr=0x3|-device|virtio-rng-pci",
        );
        let theirs = debian_args(&ours, Path::new("/i"), Path::new("/d"));
        let expected = words(
            "-nodefaults|-m|512M|-initrd|/i|-append|quiet root=/dev/vda rw|\
             -drive|if=none,id=drive0,format=raw,cache=writeback,discard=unmap,file=/d|\
             -device|virtio-blk-pci,drive=drive0,addr=0x2|-device|virtio-rng-pci",
        );
        assert_eq!(theirs, expected);
    }

    #[test]
    fn packages_are_the_recipes_with_a_kernel_and_its_initramfs() {
        assert_eq!(
            packages("# what\nudev\n\ndbus # why\n", "linux-image-1"),
            "udev,dbus,linux-image-1,initramfs-tools"
        );
    }
}
