//! Writing a tree as an ext4 image, and checking one.

use crate::context::Context;
use crate::error::BuildError;
use crate::run::Program;
use crate::tree::{Entry, Kind, Tree};
use mkext4::sink::{FileSink, RegionSink};
use mkext4::{FsBuilder, InodeCount, InodeHandle, Meta, Options, ROOT, SpecialKind};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;
use uuid::Uuid;

const BLOCK: u64 = 4096;

/// How an image is to be written.
pub(crate) struct Layout<'a> {
    /// The filesystem's UUID.
    pub(crate) uuid: Uuid,
    /// The time of the filesystem itself, in seconds since 1970.
    pub(crate) epoch: i64,
    /// At most 16 bytes.
    pub(crate) label: &'a str,
    /// The journal's size in blocks, at least 1024.
    pub(crate) journal_blocks: u32,
}

/// A UUID that follows from a digest, so that the same content gets the same one.
pub(crate) fn uuid_of(digest: &[u8]) -> Uuid {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

/// A digest in hexadecimal.
pub(crate) fn hex(digest: &[u8]) -> String {
    use std::fmt::Write;
    digest.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The SHA-256 of a file in hexadecimal.
pub(crate) fn sha256_file(path: &Path, context: &Context) -> Result<String, BuildError> {
    let mut file = File::open(path).map_err(BuildError::io("read", path))?;
    let total = file.metadata().map_err(BuildError::io("read", path))?.len();
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let (mut done, mut told) = (0, 0);
    loop {
        context.check()?;
        let count = file
            .read(&mut buffer)
            .map_err(BuildError::io("read", path))?;
        if count == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..count]);
        done += count as u64;
        if done - told >= 64 << 20 {
            told = done;
            context.tell_amount("digest", "computing the digest", Some(done), Some(total));
        }
    }
}

/// Writes `tree` to the new file `path` (mode 0444) and checks it with `e2fsck` where that is installed.
pub(crate) fn write(
    tree: &Tree,
    path: &Path,
    layout: &Layout<'_>,
    context: &Context,
) -> Result<(), BuildError> {
    context.check()?;
    let failed = |source| BuildError::Ext4 {
        path: path.to_owned(),
        source,
    };
    let mut options = Options::new(size(tree, layout), *layout.uuid.as_bytes(), layout.epoch);
    options.label = Some(layout.label.to_owned());
    options.inodes = InodeCount::Exact(inodes(tree));
    options.reserved_percent = 0;
    options.journal_blocks = Some(layout.journal_blocks);
    let bytes = options.size_bytes;
    let mut builder = FsBuilder::new(options).map_err(failed)?;
    let handles = declare(tree, &mut builder).map_err(failed)?;
    let sealed = builder.seal().map_err(failed)?;
    let mut sink = Sink {
        inner: FileSink::create(path, bytes).map_err(BuildError::io("create", path))?,
        context,
    };
    let result = (|| {
        let mut writer = sealed.writer(&mut sink)?;
        let total = handles.len() as u64;
        for (done, (name, handle)) in handles.iter().enumerate() {
            if done % 2000 == 0 {
                context.tell_amount(
                    "write",
                    "writing the filesystem",
                    Some(done as u64),
                    Some(total),
                );
            }
            // What is empty has no room to be filled.
            if let Some(content) = tree.file(name)
                && content.length() > 0
            {
                writer.fill(*handle, &mut content.reader())?;
            }
        }
        writer.finish()
    })();
    context.check()?;
    result.map_err(failed)?;
    set_read_only(path)?;
    check(path, context)
}

struct Sink<'a> {
    inner: FileSink,
    context: &'a Context,
}

impl RegionSink for Sink<'_> {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.context
            .check()
            .map_err(|error| std::io::Error::other(error.to_string()))?;
        self.inner.data(offset, bytes)
    }

    fn zeros(&mut self, offset: u64, length: u64) -> std::io::Result<()> {
        self.inner.zeros(offset, length)
    }
}

fn inodes(tree: &Tree) -> u32 {
    let count = tree.len() as u64;
    u32::try_from(count + count / 8 + 1024).unwrap_or(u32::MAX)
}

