//! Files of the image, written without ever leaving it: every path is resolved by the kernel as if the image's root
//! were the root, and the last component is replaced, never followed.

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, fchmod, fstat, mkdirat, open, openat,
    openat2, renameat, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

/// The largest file of an image that is read.
const READ_LIMIT: u64 = 256 * 1024;
/// The name under which a file is written before it takes its place.
const STAGED: &str = ".banger-init.new";
const INSIDE: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS);

/// A directory tree that is treated as a root of its own.
#[derive(Debug)]
pub(crate) struct Root {
    directory: OwnedFd,
}

impl Root {
    /// Opens the tree at `path`.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            directory: open(path, flags, Mode::empty())?,
        })
    }

    /// Opens the directory at `path`, following links inside the root.
    pub(crate) fn directory(&self, path: &str) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let path = if path.is_empty() { "." } else { path };
        Ok(openat2(
            &self.directory,
            path,
            flags,
            Mode::empty(),
            INSIDE,
        )?)
    }

    /// Whether `path` leads to a directory.
    pub(crate) fn is_directory(&self, path: &str) -> bool {
        self.directory(path).is_ok()
    }

    /// Whether `path` leads to something that is not a directory, links followed.
    pub(crate) fn is_file(&self, path: &str) -> bool {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        openat2(&self.directory, path, flags, Mode::empty(), INSIDE)
            .and_then(fstat)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) != FileType::Directory)
    }

    /// Whether `path` itself, the last component not followed, is a symbolic link.
    pub(crate) fn is_link(&self, path: &str) -> bool {
        let (parent, name) = split(path);
        self.directory(parent)
            .is_ok_and(|parent| kind_at(&parent, name) == Some(FileType::Symlink))
    }

    /// Opens the directory at `path` and makes what is missing of it, with this mode.
    pub(crate) fn ensure_directory(&self, path: &str, mode: u32) -> io::Result<OwnedFd> {
        match self.directory(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !path.is_empty() => {
                let (parent, name) = split(path);
                let parent = self.ensure_directory(parent, 0o755)?;
                match mkdirat(&parent, name, Mode::from_raw_mode(mode)) {
                    // A link that leads nowhere: what it was meant for is not there, so a directory takes its place.
                    Err(Errno::EXIST) if kind_at(&parent, name) == Some(FileType::Symlink) => {
                        unlinkat(&parent, name, AtFlags::empty())?;
                        mkdirat(&parent, name, Mode::from_raw_mode(mode))?;
                    }
                    other => other?,
                }
                self.directory(path)
            }
            other => other,
        }
    }

    /// Reads a regular file, at most 256 KiB of it, links followed inside the root.
    pub(crate) fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = openat2(&self.directory, path, flags, Mode::empty(), INSIDE)?;
        read_regular(fd)
    }

    /// Makes `path` a regular file with these bytes and this mode, owned by root; a link there is replaced. A file
    /// that is like that already is left alone.
    pub(crate) fn write(&self, path: &str, bytes: &[u8], mode: u32) -> io::Result<()> {
        let (parent, name) = split(path);
        let parent = self.ensure_directory(parent, 0o755)?;
        if is_already(&parent, name, bytes, mode) {
            return Ok(());
        }
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        remove(&parent, STAGED)?;
        let fd = openat(&parent, STAGED, flags, Mode::from_raw_mode(0o600))?;
        let mut file = File::from(fd);
        let staged = file
            .write_all(bytes)
            .and_then(|()| Ok(fchmod(&file, Mode::from_raw_mode(mode))?))
            .and_then(|()| Ok(renameat(&parent, STAGED, &parent, name)?));
        if staged.is_err() {
            remove(&parent, STAGED)?;
        }
        staged
    }

    /// Makes `path` a symbolic link to `target`, replacing a file or link.
    pub(crate) fn symlink(&self, path: &str, target: &str) -> io::Result<()> {
        let (parent, name) = split(path);
        let parent = self.ensure_directory(parent, 0o755)?;
        remove(&parent, STAGED)?;
        symlinkat(target, &parent, STAGED)?;
        Ok(renameat(&parent, STAGED, &parent, name)?)
    }

    /// Sets the mode of the directory at `path` if it has more or other bits.
    pub(crate) fn set_directory_mode(&self, path: &str, mode: u32) -> io::Result<()> {
        let directory = self.directory(path)?;
        if fstat(&directory)?.st_mode & 0o7777 != mode {
            fchmod(&directory, Mode::from_raw_mode(mode))?;
        }
        Ok(())
    }
}

/// Opens `path` on the running system's own root; for directories that nobody else can have written.
pub(crate) fn own_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(CWD, path, flags, Mode::empty())?)
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

fn kind_at(parent: impl AsFd, name: &str) -> Option<FileType> {
    let stat = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
    Some(FileType::from_raw_mode(stat.st_mode))
}

