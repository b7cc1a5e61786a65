//! Empty filesystems: a sparse template per size, cloned with a UUID of its own; and copies that stay sparse.

use crate::context::Context;
use crate::error::BuildError;
use crate::run::Program;
use rustix::fs::{Mode, OFlags, SeekFrom};
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use uuid::Uuid;

const SUPERBLOCK: u64 = 1024;
const SUPERBLOCK_BYTES: usize = 1024;
const MAGIC_AT: usize = 0x38;
const INCOMPAT_AT: usize = 0x60;
const RO_COMPAT_AT: usize = 0x64;
const UUID_AT: usize = 0x68;
const CHECKSUM_AT: usize = 0x3fc;
const RO_COMPAT_METADATA_CSUM: u32 = 0x400;
const INCOMPAT_CSUM_SEED: u32 = 0x2000;

/// How many times its size a filesystem can grow while it is mounted.
const GROWTH: u64 = 16;
/// What the templates look like; a change makes new ones.
const TEMPLATE_VERSION: u32 = 1;

/// The template of an empty ext4 of `bytes` bytes, made on first use and kept in the context's cache.
///
/// Its inode tables and journal count as zeroed, which holes are, so that mounting a clone starts no background
/// work; its checksums do not depend on its UUID, so that a clone can have another one.
pub fn ensure_empty_ext4(bytes: u64, context: &Context) -> Result<PathBuf, BuildError> {
    let folder = context.cache_dir.join("empty-ext4");
    let path = folder.join(format!("{bytes}-v{TEMPLATE_VERSION}.img"));
    if path.exists() {
        return Ok(path);
    }
    std::fs::create_dir_all(&folder).map_err(BuildError::io("create", &folder))?;
    // Two that make the same template at once each make their own; the last rename wins.
    let partial = folder.join(format!("{bytes}-{}.partial", Uuid::now_v7()));
    let made = make_empty(&partial, bytes, context).and_then(|()| {
        std::fs::rename(&partial, &path).map_err(BuildError::io("rename", &partial))
    });
    if made.is_err() {
        // The first failure is what counts; the cache is safe to delete anyway.
        let _ = std::fs::remove_file(&partial);
    }
    made.map(|()| path)
}

fn make_empty(path: &Path, bytes: u64, context: &Context) -> Result<(), BuildError> {
    let file = create_new(path)?;
    file.set_len(bytes)
        .map_err(BuildError::io("resize", path))?;
    let blocks = bytes / 4096;
    let room = blocks.saturating_mul(GROWTH).min(u64::from(u32::MAX));
    // Room for descriptors holds real data, which every clone would copy.
    let resize = if room > blocks {
        format!(",resize={room}")
    } else {
        String::new()
    };
    let extended = format!(
        "lazy_itable_init=1,lazy_journal_init=1,assume_storage_prezeroed=1,nodiscard,root_owner=0:0{resize}"
    );
    let program = Program {
        name: "mke2fs",
        package: "e2fsprogs",
        arguments: [
            "-q",
            "-F",
            "-t",
            "ext4",
            "-m",
            "0",
            "-b",
            "4096",
            "-I",
            "256",
            "-i",
            "16384",
            "-O",
            "metadata_csum,metadata_csum_seed,64bit",
            "-E",
            &extended,
        ]
        .map(OsString::from)
        .into_iter()
        .chain([path.into()])
        .collect(),
        folder: None,
        environment: Vec::new(),
        limit: Duration::from_secs(60),
        stage: None,
    };
    program.succeed(context)?;
    // mke2fs writes some megabytes of zeros, which every clone would copy.
    dig_holes(&file).map_err(|errno| BuildError::io("make holes in", path)(errno.into()))?;
    file.sync_all().map_err(BuildError::io("sync", path))
}

/// Copies the template to `target`, a new file of mode 0600, as a filesystem with `uuid`. Not synced.
pub fn clone_empty_ext4(template: &Path, target: &Path, uuid: Uuid) -> Result<(), BuildError> {
    let file = copy_to_new(template, target)?;
    let written = (|| {
        let mut superblock = read_superblock(&file, target)?;
        set_uuid(&mut superblock, uuid).ok_or_else(|| BuildError::NotExt4 {
            path: target.to_owned(),
        })?;
        file.write_all_at(&superblock, SUPERBLOCK)
            .map_err(BuildError::io("write", target))
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(target);
    }
    written
}

/// Copies `source` to `target`, a new file of mode 0600, sharing blocks where the filesystem can and leaving holes
/// where there are holes. Not synced.
pub fn sparse_copy(source: &Path, target: &Path) -> Result<(), BuildError> {
    copy_to_new(source, target).map(drop)
}

/// Makes `target`, a new file of mode 0600, that shares all blocks with `source` until one of the two changes. Not
/// synced.
///
/// # Errors
/// The filesystem does not share blocks, or the two files are on different ones.
pub fn reflink(source: &Path, target: &Path) -> Result<(), BuildError> {
    let from = File::open(source).map_err(BuildError::io("read", source))?;
    let to = create_new(target)?;
    rustix::fs::ioctl_ficlone(&to, &from).map_err(|errno| {
        let _ = std::fs::remove_file(target);
        BuildError::io("share blocks with", target)(errno.into())
    })
}

/// The UUID of the ext4 filesystem in `path`.
pub fn read_ext4_uuid(path: &Path) -> Result<Uuid, BuildError> {
    let file = File::open(path).map_err(BuildError::io("read", path))?;
    let superblock = read_superblock(&file, path)?;
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&superblock[UUID_AT..UUID_AT + 16]);
    Ok(Uuid::from_bytes(bytes))
}

