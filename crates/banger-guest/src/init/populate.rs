//! Copying a directory tree of the image, once, to where it is bound from.

use super::rooted::own_directory;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, chownat, fchmod,
    fchown, fstat, futimens, mkdirat, openat, readlinkat, renameat, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::path::Path;

/// How deep a tree may be; what lies deeper is refused rather than followed to the end of the stack.
const DEPTH_LIMIT: u32 = 64;
const NO_FOLLOW: OFlags = OFlags::NOFOLLOW.union(OFlags::CLOEXEC);

/// Gives the directory `to` the owner and mode of `from`.
pub(crate) fn copy_attributes(from: &str, to: &str) -> io::Result<()> {
    let stat = fstat(own_directory(Path::new(from))?)?;
    let to = own_directory(Path::new(to))?;
    let present = fstat(&to)?;
    if (present.st_mode, present.st_uid, present.st_gid) != (stat.st_mode, stat.st_uid, stat.st_gid)
    {
        set_attributes(&to, &stat)?;
    }
    Ok(())
}

/// Copies the tree `from` to `parent`/`name`, which appears only when it is whole. Owners, modes, times and links are
/// kept; devices, pipes and sockets are left out.
pub(crate) fn copy_tree(from: impl AsFd, parent: &str, name: &str) -> io::Result<()> {
    let parent = own_directory(Path::new(parent))?;
    let staged = format!(".{name}.new");
    remove_tree(&parent, &staged, DEPTH_LIMIT)?;
    let stat = fstat(&from)?;
    let to = make_directory(&parent, staged.as_str())?;
    copy_entries(from.as_fd().try_clone_to_owned()?, &to, DEPTH_LIMIT)?;
    set_attributes(&to, &stat)?;
    renameat(&parent, &staged, &parent, name)?;
    Ok(())
}

fn copy_entries(from: OwnedFd, to: &OwnedFd, depth: u32) -> io::Result<()> {
    if depth == 0 {
        return Err(io::Error::other("directories are nested too deep"));
    }
    for entry in Dir::read_from(&from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            copy_entry(&from, to, name, depth)?;
        }
    }
    Ok(())
}

fn copy_entry(from: &OwnedFd, to: &OwnedFd, name: &CStr, depth: u32) -> io::Result<()> {
    let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | NO_FOLLOW;
            let source = openat(from, name, flags, Mode::empty())?;
            let target = make_directory(to, name)?;
            copy_entries(source, &target, depth - 1)?;
            set_attributes(&target, &stat)
        }
        FileType::RegularFile => {
            let mut source = File::from(openat(
                from,
                name,
                OFlags::RDONLY | NO_FOLLOW,
                Mode::empty(),
            )?);
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | NO_FOLLOW;
            let mut target = File::from(openat(to, name, flags, Mode::from_raw_mode(0o600))?);
            io::copy(&mut source, &mut target)?;
            set_attributes(&target, &stat)
        }
        FileType::Symlink => {
            let link = readlinkat(from, name, Vec::new())?;
            symlinkat(&link, to, name)?;
            let (uid, gid) = owner(&stat);
            Ok(chownat(to, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?)
        }
        _ => Ok(()),
    }
}

fn make_directory(parent: &OwnedFd, name: impl rustix::path::Arg + Copy) -> io::Result<OwnedFd> {
    mkdirat(parent, name, Mode::from_raw_mode(0o700))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | NO_FOLLOW;
    Ok(openat(parent, name, flags, Mode::empty())?)
}

fn owner(stat: &Stat) -> (Option<Uid>, Option<Gid>) {
    (
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
    )
}

/// The mode last: a change of owner clears its set-user-id bit.
fn set_attributes(target: impl AsFd, stat: &Stat) -> io::Result<()> {
    let (uid, gid) = owner(stat);
    fchown(&target, uid, gid)?;
    fchmod(&target, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    let times = Timestamps {
        last_access: Timespec {
            tv_sec: stat.st_atime,
            tv_nsec: stat.st_atime_nsec as _,
        },
        last_modification: Timespec {
            tv_sec: stat.st_mtime,
            tv_nsec: stat.st_mtime_nsec as _,
        },
    };
    Ok(futimens(target, &times)?)
}

/// Removes what an interrupted copy left.
fn remove_tree(
    parent: &OwnedFd,
    name: impl rustix::path::Arg + Copy,
    depth: u32,
) -> io::Result<()> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) if depth > 0 => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | NO_FOLLOW;
    let directory = openat(parent, name, flags, Mode::empty())?;
    let entries: Vec<_> = Dir::read_from(&directory)?.collect::<Result<_, _>>()?;
    for entry in entries {
        let name = entry.file_name();
        if name != c"." && name != c".." {
            remove_tree(&directory, name, depth - 1)?;
        }
    }
    Ok(unlinkat(parent, name, AtFlags::REMOVEDIR)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    #[test]
    fn a_copied_tree_keeps_modes_times_and_links_and_follows_none() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("home");
        std::fs::create_dir_all(from.join("ann/.config")).unwrap();
        std::fs::create_dir(dir.path().join("bound")).unwrap();
        std::fs::write(from.join("ann/.profile"), "x").unwrap();
        let private = std::fs::Permissions::from_mode(0o640);
        std::fs::set_permissions(from.join("ann/.profile"), private).unwrap();
        symlink("/etc/passwd", from.join("ann/link")).unwrap();

        let source = own_directory(&from).unwrap();
        copy_tree(&source, dir.path().join("bound").to_str().unwrap(), "home").unwrap();

        let to = dir.path().join("bound/home");
        let profile = to.join("ann/.profile").metadata().unwrap();
        assert_eq!(profile.mode() & 0o7777, 0o640);
        assert_eq!(
            profile.mtime(),
            from.join("ann/.profile").metadata().unwrap().mtime()
        );
        assert!(to.join("ann/.config").is_dir());
        assert_eq!(
            to.join("ann/link").read_link().unwrap(),
            Path::new("/etc/passwd")
        );
        assert_eq!(
            std::fs::read_dir(dir.path().join("bound")).unwrap().count(),
            1
        );
    }

    #[test]
    fn what_an_interrupted_copy_left_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("home")).unwrap();
        std::fs::create_dir_all(dir.path().join("bound/.home.new/old/deep")).unwrap();
        std::fs::write(dir.path().join("bound/.home.new/old/file"), "x").unwrap();
        let source = own_directory(&dir.path().join("home")).unwrap();
        copy_tree(&source, dir.path().join("bound").to_str().unwrap(), "home").unwrap();
        assert_eq!(
            std::fs::read_dir(dir.path().join("bound/home"))
                .unwrap()
                .count(),
            0
        );
    }

    #[test]
    fn a_tree_without_end_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("home").join("d/".repeat(80))).unwrap();
        std::fs::create_dir(dir.path().join("bound")).unwrap();
        let source = own_directory(&dir.path().join("home")).unwrap();
        copy_tree(&source, dir.path().join("bound").to_str().unwrap(), "home").unwrap_err();
        assert!(!dir.path().join("bound/home").exists());
    }
}