/// Enough room: the image is sparse, so what is too much costs nothing.
fn size(tree: &Tree, layout: &Layout<'_>) -> u64 {
    let mut blocks = 0;
    let mut directory_bytes: BTreeMap<&str, u64> = BTreeMap::new();
    for (path, entry) in tree.entries() {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        *directory_bytes.entry(parent).or_default() += 12 + name.len() as u64;
        blocks += match &entry.kind {
            Kind::File(content) => content.length().div_ceil(BLOCK),
            Kind::Directory | Kind::Symlink(_) => 1,
            _ => 0,
        } + u64::from(!entry.xattrs.is_empty());
    }
    blocks += directory_bytes
        .values()
        .map(|bytes| bytes * 2 / BLOCK)
        .sum::<u64>();
    blocks += u64::from(inodes(tree)).div_ceil(BLOCK / 256);
    blocks += u64::from(layout.journal_blocks);
    // Extent blocks, bitmaps and descriptors; then a margin up to a whole MiB.
    let blocks = blocks + blocks / 50 + 1024;
    // The writer wants the journal to be at most a quarter of the whole.
    let blocks = blocks.max(u64::from(layout.journal_blocks) * 5);
    (blocks * BLOCK).next_multiple_of(1 << 20)
}

fn meta(entry: &Entry) -> Meta {
    Meta::new(entry.mode & 0o7777, entry.uid, entry.gid, (entry.mtime, 0))
}

/// Declares every entry; returns the files in the order in which they are to be filled.
fn declare<'a>(
    tree: &'a Tree,
    builder: &mut FsBuilder,
) -> mkext4::Result<Vec<(&'a str, InodeHandle)>> {
    let mut directories = BTreeMap::from([("", ROOT)]);
    let mut files: BTreeMap<&str, InodeHandle> = BTreeMap::new();
    let mut order = Vec::new();
    let mut links = Vec::new();
    for (path, entry) in tree.entries() {
        if path.is_empty() {
            builder.set_meta(ROOT, meta(entry))?;
            continue;
        }
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        let parent = *directories.get(parent).ok_or_else(|| {
            mkext4::Error::Invalid(format!(
                "`{path}` lies below something that is no directory"
            ))
        })?;
        let device = |kind| (kind, meta(entry));
        let handle = match &entry.kind {
            Kind::Directory => {
                let handle = builder.mkdir(parent, name, meta(entry))?;
                directories.insert(path, handle);
                handle
            }
            Kind::File(content) => {
                let handle = builder.file(parent, name, meta(entry), content.length())?;
                files.insert(path, handle);
                order.push((path, handle));
                handle
            }
            Kind::Symlink(target) => builder.symlink(parent, name, target, meta(entry))?,
            Kind::HardLink(target) => {
                links.push((parent, name, target.as_str()));
                continue;
            }
            Kind::CharDevice(major, minor) => {
                let (major, minor) = (*major, *minor);
                let (kind, meta) = device(SpecialKind::Char { major, minor });
                builder.mknod(parent, name, meta, kind)?
            }
            Kind::BlockDevice(major, minor) => {
                let (major, minor) = (*major, *minor);
                let (kind, meta) = device(SpecialKind::Block { major, minor });
                builder.mknod(parent, name, meta, kind)?
            }
            Kind::Fifo => {
                let (kind, meta) = device(SpecialKind::Fifo);
                builder.mknod(parent, name, meta, kind)?
            }
        };
        for (key, value) in &entry.xattrs {
            builder.set_xattr(handle, key, value)?;
        }
    }
    for (parent, name, target) in links {
        let target = *files
            .get(target)
            .ok_or_else(|| mkext4::Error::Invalid(format!("`{name}` is a hard link to nothing")))?;
        builder.hardlink(parent, name, target)?;
    }
    Ok(order)
}

fn set_read_only(path: &Path) -> Result<(), BuildError> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o444))
        .map_err(BuildError::io("set the mode of", path))
}

