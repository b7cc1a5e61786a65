//! The test host's root, kernel and initrd, made from Debian's packages once and kept.

use crate::Result;
use crate::error::Error;
use crate::run::{cannot_start, command, output_of};
use crate::tree::{Tree, image_bytes};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// Raised when something changes that neither the packages nor the scripts show.
const RECIPE: &str = "2";
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
const PACKAGES: &[&str] = &[
    KERNEL_PACKAGE,
    "btrfs-progs",
    "busybox-static",
    "ca-certificates",
    "curl",
    "dbus",
    "dbus-user-session",
    "dmsetup",
    "docker.io",
    "e2fsprogs",
    "firewalld",
    "iproute2",
    "iptables",
    "iputils-ping",
    "kmod",
    "libpam-systemd",
    "libseccomp2",
    "mmdebstrap",
    "mount",
    "nftables",
    "openssh-client",
    "openssh-server",
    "passt",
    "polkitd",
    "procps",
    "qemu-system-x86",
    "strace",
    "systemd-resolved",
    "systemd-sysv",
    "udev",
    "ufw",
    "uidmap",
    "xfsprogs",
];
/// What is done to the tree in `$1`. Each machine makes its own keys, packages start nothing by themselves, and there
/// is an ordinary user, `otter`, with ids for user namespaces.
const HOOK: &str = r#"set -e
rm -f "$1"/etc/ssh/ssh_host_*
for wanted in "$1"/etc/systemd/system/*.wants; do
    case "$wanted" in */sysinit.target.wants) ;; *) rm -r "$wanted" ;; esac
done
chroot "$1" useradd --create-home --shell /bin/bash --groups kvm otter"#;
/// Modules without which the root cannot be mounted; what they need comes along.
const ROOT_MODULES: [&str; 3] = ["virtio_pci", "virtio_blk", "ext4"];
/// What tests may write.
const ROOM_BYTES: u64 = 8 << 30;
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const INITRD_SCRIPT: &str = include_str!("inside/initrd.sh");

/// What the test host boots from.
#[derive(Debug, Clone)]
pub struct Base {
    /// Its root filesystem, which is never written to.
    pub root: PathBuf,
    /// Its kernel.
    pub kernel: PathBuf,
    /// Its initrd.
    pub initrd: PathBuf,
}

impl Base {
    fn in_folder(folder: &Path) -> Self {
        Self {
            root: folder.join("root.ext4"),
            kernel: folder.join("vmlinuz"),
            initrd: folder.join("initrd"),
        }
    }
}

/// Makes the base in `cache` if its recipe is not the one that it was made from, which takes about a minute.
///
/// # Errors
/// This is no Debian, or its packages cannot be had.
pub fn ensure(cache: &Path) -> Result<Base> {
    std::fs::create_dir_all(cache).map_err(Error::io("make", cache))?;
    let lock_path = cache.join("lock");
    let lock = File::create(&lock_path).map_err(Error::io("create", &lock_path))?;
    lock.lock().map_err(Error::io("lock", &lock_path))?;
    let sources = sources()?;
    let folder = cache.join(key(&sources));
    let base = Base::in_folder(&folder);
    if folder.exists() {
        return Ok(base);
    }
    eprintln!("making the test host from packages, once");
    remove_folders(cache)?;
    let partial = cache.join("partial");
    std::fs::create_dir(&partial).map_err(Error::io("make", &partial))?;
    build(&sources, &partial)?;
    std::fs::rename(&partial, &folder).map_err(Error::io("rename", &partial))?;
    Ok(base)
}