fn remove(parent: impl AsFd, name: &str) -> io::Result<()> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn read_regular(fd: OwnedFd) -> io::Result<Vec<u8>> {
    let stat = fstat(&fd)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    File::from(fd)
        .take(READ_LIMIT + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > READ_LIMIT {
        return Err(io::Error::other("too large"));
    }
    Ok(bytes)
}

fn is_already(parent: impl AsFd, name: &str, bytes: &[u8], mode: u32) -> bool {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(fd) = openat(parent, name, flags, Mode::empty()) else {
        return false;
    };
    let Ok(stat) = fstat(&fd) else {
        return false;
    };
    stat.st_mode & 0o7777 == mode
        && stat.st_uid == rustix::process::geteuid().as_raw()
        && stat.st_nlink == 1
        && stat.st_size == bytes.len() as i64
        && read_regular(fd).is_ok_and(|present| present == bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    /// A root inside a temp dir, and a file beside it that must never change.
    fn guarded() -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("root/etc")).unwrap();
        std::fs::create_dir(dir.path().join("outside")).unwrap();
        std::fs::write(dir.path().join("outside/file"), "precious").unwrap();
        let root = Root::open(&dir.path().join("root")).unwrap();
        (dir, root)
    }

    fn outside_is_whole(dir: &tempfile::TempDir) {
        let outside = dir.path().join("outside");
        assert_eq!(
            std::fs::read_to_string(outside.join("file")).unwrap(),
            "precious"
        );
        assert_eq!(std::fs::read_dir(outside).unwrap().count(), 1);
    }

    #[test]
    fn a_written_file_has_its_bytes_and_mode_and_leaves_nothing_beside_it() {
        let (dir, root) = guarded();
        root.write("etc/key", b"secret", 0o600).unwrap();
        let path = dir.path().join("root/etc/key");
        assert_eq!(std::fs::read(&path).unwrap(), b"secret");
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o600);
        assert_eq!(
            std::fs::read_dir(dir.path().join("root/etc"))
                .unwrap()
                .count(),
            1
        );
    }

    #[test]
    fn a_link_in_the_last_place_is_replaced_and_its_target_untouched() {
        let (dir, root) = guarded();
        symlink(
            "../../outside/file",
            dir.path().join("root/etc/resolv.conf"),
        )
        .unwrap();
        root.write("etc/resolv.conf", b"nameserver", 0o644).unwrap();
        let path = dir.path().join("root/etc/resolv.conf");
        assert!(path.symlink_metadata().unwrap().is_file());
        outside_is_whole(&dir);
    }

    #[test]
    fn links_to_directories_outside_are_resolved_inside_the_root() {
        let (dir, root) = guarded();
        let outside = dir.path().join("outside");
        std::fs::remove_dir(dir.path().join("root/etc")).unwrap();
        symlink(&outside, dir.path().join("root/etc")).unwrap();
        symlink("../../../../outside", dir.path().join("root/up")).unwrap();
        root.write("etc/file", b"x", 0o644).unwrap();
        root.write("up/file", b"x", 0o644).unwrap();
        outside_is_whole(&dir);
        assert!(dir.path().join("root/etc/file").is_file());
    }

    #[test]
    fn a_link_to_a_directory_inside_the_root_is_followed() {
        let (dir, root) = guarded();
        std::fs::create_dir_all(dir.path().join("root/usr/lib")).unwrap();
        symlink("/usr/lib", dir.path().join("root/lib")).unwrap();
        root.ensure_directory("lib/modules/6.1", 0o755).unwrap();
        assert!(dir.path().join("root/usr/lib/modules/6.1").is_dir());
        assert!(root.is_link("lib"));
        assert!(!root.is_link("usr/lib"));
    }

    #[test]
    fn a_staged_name_that_is_a_link_is_not_written_through() {
        let (dir, root) = guarded();
        symlink(
            "../../outside/file",
            dir.path().join("root/etc").join(STAGED),
        )
        .unwrap();
        root.write("etc/hosts", b"x", 0o644).unwrap();
        outside_is_whole(&dir);
    }

    #[test]
    fn a_hard_link_is_replaced_and_its_other_name_untouched() {
        let (dir, root) = guarded();
        let other = dir.path().join("outside/file");
        std::fs::hard_link(&other, dir.path().join("root/etc/hosts")).unwrap();
        root.write("etc/hosts", b"x", 0o644).unwrap();
        outside_is_whole(&dir);
    }

    #[test]
    fn a_file_that_is_right_already_is_not_written_again() {
        let (dir, root) = guarded();
        root.write("etc/hosts", b"same", 0o644).unwrap();
        let path = dir.path().join("root/etc/hosts");
        let before = path.metadata().unwrap().ino();
        root.write("etc/hosts", b"same", 0o644).unwrap();
        assert_eq!(path.metadata().unwrap().ino(), before);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        root.write("etc/hosts", b"same", 0o644).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o644);
    }

    #[test]
    fn a_directory_in_the_last_place_is_an_error_and_nothing_is_left() {
        let (dir, root) = guarded();
        std::fs::create_dir(dir.path().join("root/etc/hosts")).unwrap();
        root.write("etc/hosts", b"x", 0o644).unwrap_err();
        assert_eq!(
            std::fs::read_dir(dir.path().join("root/etc"))
                .unwrap()
                .count(),
            1
        );
    }

    #[test]
    fn reading_refuses_pipes_and_files_that_are_too_large() {
        let (dir, root) = guarded();
        let pipe = dir.path().join("root/etc/pipe");
        rustix::fs::mkfifoat(CWD, &pipe, Mode::from_raw_mode(0o600)).unwrap();
        root.read("etc/pipe").unwrap_err();
        std::fs::write(dir.path().join("root/etc/big"), vec![0; 300_000]).unwrap();
        root.read("etc/big").unwrap_err();
    }

    #[test]
    fn a_dangling_link_in_the_way_of_a_directory_becomes_that_directory() {
        let (dir, root) = guarded();
        symlink("/nowhere", dir.path().join("root/data")).unwrap();
        root.ensure_directory("data", 0o755).unwrap();
        assert!(
            dir.path()
                .join("root/data")
                .symlink_metadata()
                .unwrap()
                .is_dir()
        );
    }
}
