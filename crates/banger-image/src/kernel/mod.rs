//! Kernel bundles: `vmlinux`, banger's initrd for it, and `modules.img`.

mod index;
mod initrd;
mod modules;
mod source;
mod vmlinux;

use crate::context::Context;
use crate::error::BuildError;
use crate::ext4::{self, hex};
use crate::store::{now, replace, write_json};
use banger_core::id::KernelId;
use banger_core::name::KernelName;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use source::gather;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// The kernel's ELF, in a bundle's folder.
pub const VMLINUX: &str = "vmlinux";
/// Banger's initrd, in a bundle's folder.
pub const INITRD: &str = "initrd.img";
/// The read-only ext4 whose root is the content of `/lib/modules/<release>`, in a bundle's folder.
pub const MODULES_IMAGE: &str = "modules.img";
/// The [`KernelManifest`] as JSON, in a bundle's folder.
pub const MANIFEST: &str = "kernel.json";
/// The part of the initrd that does not depend on `banger-init`.
const INITRD_BASE: &str = "initrd.base";

/// Why a kernel bundle could not be made.
pub type KernelError = BuildError;

/// Where a kernel comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KernelSource {
    /// The cloud kernel of the host's own distribution, downloaded by apt: `linux-image-cloud-amd64` on Debian,
    /// `linux-image-virtual` with its modules package on Ubuntu (the latter was never tried).
    Distribution,
    /// A package by name, downloaded by apt; a package that only depends on the kernel is followed.
    AptPackage(String),
    /// A `linux-image` package in a file.
    PackageFile(PathBuf),
    /// A `vmlinux` or `bzImage`, with its `/lib/modules/<release>` where it has modules.
    Files {
        /// The kernel.
        kernel: PathBuf,
        /// The modules' folder, whose name is the release.
        modules: Option<PathBuf>,
    },
}

/// Which kernel bundle to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelRequest {
    /// Its id.
    pub id: KernelId,
    /// Its name at import.
    pub name: Option<KernelName>,
    /// Where it comes from.
    pub source: KernelSource,
}

/// A package and its version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PackageVersion {
    /// The package's name.
    pub name: String,
    /// Its version, as dpkg writes it.
    pub version: String,
}

/// What is known of a kernel bundle: the content of its `kernel.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelManifest {
    /// Its id.
    pub id: KernelId,
    /// Its name at import; names move, so this is only a record.
    pub name: Option<KernelName>,
    /// The release, as `uname -r` prints it.
    pub release: String,
    /// Where it came from, for people.
    pub source: String,
    /// The package it was taken from.
    pub package: Option<PackageVersion>,
    /// SHA-256 of `vmlinux`, in hexadecimal.
    pub vmlinux_sha256: String,
    /// Whether `vmlinux` has a PVH entry, without which QEMU cannot start it.
    pub pvh: bool,
    /// UUID of the filesystem in `modules.img`, lower case with hyphens.
    pub modules_uuid: String,
    /// The modules in the initrd, in load order.
    pub modules: Vec<String>,
    /// Wanted modules that the kernel has neither built in nor as a file.
    pub missing_modules: Vec<String>,
    /// SHA-256 of the `banger-init` in the initrd, in hexadecimal.
    pub init_sha256: String,
    /// The bundle's size in bytes.
    pub bytes: u64,
    /// When it was made, in seconds since 1970.
    pub created: i64,
}

