//! A root of the VMM's own: an empty read-only tmpfs, and in it what the VMM may see, each thing at its own path.

use super::calls;
use crate::sandbox::{Access, Entry};
use linux_raw_sys::general::{
    MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY,
};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Something to be shown.
enum Shown {
    Folder(OwnedFd),
    File(OwnedFd),
    /// A link, such as `/lib` to `usr/lib`.
    Link(PathBuf),
}

/// Why there is no root of the VMM's own.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub(super) struct RootError {
    what: String,
    source: io::Error,
}

fn failed<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> RootError {
    move |source| RootError {
        what: what.into(),
        source: source.into(),
    }
}

/// Moves this process, which has a mount namespace of its own, into a root with nothing in it but `entries`. `folder`
/// is one of them, and hidden while the root is being built. Goes on where it was if this fails.
pub(super) fn enter(entries: &[Entry], folder: &Path) -> Result<(), RootError> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).map_err(failed("cannot make mounts private"))?;
    let mut shown = Vec::new();
    for entry in entries {
        let found =
            look_at(entry).map_err(failed(format!("cannot bind `{}`", entry.path.display())))?;
        shown.extend(found.map(|what| (entry, what)));
    }
    let root = empty().map_err(failed("cannot make an empty root"))?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&root, "", CWD, folder, flags)
        .map_err(failed("cannot mount an empty root"))?;
    let moved = fill(root.as_fd(), shown).and_then(|()| change_root(root.as_fd()));
    if moved.is_err() {
        let _ = rustix::mount::unmount(folder, UnmountFlags::DETACH);
    }
    moved?;
    // From here on there is no way back, but nothing outside the new root is in reach either.
    let sealed = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
    calls::mount_setattr(root.as_fd(), false, sealed)
        .map_err(failed("cannot make the root read-only"))
}

/// Takes hold of a path, if it is there.
fn look_at(entry: &Entry) -> io::Result<Option<Shown>> {
    let stat = match rustix::fs::lstat(&entry.path) {
        Ok(stat) => stat,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut kind = FileType::from_raw_mode(stat.st_mode);
    if kind == FileType::Symlink {
        if entry.access == Access::Run {
            return Ok(Some(Shown::Link(std::fs::read_link(&entry.path)?)));
        }
        match rustix::fs::stat(&entry.path) {
            Ok(stat) => kind = FileType::from_raw_mode(stat.st_mode),
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
    let is_folder = kind == FileType::Directory;
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if is_folder {
        // Where mounts are locked together, the kernel refuses to take a folder without those below it.
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = rustix::mount::open_tree(CWD, &entry.path, flags)?;
    calls::mount_setattr(tree.as_fd(), is_folder, attributes(entry.access))?;
    Ok(Some(if is_folder {
        Shown::Folder(tree)
    } else {
        Shown::File(tree)
    }))
}

/// What an access forbids on its mount.
fn attributes(access: Access) -> u32 {
    match access {
        // A drive may be a block device.
        Access::Read => MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC,
        Access::Write | Access::Device => MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC,
        Access::Run => MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV,
        Access::Folder => MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC,
    }
}

fn empty() -> rustix::io::Result<OwnedFd> {
    let tmpfs = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&tmpfs, "mode", "0755")?;
    rustix::mount::fsconfig_create(&tmpfs)?;
    rustix::mount::fsmount(
        &tmpfs,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOSUID,
    )
}

fn fill(root: BorrowedFd<'_>, shown: Vec<(&Entry, Shown)>) -> Result<(), RootError> {
    let mut links: Vec<&Path> = Vec::new();
    for (entry, what) in shown {
        let path = &entry.path;
        // Else a link out of the new root would have us make things in the old one.
        let outcome = if links.iter().any(|link| path.starts_with(link)) {
            Err(io::Error::other("it is below a link"))
        } else {
            place(root, path, what, &mut links)
        };
        outcome.map_err(failed(format!("cannot show `{}`", path.display())))?;
    }
    Ok(())
}

fn place<'a>(
    root: BorrowedFd<'_>,
    path: &'a Path,
    what: Shown,
    links: &mut Vec<&'a Path>,
) -> io::Result<()> {
    let Ok(below) = path.strip_prefix("/") else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mut above: Vec<&Path> = below.ancestors().skip(1).collect();
    // The last is the root itself.
    above.pop();
    for folder in above.into_iter().rev() {
        make_folder(root, folder)?;
    }
    let tree = match what {
        Shown::Link(target) => {
            links.push(path);
            return Ok(rustix::fs::symlinkat(&target, root, below)?);
        }
        Shown::Folder(tree) => {
            make_folder(root, below)?;
            tree
        }
        Shown::File(tree) => {
            make_file(root, below)?;
            tree
        }
    };
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(rustix::mount::move_mount(&tree, "", root, below, flags)?)
}

/// What is below a folder that is shown already exists there, as it is bound from its own path.
fn make_folder(root: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    match rustix::fs::mkdirat(root, path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn make_file(root: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    match rustix::fs::openat(root, path, flags, Mode::from_raw_mode(0o600)) {
        Ok(_) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn change_root(root: BorrowedFd<'_>) -> Result<(), RootError> {
    rustix::process::fchdir(root).map_err(failed("cannot enter the new root"))?;
    // The old root comes to lie on the new one, and is taken away.
    rustix::process::pivot_root(".", ".").map_err(failed("cannot change the root"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(failed("cannot let the old root go"))
}
