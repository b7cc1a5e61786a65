//! What a VMM may reach: pure lists, from which the shim makes the VMM's own root and its Landlock rules.

use crate::driver::{Accelerator, MachineConfig};
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};

/// What one VMM may reach beside its program and that program's libraries and firmware.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// The VMM's working folder, and the only one where it may make anything, which is sockets. It holds nothing that
    /// the shim or the daemon writes.
    pub folder: PathBuf,
    /// Files that it only reads.
    pub read_only: Vec<PathBuf>,
    /// Files that it reads and writes.
    pub writable: Vec<PathBuf>,
    /// Device nodes that it opens.
    pub devices: Vec<PathBuf>,
}

impl Sandbox {
    /// What a VMM needs that runs `machine`.
    pub fn of(machine: &MachineConfig) -> Self {
        let mut read_only = vec![machine.kernel.clone(), machine.initrd.clone()];
        read_only.extend(machine.firmware.clone());
        let mut writable = Vec::new();
        for drive in &machine.drives {
            if drive.read_only {
                read_only.push(drive.path.clone());
            } else {
                writable.push(drive.path.clone());
            }
        }
        let mut devices: Vec<PathBuf> = vec!["/dev/null".into(), "/dev/urandom".into()];
        if machine.accelerator == Accelerator::Kvm {
            devices.push("/dev/kvm".into());
        }
        if machine.nic.is_some() {
            devices.push("/dev/net/tun".into());
        }
        Self {
            folder: machine.run_dir.clone(),
            read_only,
            writable,
            devices,
        }
    }
}

/// One part of the sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layer {
    /// A user namespace: no right of the VMM counts outside of it.
    User,
    /// A root of its own, with nothing in it but what [`Sandbox`] lists.
    Mount,
    /// It sees and signals no other process.
    Pid,
    /// It shares no System V or POSIX queues and memory.
    Ipc,
    /// It sees the instance's network alone.
    Network,
    /// It has no capabilities and can gain none.
    Capabilities,
    /// The kernel's second look at each file it opens, by path.
    Landlock,
    /// A cgroup of its own and the shim's, by a scope of systemd's. Whoever starts the shim sees to it.
    Cgroup,
}

impl Layer {
    /// Its word.
    pub const fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Mount => "mount",
            Self::Pid => "pid",
            Self::Ipc => "ipc",
            Self::Network => "network",
            Self::Capabilities => "capabilities",
            Self::Landlock => "landlock",
            Self::Cgroup => "cgroup",
        }
    }
}

/// What became of one layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// The layer.
    pub layer: Layer,
    /// Why it is missing, if it is.
    pub missing: Option<String>,
}

/// What may be done with a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Access {
    /// Read, if it is a file.
    Read,
    /// Read and execute, with everything below.
    Run,
    /// Read and write a file.
    Write,
    /// Open a device node.
    Device,
    /// Make sockets in a folder, and use what is there.
    Folder,
}

/// One path that a VMM sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) path: PathBuf,
    pub(crate) access: Access,
}

/// Where systems keep shared libraries, what tells where they are, and QEMU's firmware. Those that are absent do no
/// harm.
const RUNTIME: [&str; 15] = [
    "/etc/ld.so.cache",
    "/gnu/store",
    "/lib",
    "/lib32",
    "/lib64",
    "/nix/store",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/local/share/qemu",
    "/usr/share/qboot",
    "/usr/share/qemu",
    "/usr/share/seabios",
    "/usr/share/seavgabios",
];
/// The same below the folder that a program with a prefix of its own, such as `/opt/qemu`, was installed to.
const RUNTIME_BELOW_PREFIX: [&str; 3] = ["lib", "lib64", "share/qemu"];

/// All that a VMM which is `program` sees, parents before what is below them. `program` has no links in it.
///
/// # Errors
/// A path that is not absolute or has `..` in it, in words.
pub(crate) fn entries(sandbox: &Sandbox, program: &Path) -> Result<Vec<Entry>, String> {
    let entry = |path: PathBuf, access| Entry { path, access };
    let mut all: Vec<Entry> = RUNTIME
        .iter()
        .map(|path| entry(path.into(), Access::Run))
        .collect();
    if let Some(prefix) = own_prefix(program) {
        all.extend(
            RUNTIME_BELOW_PREFIX
                .iter()
                .map(|below| entry(prefix.join(below), Access::Run)),
        );
    }
    all.push(entry(program.to_owned(), Access::Run));
    for (paths, access) in [
        (&sandbox.read_only, Access::Read),
        (&sandbox.writable, Access::Write),
        (&sandbox.devices, Access::Device),
    ] {
        all.extend(paths.iter().map(|path| entry(path.clone(), access)));
    }
    all.push(entry(sandbox.folder.clone(), Access::Folder));
    if let Some(odd) = all.iter().find(|entry| !is_plain(&entry.path)) {
        return Err(format!("`{}` is no plain path", odd.path.display()));
    }
    // The greatest access first, so that it is the one that stays.
    all.sort_by(|a, b| a.path.cmp(&b.path).then(b.access.cmp(&a.access)));
    all.dedup_by(|later, earlier| later.path == earlier.path);
    let mut kept: Vec<Entry> = Vec::new();
    for entry in all {
        let covered = kept.iter().any(|above| {
            above.access == Access::Run
                && entry.access <= Access::Run
                && entry.path.starts_with(&above.path)
        });
        if !covered {
            kept.push(entry);
        }
    }
    Ok(kept)
}

