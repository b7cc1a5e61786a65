//! What a snapshot is made of, as its user hands it over: two descriptors, each of which must already allow the user
//! what the devices will.

use super::reflink::filesystem_of;
use rustix::fd::BorrowedFd;
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

/// A descriptor is not what a snapshot can be made of.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It is of another kind, or was opened for something else.
    #[error("the {what} of a snapshot must be {wanted}")]
    Wrong {
        /// Which.
        what: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
    /// The file belongs to somebody else.
    #[error("the {what} of a snapshot must be a file of uid {uid}, and is one of uid {owner}")]
    NotOwn {
        /// Which.
        what: &'static str,
        /// Who asks.
        uid: u32,
        /// Whose it is.
        owner: u32,
    },
    /// It is where a snapshot's file must not be.
    #[error(
        "the {what} of a snapshot cannot be on {filesystem}, which does not keep a file's blocks itself: put \
         it on ext4, XFS or btrfs"
    )]
    Filesystem {
        /// Which.
        what: &'static str,
        /// The filesystem's name.
        filesystem: &'static str,
    },
    /// It begins as no copy-on-write file of ours does.
    #[error(
        "the copy-on-write file does not begin as one with chunks of {} sectors",
        super::ops::CHUNK_SECTORS
    )]
    Header,
    /// It cannot be looked at.
    #[error("the {what} of a snapshot cannot be looked at")]
    Look {
        /// Which.
        what: &'static str,
        /// Why.
        #[source]
        source: Errno,
    },
}

/// Filesystems whose files are served by a program, another machine or another filesystem: who reads from them may wait
/// for ever, and the kernel does not see the same file behind two descriptors.
pub const STACKED: [&str; 6] = ["FUSE", "overlayfs", "NFS", "CIFS", "9p", "Ceph"];

/// How a copy-on-write file begins: a magic number, whether it is whole, a version, and the sectors of a chunk.
const HEADER_BYTES: usize = 16;

/// Checks the image: a file of `uid`, open for reading alone.
///
/// # Errors
/// It is something else.
pub fn check_image(file: BorrowedFd<'_>, uid: u32) -> Result<(), FileError> {
    let what = "image";
    let flags = check(what, file, uid)?;
    // `O_PATH` allows nothing and looks like this.
    if flags & OFlags::ACCMODE == OFlags::RDONLY && !flags.contains(OFlags::PATH) {
        return Ok(());
    }
    let wanted = "open for reading alone";
    Err(FileError::Wrong { what, wanted })
}

/// Checks the copy-on-write file: one of `uid`, open for reading and for writing anywhere.
///
/// # Errors
/// It is something else.
pub fn check_cow(file: BorrowedFd<'_>, uid: u32) -> Result<(), FileError> {
    let what = "copy-on-write file";
    let flags = check(what, file, uid)?;
    // The kernel's own writes go where it likes, also in a file that its user may only append to.
    if flags & OFlags::ACCMODE != OFlags::RDWR || flags.contains(OFlags::APPEND) {
        let wanted = "open for reading and writing, and not for appending";
        return Err(FileError::Wrong { what, wanted });
    }
    let mut begins = [0; HEADER_BYTES];
    let look = |source| FileError::Look { what, source };
    let read = rustix::io::pread(file, &mut begins, 0).map_err(look)?;
    if begins[..read].iter().any(|&byte| byte != 0) && !is_ours(&begins) {
        return Err(FileError::Header);
    }
    Ok(())
}

/// The kernel believes the chunk's size that is written there, and takes memory for it. Whether the file is whole is
/// for the kernel to judge.
fn is_ours(begins: &[u8; HEADER_BYTES]) -> bool {
    let chunk = super::ops::CHUNK_SECTORS.to_le_bytes();
    begins[..4] == *b"SnAp" && begins[8..12] == [1, 0, 0, 0] && begins[12..] == chunk[..4]
}