fn read_superblock(file: &File, path: &Path) -> Result<[u8; SUPERBLOCK_BYTES], BuildError> {
    let mut superblock = [0; SUPERBLOCK_BYTES];
    let not_ext4 = || BuildError::NotExt4 {
        path: path.to_owned(),
    };
    match file.read_exact_at(&mut superblock, SUPERBLOCK) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Err(not_ext4()),
        Err(error) => return Err(BuildError::io("read", path)(error)),
    }
    if superblock[MAGIC_AT..MAGIC_AT + 2] != [0x53, 0xef] {
        return Err(not_ext4());
    }
    Ok(superblock)
}

/// Puts `uuid` and the checksum that goes with it into a superblock, unless other checksums depend on the UUID.
fn set_uuid(superblock: &mut [u8; SUPERBLOCK_BYTES], uuid: Uuid) -> Option<()> {
    let word = |at: usize| {
        let bytes = [0, 1, 2, 3].map(|offset| superblock[at + offset]);
        u32::from_le_bytes(bytes)
    };
    let has_checksums = word(RO_COMPAT_AT) & RO_COMPAT_METADATA_CSUM != 0;
    let has_seed = word(INCOMPAT_AT) & INCOMPAT_CSUM_SEED != 0;
    if !has_checksums || !has_seed {
        return None;
    }
    superblock[UUID_AT..UUID_AT + 16].copy_from_slice(uuid.as_bytes());
    // ext4 leaves out the final inversion of CRC-32C.
    let checksum = !crc32c::crc32c(&superblock[..CHECKSUM_AT]);
    superblock[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
    Some(())
}

fn create_new(path: &Path) -> Result<File, BuildError> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
        .map(File::from)
        .map_err(|errno| BuildError::io("create", path)(errno.into()))
}

/// Copies to a new file, which is removed again on failure.
fn copy_to_new(source: &Path, target: &Path) -> Result<File, BuildError> {
    let from = File::open(source).map_err(BuildError::io("read", source))?;
    let to = create_new(target)?;
    match copy_data(&from, &to) {
        Ok(()) => Ok(to),
        Err(errno) => {
            let _ = std::fs::remove_file(target);
            Err(BuildError::io("copy to", target)(errno.into()))
        }
    }
}

fn copy_data(from: &File, to: &File) -> rustix::io::Result<()> {
    use rustix::io::Errno;
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let length = u64::try_from(rustix::fs::fstat(from)?.st_size).unwrap_or(0);
    rustix::fs::ftruncate(to, length)?;
    let mut at = 0;
    while at < length {
        let start = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole is left.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno),
        };
        let end = rustix::fs::seek(from, SeekFrom::Hole(start))?.min(length);
        copy_range(from, to, start, end)?;
        at = end;
    }
    Ok(())
}