/// Makes a kernel bundle in the folder `staging`, with the static `banger-init` from `init` in its initrd.
///
/// A wanted module that is neither there nor built in, and a kernel without a PVH entry, are recorded in the manifest
/// and no error.
pub fn build_kernel(
    request: &KernelRequest,
    init: &Path,
    staging: &Path,
    context: &Context,
) -> Result<KernelManifest, KernelError> {
    std::fs::create_dir_all(staging).map_err(BuildError::io("create", staging))?;
    let material = gather(&request.source, context)?;
    let path = &material.origin;
    let kernel = vmlinux::extract(material.kernel, path)?;
    let release = match (material.release, kernel.release) {
        (Some(release), _) | (None, Some(release)) => release,
        (None, None) => {
            let reason = format!("neither a modules folder nor `{}` names it", path.display());
            return Err(BuildError::NoRelease { reason });
        }
    };
    context.tell("kernel", &format!("Linux {release}"));
    let vmlinux_sha256 = hex(&Sha256::digest(&kernel.elf));
    write_file(&staging.join(VMLINUX), &kernel.elf)?;

    let mut tree = material.modules;
    let mtime = tree
        .entries()
        .map(|(_, entry)| entry.mtime)
        .max()
        .unwrap_or(0);
    let modules = modules::scan(&tree, context)?;
    let builtin = match tree.file("modules.builtin") {
        Some(content) => {
            let text = content.read("modules.builtin", 16 << 20)?;
            modules::builtin(&String::from_utf8_lossy(&text))
        }
        None => BTreeSet::new(),
    };
    let optional = modules::OPTIONAL
        .into_iter()
        .filter(|name| modules.contains_key(*name));
    let closure = modules::closure(optional.chain(modules::WANTED), &modules, &builtin);
    let mut loaded = Vec::new();
    for name in &closure.order {
        let module = modules
            .get(name)
            .expect("the closure holds only modules that exist");
        loaded.push((format!("{name}.ko"), modules::read(&tree, &module.path)?));
    }
    if !closure.missing.is_empty() {
        tracing::warn!(release, missing = ?closure.missing, "modules that a guest may need are not there");
    }

    let base = initrd::base(&loaded).map_err(BuildError::io("make", &staging.join(INITRD_BASE)))?;
    write_file(&staging.join(INITRD_BASE), &base)?;
    let init_sha256 = write_initrd(staging, &base, init)?;

    tree.remove("build");
    tree.remove("source");
    tree.directory("", 0o755, mtime);
    modules::add_indices(&mut tree, &modules, mtime);
    let uuid = ext4::uuid_of(&Sha256::digest(format!(
        "{release} {vmlinux_sha256} {}",
        tree.len()
    )));
    let layout = ext4::Layout {
        uuid,
        epoch: mtime,
        label: "banger-modules",
        journal_blocks: 1024,
    };
    context.tell("write", "writing the modules' filesystem");
    ext4::write(&tree, &staging.join(MODULES_IMAGE), &layout, context)?;

    let mut manifest = KernelManifest {
        id: request.id,
        name: request.name.clone(),
        release,
        source: material.source,
        package: material.package,
        vmlinux_sha256,
        pvh: kernel.pvh,
        modules_uuid: uuid.to_string(),
        modules: closure.order,
        missing_modules: closure.missing,
        init_sha256,
        bytes: 0,
        created: now(),
    };
    manifest.bytes = size_of(staging)?;
    write_json(&staging.join(MANIFEST), &manifest)?;
    Ok(manifest)
}

/// Makes the initrd of the bundle in `kernel_dir` again if its `banger-init` is not the one in `init`. Says whether
/// it did. Running VMs keep the initrd that they booted with.
pub fn refresh_initrd(kernel_dir: &Path, init: &Path) -> Result<bool, KernelError> {
    let has_it = |manifest: &KernelManifest| -> Result<bool, KernelError> {
        Ok(init_digest(init)? == manifest.init_sha256 && kernel_dir.join(INITRD).exists())
    };
    if has_it(&read_manifest(kernel_dir)?)? {
        return Ok(false);
    }
    // Several VMs may start at once: one of them makes it, and the others find it made.
    let _alone = alone(kernel_dir).map_err(BuildError::io("lock", kernel_dir))?;
    let mut manifest = read_manifest(kernel_dir)?;
    if has_it(&manifest)? {
        return Ok(false);
    }
    let path = kernel_dir.join(INITRD_BASE);
    let base = std::fs::read(&path).map_err(BuildError::io("read", &path))?;
    // The manifest follows the initrd: after a crash in between, the initrd is made once more.
    manifest.init_sha256 = write_initrd(kernel_dir, &base, init)?;
    manifest.bytes = size_of(kernel_dir)?;
    write_json(&kernel_dir.join(MANIFEST), &manifest)?;
    Ok(true)
}

/// Waits until nobody else has the folder `dir` in hand.
fn alone(dir: &Path) -> std::io::Result<std::fs::File> {
    let folder = std::fs::File::open(dir)?;
    folder.lock()?;
    Ok(folder)
}

/// What tells one state of a file from another: device, inode, size, and the time of its last change in seconds and
/// nanoseconds.
type FileState = (u64, u64, u64, i64, i64);

/// The digest of `init`. Every start asks, so that of the latest state seen is kept.
fn init_digest(init: &Path) -> Result<String, BuildError> {
    static LATEST: Mutex<Option<(FileState, String)>> = Mutex::new(None);
    let metadata = std::fs::metadata(init).map_err(BuildError::io("look at", init))?;
    let state = (
        metadata.dev(),
        metadata.ino(),
        metadata.len(),
        metadata.ctime(),
        metadata.ctime_nsec(),
    );
    let mut latest = LATEST.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((known, digest)) = latest.as_ref()
        && *known == state
    {
        return Ok(digest.clone());
    }
    // Looked at before it was read: what changes in between has another state next time.
    let program = std::fs::read(init).map_err(BuildError::io("read", init))?;
    let digest = hex(&Sha256::digest(&program));
    *latest = Some((state, digest.clone()));
    Ok(digest)
}

fn write_initrd(dir: &Path, base: &[u8], init: &Path) -> Result<String, BuildError> {
    let program = std::fs::read(init).map_err(BuildError::io("read", init))?;
    let path = dir.join(INITRD);
    let tail = initrd::tail(base.len(), &program).map_err(BuildError::io("make", &path))?;
    replace(&path, &[base, &tail])?;
    Ok(hex(&Sha256::digest(&program)))
}