fn own_prefix(program: &Path) -> Option<&Path> {
    let prefix = program.parent()?.parent()?;
    // Those of the system are in the list by name.
    let systems = ["/", "/usr", "/usr/local"];
    (!systems.map(Path::new).contains(&prefix)).then_some(prefix)
}

/// Absolute, below the root, and without `..`.
fn is_plain(path: &Path) -> bool {
    let mut parts = path.components();
    parts.next() == Some(Component::RootDir)
        && parts.clone().next().is_some()
        && parts.all(|part| matches!(part, Component::Normal(name) if name != OsStr::new("")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::tests::machine;

    fn access(entries: &[Entry], path: &str) -> Option<Access> {
        let entry = entries.iter().find(|entry| entry.path == Path::new(path));
        entry.map(|entry| entry.access)
    }

    fn all_of(machine: &MachineConfig, program: &str) -> Vec<Entry> {
        entries(&Sandbox::of(machine), Path::new(program)).unwrap()
    }

    #[test]
    fn a_vmm_writes_its_disks_and_its_folder_and_only_reads_the_rest() {
        let entries = all_of(&machine(), "/usr/bin/qemu-system-x86_64");
        for (path, expected) in [
            ("/usr/bin/qemu-system-x86_64", Access::Run),
            ("/usr/lib", Access::Run),
            ("/k/vmlinux", Access::Read),
            ("/k/initrd", Access::Read),
            ("/i/root, old.img", Access::Read),
            ("/v/disk.img", Access::Write),
            ("/run/vm", Access::Folder),
            ("/dev/net/tun", Access::Device),
        ] {
            assert_eq!(access(&entries, path), Some(expected), "{path}");
        }
        assert!(access(&entries, "/dev/kvm").is_none(), "it only emulates");
        assert!(
            entries
                .iter()
                .all(|entry| !Path::new("/etc/passwd").starts_with(&entry.path))
        );
    }

    #[test]
    fn kvm_is_seen_by_those_that_use_it_and_tun_by_those_with_a_nic() {
        let mut machine = machine();
        machine.accelerator = Accelerator::Kvm;
        machine.nic = None;
        let entries = all_of(&machine, "/usr/bin/qemu-system-x86_64");
        assert_eq!(access(&entries, "/dev/kvm"), Some(Access::Device));
        assert_eq!(access(&entries, "/dev/net/tun"), None);
    }

    #[test]
    fn what_a_folder_shows_already_is_not_listed_again_unless_it_is_written() {
        let mut machine = machine();
        machine.firmware = Some("/usr/share/qemu/qboot.rom".into());
        machine.drives[1].path = "/usr/lib/odd/disk.img".into();
        let entries = all_of(&machine, "/usr/lib/qemu/qemu-system-x86_64");
        assert_eq!(access(&entries, "/usr/share/qemu/qboot.rom"), None);
        assert_eq!(access(&entries, "/usr/lib/qemu/qemu-system-x86_64"), None);
        let disk = access(&entries, "/usr/lib/odd/disk.img");
        assert_eq!(disk, Some(Access::Write));
        let position = |path: &str| entries.iter().position(|e| e.path == Path::new(path));
        assert!(position("/usr/lib") < position("/usr/lib/odd/disk.img"));
    }

    #[test]
    fn a_file_that_is_read_and_written_is_written() {
        let mut machine = machine();
        machine.kernel = machine.drives[1].path.clone();
        let entries = all_of(&machine, "/usr/bin/firecracker");
        assert_eq!(access(&entries, "/v/disk.img"), Some(Access::Write));
    }

    #[test]
    fn a_program_with_a_prefix_of_its_own_sees_its_own_libraries_and_firmware() {
        let entries = all_of(&machine(), "/opt/qemu/bin/qemu-system-x86_64");
        for path in ["/opt/qemu/lib", "/opt/qemu/share/qemu"] {
            assert_eq!(access(&entries, path), Some(Access::Run), "{path}");
        }
        assert_eq!(access(&entries, "/opt/qemu"), None);
        let system = all_of(&machine(), "/usr/local/bin/firecracker");
        assert_eq!(access(&system, "/usr/share/qemu"), Some(Access::Run));
        assert_eq!(access(&system, "/usr/local/lib64"), None);
    }

    #[test]
    fn a_path_that_climbs_makes_no_plan() {
        for odd in ["/v/../etc/shadow", "disk.img", "/"] {
            let mut sandbox = Sandbox::of(&machine());
            sandbox.writable.push(odd.into());
            let planned = entries(&sandbox, Path::new("/usr/bin/qemu"));
            assert!(planned.is_err(), "{odd}");
        }
    }
}
