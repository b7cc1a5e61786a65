//! Whether two folders can share blocks of files, found by trying.

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Why no block can be shared between two folders.
#[derive(Debug, thiserror::Error)]
pub enum ReflinkError {
    /// They are on two filesystems.
    #[error("`{}` and `{}` are on different filesystems", from.display(), to.display())]
    Apart {
        /// Where the shared file would be.
        from: PathBuf,
        /// Where its clone would be.
        to: PathBuf,
    },
    /// Their filesystem cannot do it.
    #[error("{filesystem} does not share blocks")]
    Unsupported {
        /// Its name, such as `ext4`.
        filesystem: &'static str,
    },
    /// It could not be tried.
    #[error("it could not be tried in `{}`", folder.display())]
    Untried {
        /// The folder.
        folder: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel refuses for another reason.
    #[error("`{}` and `{}` cannot share blocks", from.display(), to.display())]
    Refused {
        /// Where the shared file would be.
        from: PathBuf,
        /// Where its clone would be.
        to: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Shares a block between a nameless file in `from` and one in `to`; nothing is left of them.
///
/// # Errors
/// It is not possible, with the reason.
pub fn try_reflink(from: &Path, to: &Path) -> Result<(), ReflinkError> {
    let (from_device, to_device) = (device(from)?, device(to)?);
    let unsupported = || ReflinkError::Unsupported {
        filesystem: filesystem_name(to).unwrap_or("the filesystem"),
    };
    let nameless = |folder: &Path| match nameless(folder) {
        // A filesystem without nameless files is none of those that share blocks.
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => Err(unsupported()),
        made => made.map_err(|errno| untried(folder)(errno.into())),
    };
    let (mut source, target) = (nameless(from)?, nameless(to)?);
    source
        .write_all(&[0x5a; 4096])
        .and_then(|()| source.flush())
        .map_err(untried(from))?;
    let both = || (from.to_owned(), to.to_owned());
    match rustix::fs::ioctl_ficlone(&target, &source) {
        Ok(()) => Ok(()),
        Err(Errno::XDEV) => {
            let (from, to) = both();
            Err(ReflinkError::Apart { from, to })
        }
        // Two mounts of different kinds are told apart before the kernel compares them.
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL | Errno::NOSYS)
            if from_device != to_device =>
        {
            let (from, to) = both();
            Err(ReflinkError::Apart { from, to })
        }
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS) => Err(unsupported()),
        Err(errno) => {
            let (from, to) = both();
            Err(ReflinkError::Refused {
                from,
                to,
                source: errno.into(),
            })
        }
    }
}

fn untried(folder: &Path) -> impl FnOnce(io::Error) -> ReflinkError {
    let folder = folder.to_owned();
    move |source| ReflinkError::Untried { folder, source }
}

fn device(folder: &Path) -> Result<u64, ReflinkError> {
    let facts = std::fs::metadata(folder).map_err(untried(folder))?;
    Ok(facts.dev())
}

fn nameless(folder: &Path) -> Result<File, Errno> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR).map(File::from)
}

/// The name of the filesystem that `path` is on, if it is a usual one.
pub fn filesystem_name(path: &Path) -> Option<&'static str> {
    filesystem_of(rustix::fs::statfs(path).ok()?.f_type)
}

/// The name of the filesystem with that number, which the kernel gives as signed.
pub(super) fn filesystem_of(kind: i64) -> Option<&'static str> {
    Some(match u32::try_from(kind).ok()? {
        0xef53 => "ext4",
        0x5846_5342 => "XFS",
        0x9123_683e => "btrfs",
        0xca45_1a4e => "bcachefs",
        0x2fc1_2fc1 => "ZFS",
        0xf2f5_2010 => "F2FS",
        0x0102_1994 => "tmpfs",
        0x794c_7630 => "overlayfs",
        0x6573_5546 => "FUSE",
        0x6969 => "NFS",
        0xff53_4d42 | 0xfe53_4d42 => "CIFS",
        0x0102_1997 => "9p",
        0x00c3_6400 => "Ceph",
        _ => return None,
    })
}

/// The uppermost folder above `path` that is on the same filesystem, which is where that is mounted.
pub fn mount_point(path: &Path) -> PathBuf {
    let device = |path: &Path| path.metadata().map(|facts| facts.dev()).ok();
    let wanted = device(path);
    path.ancestors()
        .take_while(|above| device(above) == wanted)
        .last()
        .unwrap_or(path)
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_filesystem_or_the_two_folders_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        if let Err(error) = try_reflink(folder.path(), folder.path()) {
            let name = filesystem_name(folder.path()).unwrap_or("the filesystem");
            assert_eq!(error.to_string(), format!("{name} does not share blocks"));
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let error = try_reflink(folder.path(), Path::new("/dev/shm")).unwrap_err();
        assert!(
            error.to_string().ends_with("are on different filesystems"),
            "{error}"
        );
        let missing = folder.path().join("missing");
        let error = try_reflink(&missing, folder.path()).unwrap_err();
        assert!(matches!(error, ReflinkError::Untried { .. }), "{error}");
    }

    #[test]
    fn a_mount_point_is_the_uppermost_folder_of_the_filesystem() {
        assert_eq!(mount_point(Path::new("/proc/self")), Path::new("/proc"));
        assert_eq!(filesystem_name(Path::new("/proc")), None);
    }
}