fn write_file(path: &Path, content: &[u8]) -> Result<(), BuildError> {
    std::fs::write(path, content).map_err(BuildError::io("write", path))
}

/// The size of the files in a bundle's folder, its manifest excepted.
fn size_of(dir: &Path) -> Result<u64, BuildError> {
    [VMLINUX, INITRD, INITRD_BASE, MODULES_IMAGE]
        .map(|name| dir.join(name))
        .iter()
        .map(|path| {
            let metadata = std::fs::metadata(path).map_err(BuildError::io("look at", path))?;
            Ok(metadata.len())
        })
        .sum()
}

/// Reads the manifest of the bundle in `kernel_dir`.
pub fn read_manifest(kernel_dir: &Path) -> Result<KernelManifest, KernelError> {
    crate::store::read_json(&kernel_dir.join(MANIFEST))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(kernel: &Path) -> KernelRequest {
        KernelRequest {
            id: "0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a".parse().unwrap(),
            name: None,
            source: KernelSource::Files {
                kernel: kernel.to_owned(),
                modules: None,
            },
        }
    }

    #[test]
    fn a_kernel_without_modules_becomes_a_bundle_that_names_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let (kernel, init) = (dir.path().join("vmlinux"), dir.path().join("init"));
        std::fs::write(&kernel, vmlinux::tests::elf(true)).unwrap();
        std::fs::write(&init, "one").unwrap();
        let staging = dir.path().join("staging");
        let context = Context::quiet(dir.path().join("cache"));
        let made = build_kernel(&request(&kernel), &init, &staging, &context).unwrap();
        assert_eq!(made.release, "6.1.0-9-cloud-amd64");
        assert!(made.pvh && made.missing_modules.contains(&"ext4".to_owned()));
        assert_eq!(read_manifest(&staging).unwrap(), made);
        let uuid = crate::template::read_ext4_uuid(&staging.join(MODULES_IMAGE)).unwrap();
        assert_eq!(uuid.to_string(), made.modules_uuid);
    }

    #[test]
    fn the_initrd_is_made_again_only_for_another_init() {
        let dir = tempfile::tempdir().unwrap();
        let (kernel, init) = (dir.path().join("vmlinux"), dir.path().join("init"));
        std::fs::write(&kernel, vmlinux::tests::elf(true)).unwrap();
        std::fs::write(&init, "one").unwrap();
        let staging = dir.path().join("staging");
        let context = Context::quiet(dir.path().join("cache"));
        build_kernel(&request(&kernel), &init, &staging, &context).unwrap();
        let first = std::fs::read(staging.join(INITRD)).unwrap();
        assert!(!refresh_initrd(&staging, &init).unwrap());
        std::fs::write(&init, "another").unwrap();
        assert!(refresh_initrd(&staging, &init).unwrap());
        assert!(!refresh_initrd(&staging, &init).unwrap());
        assert_ne!(std::fs::read(staging.join(INITRD)).unwrap(), first);
        std::fs::write(&init, "one").unwrap();
        assert!(refresh_initrd(&staging, &init).unwrap());
        assert_eq!(std::fs::read(staging.join(INITRD)).unwrap(), first);
    }

    #[test]
    fn of_many_vms_that_start_at_once_one_makes_the_initrd() {
        let dir = tempfile::tempdir().unwrap();
        let (kernel, init) = (dir.path().join("vmlinux"), dir.path().join("init"));
        std::fs::write(&kernel, vmlinux::tests::elf(true)).unwrap();
        std::fs::write(&init, "one").unwrap();
        let staging = dir.path().join("staging");
        let context = Context::quiet(dir.path().join("cache"));
        build_kernel(&request(&kernel), &init, &staging, &context).unwrap();
        std::fs::write(&init, "another").unwrap();
        let made = std::thread::scope(|scope| {
            let refresh = || refresh_initrd(&staging, &init).unwrap();
            let threads: Vec<_> = (0..16).map(|_| scope.spawn(refresh)).collect();
            let made = threads.into_iter().map(|thread| thread.join().unwrap());
            made.filter(|made| *made).count()
        });
        assert_eq!(made, 1);
    }

    #[test]
    fn a_cancelled_build_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let (kernel, init) = (dir.path().join("vmlinux"), dir.path().join("init"));
        std::fs::write(&kernel, vmlinux::tests::elf(true)).unwrap();
        std::fs::write(&init, "one").unwrap();
        let context = Context::quiet(dir.path().join("cache"));
        context
            .cancel
            .store(true, std::sync::atomic::Ordering::Relaxed);
        let result = build_kernel(&request(&kernel), &init, &dir.path().join("s"), &context);
        assert!(matches!(result, Err(BuildError::Cancelled)));
    }
}
