//! Putting the image's root together and mounting what belongs below it.

use super::drives::{Checked, Drives, word};
use super::rooted::{Root, own_directory};
use super::{Fatal, NEW_ROOT, Reporter, mount_data, mount_kernel_filesystems, populate};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::mount::{MountFlags, mount, mount_bind};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::Path;

/// Where the image lies under an overlay: in the initrd's own tree, which no path of the guest's root reaches.
const LOWER: &str = "/lower";
/// Where the overlay's ext4 is mounted, in the initrd's own tree as well.
pub(crate) const OVERLAY: &str = "/overlay";
/// Directories that must not lie on an overlayfs: what runs on them makes overlays of its own, or wants a plain
/// filesystem. They are bound from the overlay's ext4 instead.
const BOUND: [(&str, &str); 5] = [
    ("home", "home"),
    ("root", "root"),
    ("var/lib/docker", "docker"),
    ("var/lib/containerd", "containerd"),
    ("var/lib/containers", "containers"),
];

/// Mounts the root at [`NEW_ROOT`]: the root drive itself, or an overlayfs of it and the VM's overlay.
pub(crate) fn assemble(drives: &Drives, report: &mut Reporter) -> Result<(), Fatal> {
    make_directory(NEW_ROOT)?;
    match &drives.overlay {
        None => {
            let target = Path::new(NEW_ROOT);
            mount_ext4(&drives.root, target)?;
            grow(&drives.root, own_directory(target), report);
            Ok(())
        }
        Some(overlay) => mount_overlay(&drives.root, overlay, report),
    }
}

fn mount_overlay(image: &Checked, overlay: &Checked, report: &mut Reporter) -> Result<(), Fatal> {
    make_directory(LOWER)?;
    make_directory(OVERLAY)?;
    let mut image = image.clone();
    image.drive.read_only = true;
    mount_ext4(&image, Path::new(LOWER))?;
    mount_ext4(overlay, Path::new(OVERLAY))?;
    grow(overlay, own_directory(Path::new(OVERLAY)), report);
    for directory in ["upper", "work", "bound"] {
        make_directory(&format!("{OVERLAY}/{directory}"))?;
    }
    populate::copy_attributes(LOWER, &format!("{OVERLAY}/upper")).map_err(|error| {
        Fatal(format!(
            "cannot prepare the overlay's upper directory: {error}"
        ))
    })?;
    let options = format!("lowerdir={LOWER},upperdir={OVERLAY}/upper,workdir={OVERLAY}/work");
    let data = mount_data(options);
    mount(
        "overlay",
        NEW_ROOT,
        "overlay",
        MountFlags::empty(),
        data.as_c_str(),
    )
    .map_err(|error| Fatal(format!("cannot mount the overlay of the image: {error}")))?;
    let root = Root::open(Path::new(NEW_ROOT))
        .map_err(|error| Fatal(format!("cannot open the root filesystem: {error}")))?;
    for (path, name) in BOUND {
        let bound = bind(&root, path, name);
        report.check(&format!("cannot keep /{path} outside the overlay"), bound);
    }
    Ok(())
}

/// Binds `path` of the root from the overlay's ext4; the first time, what the root has there is copied.
fn bind(root: &Root, path: &str, name: &str) -> io::Result<()> {
    let is_container_store = path.starts_with("var/");
    if is_container_store && !root.is_directory("var/lib") {
        return Ok(());
    }
    // A link leads to where the image wants it; binding over it would hide that.
    if root.is_link(path) {
        return Err(io::Error::other("it is a symbolic link"));
    }
    let mode = match path {
        "root" => 0o700,
        "var/lib/docker" => 0o710,
        _ => 0o755,
    };
    let target = root.ensure_directory(path, mode)?;
    let store = format!("{OVERLAY}/bound/{name}");
    if !Path::new(&store).is_dir() {
        populate::copy_tree(&target, &format!("{OVERLAY}/bound"), name)?;
    }
    mount_bind(&store, descriptor_path(&target))?;
    Ok(())
}