fn key(sources: &Sources) -> String {
    let mut hash = Sha256::new();
    for part in [RECIPE, HOOK, INITRD_SCRIPT, &sources.suite, &sources.list]
        .iter()
        .chain(PACKAGES)
    {
        hash.update(part);
        hash.update([0]);
    }
    hash.finalize()[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Removes what older recipes left.
fn remove_folders(cache: &Path) -> Result<()> {
    for entry in std::fs::read_dir(cache).map_err(Error::io("list", cache))? {
        let path = entry.map_err(Error::io("list", cache))?.path();
        if path.is_dir() {
            std::fs::remove_dir_all(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

struct Sources {
    suite: String,
    /// A `sources.list`.
    list: String,
}

/// The machine's own Debian sources, without backports.
fn sources() -> Result<Sources> {
    let targets = output_of(command("apt-get").args([
        "indextargets",
        "--format",
        "$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(CODENAME)",
        "Created-By: Packages",
    ]))?;
    read_sources(&targets).ok_or_else(|| Error::NotDebian {
        reason: "apt knows no Debian source here; `sudo apt-get update` reads its lists".to_owned(),
    })
}

fn read_sources(targets: &str) -> Option<Sources> {
    let mut suite = None;
    let mut lines = Vec::new();
    for target in targets.lines() {
        let fields: Vec<&str> = target.split('|').collect();
        let &["Debian", uri, release, "main", codename] = fields.as_slice() else {
            continue;
        };
        if release.contains("backports") {
            continue;
        }
        if !release.contains('-') {
            suite = Some(codename.to_owned());
        }
        lines.push(format!("deb [signed-by={KEYRING}] {uri} {release} main"));
    }
    lines.sort();
    lines.dedup();
    Some(Sources {
        suite: suite?,
        list: lines.join("\n") + "\n",
    })
}

fn build(sources: &Sources, folder: &Path) -> Result<()> {
    let list = folder.join("sources.list");
    std::fs::write(&list, &sources.list).map_err(Error::io("write", &list))?;
    let archive_path = folder.join("root.tar");
    let archive = File::create_new(&archive_path).map_err(Error::io("create", &archive_path))?;
    let program = "mmdebstrap";
    let status = command(program)
        .args(["--variant=minbase", "--format=tar"])
        .arg(format!("--include={}", PACKAGES.join(",")))
        .arg(format!("--customize-hook={HOOK}"))
        .arg(&sources.suite)
        .arg("-")
        .arg(&list)
        .env("DEBIAN_FRONTEND", "noninteractive")
        // Its initramfs would be thrown away.
        .env("INITRD", "No")
        .stdin(Stdio::null())
        .stdout(archive)
        .status()
        .map_err(cannot_start(program))?;
    if !status.success() {
        return Err(Error::Program {
            program: program.to_owned(),
            reason: status.to_string(),
        });
    }
    let base = Base::in_folder(folder);
    let archive = File::open(&archive_path).map_err(Error::io("read", &archive_path))?;
    std::fs::remove_file(&archive_path).map_err(Error::io("remove", &archive_path))?;
    let bytes = archive
        .metadata()
        .map_err(Error::io("read", &archive_path))?
        .len();
    let mut tree = Tree::new(&base.root, image_bytes(bytes, ROOM_BYTES))?;
    let mut kept = BTreeMap::new();
    tree.add_archive(archive, is_for_boot, |path, content| {
        kept.insert(path.to_owned(), content);
    })?;
    tree.write()?;

    let kernel = kept
        .iter()
        .find(|(path, _)| path.starts_with("boot"))
        .map(|(_, content)| content)
        .ok_or_else(|| Error::incomplete("kernel in /boot"))?;
    std::fs::write(&base.kernel, kernel).map_err(Error::io("write", &base.kernel))?;
    let initrd = initrd(&kept)?;
    std::fs::write(&base.initrd, initrd).map_err(Error::io("write", &base.initrd))
}

/// Whether a file of the root is needed to boot it.
fn is_for_boot(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    (path.starts_with("boot") && name.starts_with("vmlinuz-"))
        || name == "modules.dep"
        || (path.to_string_lossy().contains("lib/modules/") && name.contains(".ko"))
        || path.ends_with("bin/busybox")
}

fn initrd(kept: &BTreeMap<PathBuf, Vec<u8>>) -> Result<Vec<u8>> {
    let named = |end: &str| {
        kept.iter()
            .find(|(path, _)| path.ends_with(end))
            .ok_or_else(|| Error::incomplete(end))
    };
    let (dependencies_path, dependencies) = named("modules.dep")?;
    let (_, busybox) = named("bin/busybox")?;
    let modules_folder = dependencies_path.parent().unwrap_or(Path::new(""));
    let order = load_order(&String::from_utf8_lossy(dependencies));

    let mut archive = Vec::new();
    let mut inode = 1;
    let mut add = |name: &str, mode: u32, content: &[u8]| {
        inode += 1;
        let mut write = || -> std::io::Result<()> {
            let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
            let mut writer = cpio::newc::Builder::new(name)
                .ino(inode)
                .mode(mode)
                .write(&mut archive, size);
            writer.write_all(content)?;
            writer.finish().map(|_| ())
        };
        write().map_err(Error::io("write", Path::new("initrd")))
    };
    for folder in ["bin", "dev", "modules", "root"] {
        add(folder, 0o040_755, b"")?;
    }
    add("init", 0o100_755, INITRD_SCRIPT.as_bytes())?;
    add("bin/busybox", 0o100_755, busybox)?;
    let mut list = String::new();
    for module in order {
        let path = modules_folder.join(&module);
        let content = kept
            .get(&path)
            .ok_or_else(|| Error::incomplete(module.clone()))?;
        let name = module_name(&module);
        list.push_str(&format!("{name}.ko\n"));
        let content = decompress(&path, content)?;
        add(&format!("modules/{name}.ko"), 0o100_644, &content)?;
    }
    add("modules/order", 0o100_644, list.as_bytes())?;
    cpio::newc::trailer(&mut archive).map_err(Error::io("write", Path::new("initrd")))?;
    Ok(archive)
}

fn decompress(path: &Path, content: &[u8]) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return Ok(content.to_owned());
    }
    let mut plain = Vec::new();
    std::io::copy(&mut lzma_rust2::XzReader::new(content, false), &mut plain)
        .map_err(Error::io("decompress", path))?;
    Ok(plain)
}

/// `kernel/fs/ext4/ext4.ko.xz` is `ext4`.
fn module_name(path: &str) -> &str {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.split(".ko").next().unwrap_or(name)
}

/// The files of [`ROOT_MODULES`] and all that these need, each after what it needs. What `modules.dep` does not
/// name is built in.
fn load_order(modules_dep: &str) -> Vec<String> {
    let mut order: Vec<String> = Vec::new();
    for wanted in ROOT_MODULES {
        let line = modules_dep
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(module, _)| module_name(module).replace('-', "_") == wanted);
        let Some((module, needs)) = line else {
            continue;
        };
        // depmod lists what a module needs with the deepest last.
        for file in needs.split_whitespace().rev().chain([module]) {
            if !order.iter().any(|known| known == file) {
                order.push(file.to_owned());
            }
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need_and_once() {
        let dep = "kernel/lib/crc16.ko.xz:\n\
                   kernel/fs/jbd2/jbd2.ko.xz: kernel/lib/crc.ko.xz\n\
                   kernel/fs/ext4/ext4.ko.xz: kernel/lib/crc16.ko.xz kernel/fs/jbd2/jbd2.ko.xz kernel/lib/crc.ko.xz\n\
                   kernel/drivers/block/virtio_blk.ko.xz: kernel/lib/crc.ko.xz\n";
        let names: Vec<String> = load_order(dep)
            .iter()
            .map(|path| module_name(path).to_owned())
            .collect();
        assert_eq!(names, ["crc", "virtio_blk", "jbd2", "crc16", "ext4"]);
    }

    #[test]
    fn sources_are_the_machines_own_without_backports() {
        let sources = read_sources(
            "Debian|http://mirror/debian/|bookworm|main|bookworm\n\
             Debian|http://mirror/debian/|bookworm-backports|main|bookworm-backports\n\
             Debian|http://mirror/security/|bookworm-security|main|bookworm-security\n\
             Other|http://other/|stable|main|stable\n",
        )
        .unwrap();
        assert_eq!(sources.suite, "bookworm");
        assert_eq!(sources.list.lines().count(), 2);
        assert!(read_sources("Ubuntu|http://mirror/|noble|main|noble\n").is_none());
    }
}