/// What both must be; answers how it is open. No content is looked at, which could take for ever.
fn check(what: &'static str, file: BorrowedFd<'_>, uid: u32) -> Result<OFlags, FileError> {
    let look = |source| FileError::Look { what, source };
    let facts = rustix::fs::fstat(file).map_err(look)?;
    if FileType::from_raw_mode(facts.st_mode) != FileType::RegularFile {
        let wanted = "a regular file";
        return Err(FileError::Wrong { what, wanted });
    }
    let owner = facts.st_uid;
    if uid != 0 && owner != uid {
        return Err(FileError::NotOwn { what, uid, owner });
    }
    // Before any turn is taken: a user's program could let everybody wait who reads from it.
    let filesystem = filesystem_of(rustix::fs::fstatfs(file).map_err(look)?.f_type);
    if let Some(filesystem) = filesystem
        && STACKED.contains(&filesystem)
    {
        return Err(FileError::Filesystem { what, filesystem });
    }
    rustix::fs::fcntl_getfl(file).map_err(look)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fd::AsFd;
    use rustix::fs::Mode;
    use std::fs::{File, OpenOptions};

    fn uid() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    #[test]
    fn descriptors_that_allow_more_or_less_than_the_device_are_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = |options: &mut OpenOptions| options.open(file.path()).unwrap();
        let readable = open(OpenOptions::new().read(true));
        let writable = open(OpenOptions::new().write(true));
        let appending = open(OpenOptions::new().read(true).append(true));
        let both = file.as_file();
        check_image(readable.as_fd(), uid()).unwrap();
        check_cow(both.as_fd(), uid()).unwrap();
        let path = OFlags::PATH | OFlags::CLOEXEC;
        let path = rustix::fs::open(file.path(), path, Mode::empty()).unwrap();
        let null = File::open("/dev/null").unwrap();
        let folder = File::open("/").unwrap();
        let (pipe, _end) = std::io::pipe().unwrap();
        for wrong in [
            both.as_fd(),
            writable.as_fd(),
            appending.as_fd(),
            path.as_fd(),
            null.as_fd(),
            folder.as_fd(),
            pipe.as_fd(),
        ] {
            let error = check_image(wrong, uid()).unwrap_err();
            assert!(matches!(error, FileError::Wrong { .. }), "{error}");
        }
        for wrong in [
            readable.as_fd(),
            writable.as_fd(),
            appending.as_fd(),
            path.as_fd(),
            null.as_fd(),
            folder.as_fd(),
            pipe.as_fd(),
        ] {
            let error = check_cow(wrong, uid()).unwrap_err();
            assert!(matches!(error, FileError::Wrong { .. }), "{error}");
        }
    }

    #[test]
    fn a_copy_on_write_file_whose_chunks_would_take_the_kernels_memory_is_refused() {
        use std::os::unix::fs::FileExt;
        let file = tempfile::NamedTempFile::new().unwrap();
        let check = |begins: &[u8]| {
            file.as_file().set_len(0).unwrap();
            file.as_file().write_all_at(begins, 0).unwrap();
            check_cow(file.as_file().as_fd(), uid())
        };
        check(b"").unwrap();
        check(&[0; 4096]).unwrap();
        check(b"SnAp\x01\0\0\0\x01\0\0\0\x08\0\0\0rest").unwrap();
        // One that the kernel has dropped is for the kernel to refuse.
        check(b"SnAp\0\0\0\0\x01\0\0\0\x08\0\0\0").unwrap();
        for wrong in [
            &b"SnAp\x01\0\0\0\x01\0\0\0\0\0\0\x40"[..],
            b"SnAp\x01\0\0\0\x02\0\0\0\x08\0\0\0",
            b"SnAp",
            b"something else",
        ] {
            let error = check(wrong).unwrap_err();
            assert!(matches!(error, FileError::Header), "{error}");
        }
    }

    #[test]
    fn a_file_of_somebody_else_is_refused_however_it_was_opened() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let readable = File::open(file.path()).unwrap();
        let stranger = uid() + 1;
        for error in [
            check_image(readable.as_fd(), stranger).unwrap_err(),
            check_cow(file.as_file().as_fd(), stranger).unwrap_err(),
        ] {
            let said = error.to_string();
            assert!(
                said.contains(&format!("must be a file of uid {stranger}"))
                    && said.ends_with(&format!("is one of uid {}", uid())),
                "{said}"
            );
        }
    }

    #[test]
    fn a_refused_filesystem_is_named_with_those_that_are_not() {
        let error = FileError::Filesystem {
            what: "image",
            filesystem: "overlayfs",
        };
        let said = error.to_string();
        assert!(
            said.contains("cannot be on overlayfs") && said.contains("ext4"),
            "{said}"
        );
        for name in STACKED {
            let numbers = [
                0x6573_5546,
                0x794c_7630,
                0x6969,
                0xff53_4d42,
                0xfe53_4d42,
                0x0102_1997,
                0x00c3_6400,
            ];
            let known = numbers.map(filesystem_of);
            assert!(known.contains(&Some(name)));
        }
    }
}