/// Makes holes of a file's blocks of zeros.
fn dig_holes(file: &File) -> rustix::io::Result<()> {
    use rustix::fs::FallocateFlags;
    use rustix::io::Errno;
    const BLOCK: usize = 4096;
    let mut buffer = vec![0; 64 * BLOCK];
    let mut at = 0;
    loop {
        // Block by block from data to data; holes are skipped.
        at = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start - start % BLOCK as u64,
            Err(Errno::NXIO) => return Ok(()),
            Err(errno) => return Err(errno),
        };
        let count = rustix::io::pread(file, &mut buffer[..], at)?;
        for (index, block) in buffer[..count].chunks(BLOCK).enumerate() {
            if block.iter().all(|&byte| byte == 0) {
                let offset = at + (index * BLOCK) as u64;
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                match rustix::fs::fallocate(file, flags, offset, block.len() as u64) {
                    Ok(()) => {}
                    // Without holes the template is only larger.
                    Err(Errno::OPNOTSUPP) => return Ok(()),
                    Err(errno) => return Err(errno),
                }
            }
        }
        at += count as u64;
    }
}

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> rustix::io::Result<()> {
    use rustix::io::Errno;
    let (mut read_at, mut write_at) = (start, start);
    while read_at < end {
        let wanted = usize::try_from(end - read_at)
            .unwrap_or(usize::MAX)
            .min(1 << 30);
        match rustix::fs::copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), wanted)
        {
            // The source got shorter meanwhile: what is missing reads as zeros.
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::NOSYS | Errno::INVAL | Errno::OPNOTSUPP) => {
                return copy_by_hand(from, to, read_at, end);
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn copy_by_hand(from: &File, to: &File, start: u64, end: u64) -> rustix::io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut at = start;
    while at < end {
        let wanted = usize::try_from(end - at)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let count = rustix::io::pread(from, &mut buffer[..wanted], at)?;
        if count == 0 {
            return Ok(());
        }
        let mut written = 0;
        while written < count {
            written += rustix::io::pwrite(to, &buffer[written..count], at + written as u64)?;
        }
        at += count as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn has_tools(test: &str) -> bool {
        for tool in ["mke2fs", "e2fsck"] {
            if crate::run::find(tool).is_none() {
                eprintln!("SKIPPED: {test}: {tool} is not installed");
                return false;
            }
        }
        true
    }

    #[test]
    fn a_clone_is_clean_sparse_and_has_its_own_uuid() {
        if !has_tools("a_clone_is_clean_sparse_and_has_its_own_uuid") {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let context = Context::quiet(dir.path().join("cache"));
        for bytes in [64 << 20, 8 << 30] {
            let template = ensure_empty_ext4(bytes, &context).unwrap();
            assert_eq!(ensure_empty_ext4(bytes, &context).unwrap(), template);
            let target = dir.path().join(format!("{bytes}.img"));
            let uuid = Uuid::now_v7();
            clone_empty_ext4(&template, &target, uuid).unwrap();
            let metadata = std::fs::metadata(&target).unwrap();
            assert_eq!((metadata.len(), metadata.mode() & 0o777), (bytes, 0o600));
            assert!(
                metadata.blocks() * 512 <= 256 << 10,
                "{} blocks",
                metadata.blocks()
            );
            assert_eq!(read_ext4_uuid(&target).unwrap(), uuid);
            assert_ne!(read_ext4_uuid(&template).unwrap(), uuid);
            crate::ext4::check(&target, &context).unwrap();
            eprintln!("{bytes}: {} KiB allocated", metadata.blocks() / 2);
        }
    }

    #[test]
    fn a_clone_never_replaces_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let (template, target) = (dir.path().join("template"), dir.path().join("disk.img"));
        std::fs::write(&template, vec![0; 8192]).unwrap();
        std::fs::write(&target, "precious").unwrap();
        assert!(clone_empty_ext4(&template, &target, Uuid::nil()).is_err());
        assert_eq!(std::fs::read(&target).unwrap(), b"precious");
    }

    #[test]
    fn a_template_that_is_no_ext4_leaves_no_clone() {
        let dir = tempfile::tempdir().unwrap();
        let (template, target) = (dir.path().join("template"), dir.path().join("disk.img"));
        std::fs::write(&template, vec![0; 8192]).unwrap();
        let error = clone_empty_ext4(&template, &target, Uuid::nil()).unwrap_err();
        assert!(matches!(error, BuildError::NotExt4 { .. }));
        assert!(!target.exists());
    }

    #[test]
    fn a_copy_keeps_content_and_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("source"), dir.path().join("target"));
        let file = File::create(&source).unwrap();
        file.set_len(256 << 20).unwrap();
        file.write_all_at(b"start", 0).unwrap();
        file.write_all_at(&[7; 9000], 100 << 20).unwrap();
        sparse_copy(&source, &target).unwrap();
        let copy = File::open(&target).unwrap();
        assert_eq!(copy.metadata().unwrap().len(), 256 << 20);
        assert!(copy.metadata().unwrap().blocks() * 512 < 1 << 20);
        let mut bytes = [0; 9001];
        copy.read_exact_at(&mut bytes, 100 << 20).unwrap();
        assert_eq!((&bytes[..9000], bytes[9000]), (&[7; 9000][..], 0));
        copy.read_exact_at(&mut bytes[..6], 0).unwrap();
        assert_eq!(&bytes[..6], b"start\0");
    }

    #[test]
    fn copying_by_hand_gives_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("source"), dir.path().join("target"));
        std::fs::write(&source, vec![5; 3_000_000]).unwrap();
        let to = create_new(&target).unwrap();
        copy_by_hand(&File::open(&source).unwrap(), &to, 1000, 2_999_000).unwrap();
        let copied = std::fs::read(&target).unwrap();
        assert_eq!(copied.len(), 2_999_000);
        assert!(copied[..1000].iter().all(|&b| b == 0) && copied[1000..].iter().all(|&b| b == 5));
    }

    #[test]
    fn what_holds_no_ext4_has_no_uuid() {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in [("empty", 0), ("short", 1500), ("zeros", 9000)] {
            let path = dir.path().join(name);
            std::fs::write(&path, vec![0; bytes]).unwrap();
            let error = read_ext4_uuid(&path).unwrap_err();
            assert!(
                matches!(error, BuildError::NotExt4 { .. }),
                "{name}: {error}"
            );
        }
    }
}