/// Checks the filesystem in `path`. Without `e2fsck` nothing is checked, and a warning says so.
pub(crate) fn check(path: &Path, context: &Context) -> Result<(), BuildError> {
    if crate::run::find("e2fsck").is_none() {
        tracing::warn!(path = %path.display(), "e2fsck is not installed: the filesystem is not checked");
        return Ok(());
    }
    context.tell("check", "checking the filesystem");
    let outcome = Program {
        name: "e2fsck",
        package: "e2fsprogs",
        arguments: vec!["-fn".into(), path.into()],
        folder: None,
        environment: Vec::new(),
        limit: Duration::from_secs(300),
        stage: None,
    }
    .run(context)?;
    if outcome.status.success() {
        return Ok(());
    }
    let said = crate::run::printable(&outcome.stdout);
    let end = said.chars().rev().take(600).collect::<Vec<_>>();
    Err(BuildError::NotClean {
        path: path.to_owned(),
        output: end.into_iter().rev().collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Tree {
        let mut tree = Tree::default();
        tree.write("etc/hostname", 0o644, 5, "otter\n");
        tree.write("bin/su", 0o4755, 5, vec![3; 10_000]);
        tree.insert(
            "bin/su2",
            Entry::new(Kind::HardLink("bin/su".to_owned()), 0o4755, 5),
        );
        tree.symlink("bin/sh", "su", 5);
        tree.insert("dev/null", Entry::new(Kind::CharDevice(1, 3), 0o666, 5));
        tree.directory("tmp", 0o1777, 5);
        for number in 0..500 {
            tree.write(
                &format!("many/a-name-of-some-length-{number}"),
                0o600,
                5,
                "x",
            );
        }
        let mut ping = tree.get("bin/su").unwrap().clone();
        ping.kind = Kind::File(crate::tree::Content::Bytes(b"ping".as_slice().into()));
        ping.mode = 0o755;
        ping.xattrs = vec![("security.capability".to_owned(), vec![1; 20])];
        tree.insert("bin/ping", ping);
        tree
    }

    fn layout() -> Layout<'static> {
        Layout {
            uuid: uuid_of(&[9; 32]),
            epoch: 1_700_000_000,
            label: "test",
            journal_blocks: 1024,
        }
    }

    #[test]
    fn an_image_holds_the_tree_and_is_clean() {
        if crate::run::find("e2fsck").is_none() {
            eprintln!("SKIPPED: an_image_holds_the_tree_and_is_clean: e2fsck is not installed");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.img");
        write(&sample(), &path, &layout(), &Context::quiet(dir.path())).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let fs = mkext4::reader::Fs::open(&bytes[..]).unwrap();
        let read = |path| fs.read_file(fs.resolve(path).unwrap()).unwrap();
        assert_eq!(read("/etc/hostname"), b"otter\n");
        assert_eq!(read("/bin/su2").len(), 10_000);
        assert_eq!(read("/bin/ping"), b"ping");
        assert_eq!(
            crate::template::read_ext4_uuid(&path).unwrap(),
            layout().uuid
        );
    }

    #[test]
    fn the_same_tree_gives_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let context = Context::quiet(dir.path());
        let digests = ["a", "b"].map(|name| {
            let path = dir.path().join(name);
            write(&sample(), &path, &layout(), &context).unwrap();
            sha256_file(&path, &context).unwrap()
        });
        assert_eq!(digests[0], digests[1]);
    }

    #[test]
    fn a_damaged_image_is_not_clean() {
        if crate::run::find("e2fsck").is_none() {
            eprintln!("SKIPPED: a_damaged_image_is_not_clean: e2fsck is not installed");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.img");
        let context = Context::quiet(dir.path());
        write(&sample(), &path, &layout(), &context).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[4096 * 2..4096 * 40].fill(0xee);
        let broken = dir.path().join("broken.img");
        std::fs::write(&broken, bytes).unwrap();
        let error = check(&broken, &context).unwrap_err();
        assert!(matches!(error, BuildError::NotClean { .. }), "{error}");
    }

    #[test]
    fn a_cancelled_write_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let context = Context::quiet(dir.path());
        context
            .cancel
            .store(true, std::sync::atomic::Ordering::Relaxed);
        let result = write(&sample(), &dir.path().join("root.img"), &layout(), &context);
        assert!(matches!(result, Err(BuildError::Cancelled)));
    }
}