/// Mounts /dev, /proc, /sys, /run and /tmp. The initrd's own stay where they are, for the agent.
pub(crate) fn mount_kernel_and_temporary(root: &Root, report: &mut Reporter) -> Result<(), Fatal> {
    for directory in ["dev", "proc", "sys", "run", "tmp"] {
        if root.is_link(directory) || root.ensure_directory(directory, 0o755).is_err() {
            return Err(Fatal(format!(
                "the image has no directory /{directory} and none can be made"
            )));
        }
    }
    mount_kernel_filesystems(Path::new(NEW_ROOT))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    for (path, mode) in [("run", "mode=0755"), ("tmp", "mode=1777")] {
        let data = mount_data(mode.to_owned());
        let target = Path::new(NEW_ROOT).join(path);
        let mounted = mount("tmpfs", target, "tmpfs", flags, data.as_c_str());
        report.check(&format!("cannot mount a tmpfs at /{path}"), mounted);
    }
    Ok(())
}

/// Mounts the kernel's modules where the image looks for them.
pub(crate) fn mount_modules(root: &Root, drives: &Drives, report: &mut Reporter) {
    let Some(modules) = &drives.modules else {
        return;
    };
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    // Only where /lib is a directory of its own does the image look for them there.
    let library = if root.is_directory("lib") && !root.is_link("lib") {
        "lib"
    } else {
        "usr/lib"
    };
    mount_below(
        root,
        modules,
        &format!("{library}/modules/{release}"),
        report,
    );
}

/// Mounts the work disk.
pub(crate) fn mount_disk(root: &Root, drives: &Drives, report: &mut Reporter) {
    if let Some(disk) = &drives.disk {
        let at = disk.drive.mount_at.as_deref().unwrap_or("/data");
        mount_below(root, disk, at.trim_matches('/'), report);
    }
}

fn mount_below(root: &Root, checked: &Checked, path: &str, report: &mut Reporter) {
    let role = word(checked.drive.role);
    if path.is_empty() {
        return report.warn(format_args!("the {role} drive cannot be mounted at /"));
    }
    let mounted = root
        .ensure_directory(path, 0o755)
        .map_err(|error| Fatal(format!("cannot make the directory /{path}: {error}")))
        .and_then(|target| mount_ext4(checked, Path::new(&descriptor_path(&target))));
    match mounted {
        // The directory is looked up anew: what was open lies under the mount.
        Ok(()) => grow(checked, root.directory(path), report),
        Err(Fatal(why)) => report.warn(why),
    }
}

/// The path of an open directory; mounting there cannot be led astray by links.
fn descriptor_path(directory: impl AsFd) -> String {
    format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd())
}

fn mount_ext4(checked: &Checked, target: &Path) -> Result<(), Fatal> {
    let Checked { drive, device, .. } = checked;
    let (flags, data) = if drive.read_only {
        // Without `noload` an image that was not unmounted in order could not be mounted from a read-only drive.
        (MountFlags::RDONLY, c"noload")
    } else {
        (MountFlags::empty(), c"noinit_itable")
    };
    mount(device, target, "ext4", flags, data).map_err(|error| {
        Fatal(format!(
            "cannot mount the {} drive {}: {error}",
            word(drive.role),
            device.display()
        ))
    })?;
    Ok(())
}

/// Grows a mounted ext4, whose root `mounted` is, to the size of its drive where the host says so.
fn grow(checked: &Checked, mounted: io::Result<OwnedFd>, report: &mut Reporter) {
    let Checked {
        drive,
        device,
        superblock,
    } = checked;
    if !drive.grow || drive.read_only {
        return;
    }
    let grown = mounted.and_then(|mounted| {
        let wanted = File::open(device)?.seek(SeekFrom::End(0))? / superblock.block_bytes;
        if wanted > superblock.blocks {
            rustix::fs::ext4_ioc_resize_fs(mounted, wanted)?;
        }
        Ok(())
    });
    let what = format!("cannot grow the filesystem of {}", device.display());
    report.check(&what, grown);
}

fn make_directory(path: &str) -> Result<(), Fatal> {
    match std::fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(Fatal(format!("cannot make the directory {path}: {error}")))
        }
        _ => Ok(()),
    }
}
