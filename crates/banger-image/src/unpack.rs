//! Compressed streams and Debian packages.

use crate::context::Context;
use crate::error::BuildError;
use crate::kernel::PackageVersion;
use crate::tree::Tree;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;

/// The most a package or kernel may unpack to.
const MAX_UNPACKED: u64 = 8 << 30;
/// The largest window and dictionary that a decompressor may ask for, in KiB.
const MAX_MEMORY_KIB: u32 = 256 << 10;

/// How a stream is compressed, told by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    Gzip,
    Xz,
    Zstd,
    Lz4Legacy,
    None,
}

impl Compression {
    pub(crate) fn detect(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Xz,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            [0x02, 0x21, 0x4c, 0x18, ..] => Self::Lz4Legacy,
            _ => Self::None,
        }
    }

    /// The plain stream behind `reader`.
    pub(crate) fn decoder<'a>(self, reader: impl Read + 'a) -> std::io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::Gzip => Box::new(flate2::read::GzDecoder::new(reader)),
            Self::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(
                reader,
                true,
                MAX_MEMORY_KIB,
            )),
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::new(reader)?;
                decoder.window_log_max(27)?;
                // What follows the frame (a kernel's length word) is not compressed data.
                Box::new(decoder.single_frame())
            }
            Self::Lz4Legacy => Box::new(Lz4Legacy::new(reader)),
            Self::None => Box::new(reader),
        })
    }
}

/// The plain form of `bytes`, which may be compressed; at most `limit` bytes.
pub(crate) fn decompress(bytes: &[u8], name: &str, limit: u64) -> Result<Vec<u8>, BuildError> {
    let mut plain = Vec::new();
    let read = Compression::detect(bytes)
        .decoder(bytes)
        .and_then(|decoder| decoder.take(limit + 1).read_to_end(&mut plain));
    read.map_err(|error| BuildError::archive(name, error))?;
    if plain.len() as u64 > limit {
        let reason = format!("it unpacks to more than {limit} bytes");
        return Err(BuildError::archive(name, reason));
    }
    Ok(plain)
}

/// The kernel's own LZ4 framing: a magic, then blocks of at most 8 MiB behind their compressed length.
struct Lz4Legacy<R> {
    reader: R,
    started: bool,
    block: Vec<u8>,
    taken: usize,
}

const LZ4_LEGACY_MAGIC: u32 = 0x184c_2102;
const LZ4_LEGACY_BLOCK: usize = 8 << 20;

impl<R: Read> Lz4Legacy<R> {
    fn new(reader: R) -> Self {
        Self {
            reader,
            started: false,
            block: Vec::new(),
            taken: 0,
        }
    }

    fn word(&mut self) -> std::io::Result<Option<u32>> {
        let mut word = [0; 4];
        let mut filled = 0;
        while filled < 4 {
            match self.reader.read(&mut word[filled..])? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                count => filled += count,
            }
        }
        Ok(Some(u32::from_le_bytes(word)))
    }

    fn next_block(&mut self) -> std::io::Result<bool> {
        let invalid = |reason: String| std::io::Error::new(std::io::ErrorKind::InvalidData, reason);
        if !self.started {
            if self.word()? != Some(LZ4_LEGACY_MAGIC) {
                return Err(invalid("the LZ4 magic is missing".to_owned()));
            }
            self.started = true;
        }
        let length = match self.word()? {
            None => return Ok(false),
            // Archives may be joined.
            Some(LZ4_LEGACY_MAGIC) => return self.next_block(),
            Some(length) => length as usize,
        };
        if length == 0 || length > lz4_flex::block::get_maximum_output_size(LZ4_LEGACY_BLOCK) {
            return Err(invalid(format!("an LZ4 block of {length} bytes")));
        }
        let mut packed = vec![0; length];
        self.reader.read_exact(&mut packed)?;
        self.block.resize(LZ4_LEGACY_BLOCK, 0);
        let count = lz4_flex::block::decompress_into(&packed, &mut self.block)
            .map_err(|error| invalid(format!("a bad LZ4 block: {error}")))?;
        self.block.truncate(count);
        self.taken = 0;
        Ok(true)
    }
}

impl<R: Read> Read for Lz4Legacy<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.taken == self.block.len() {
            if !self.next_block()? {
                return Ok(0);
            }
        }
        let left = &self.block[self.taken..];
        let count = left.len().min(buffer.len());
        buffer[..count].copy_from_slice(&left[..count]);
        self.taken += count;
        Ok(count)
    }
}

/// A file without a name below `folder`, for what must be read twice; it is gone when it is closed.
pub(crate) fn spool_file(folder: &Path) -> Result<File, BuildError> {
    use rustix::fs::{Mode, OFlags};
    std::fs::create_dir_all(folder).map_err(BuildError::io("create", folder))?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        // Some filesystems have no unnamed files.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
            let path = folder.join(format!(".spool-{}", uuid::Uuid::now_v7()));
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
            let file = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
                .map_err(|errno| BuildError::io("create", &path)(errno.into()))?;
            std::fs::remove_file(&path).map_err(BuildError::io("remove", &path))?;
            Ok(file.into())
        }
        Err(errno) => Err(BuildError::io("create a file in", folder)(errno.into())),
    }
}

/// Copies `reader` to `file`, at most `limit` bytes, while the build is not cancelled.
pub(crate) fn copy(
    reader: &mut dyn Read,
    file: &mut File,
    (name, folder): (&str, &Path),
    limit: u64,
    context: &Context,
    each: &mut dyn FnMut(&[u8], u64),
) -> Result<u64, BuildError> {
    let mut buffer = vec![0; 256 << 10];
    let mut done = 0u64;
    loop {
        context.check()?;
        let count = match reader.read(&mut buffer) {
            Ok(0) => return Ok(done),
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(BuildError::archive(name, error)),
        };
        done += count as u64;
        if done > limit {
            let reason = format!("it unpacks to more than {limit} bytes");
            return Err(BuildError::archive(name, reason));
        }
        file.write_all(&buffer[..count])
            .map_err(BuildError::io("write a temporary file in", folder))?;
        each(&buffer[..count], done);
    }
}

/// What a Debian package holds.
pub(crate) struct Package {
    /// Its name and version.
    pub(crate) version: PackageVersion,
    /// The names of the packages it depends on, first alternatives only.
    pub(crate) depends: Vec<String>,
    /// Its files.
    pub(crate) tree: Tree,
}

/// Reads the Debian package in `path`; its content is spooled to an unnamed file in the cache.
pub(crate) fn read_package(path: &Path, context: &Context) -> Result<Package, BuildError> {
    let name = path.display().to_string();
    let bytes = std::fs::read(path).map_err(BuildError::io("read", path))?;
    let bad = |reason: &str| BuildError::archive(&*name, reason);
    let (mut control, mut data) = (None, None);
    for (member, content) in ar_members(&bytes).map_err(bad)? {
        if member.starts_with("control.tar") {
            control = Some(content);
        } else if member.starts_with("data.tar") {
            data = Some(content);
        }
    }
    let control = control.ok_or_else(|| bad("it has no control archive"))?;
    let data = data.ok_or_else(|| bad("it has no data archive"))?;

    let control = spool(control, &name, context)?;
    let mut tree = Tree::default();
    tree.add_tar(&control, &name, context)?;
    let fields = tree
        .file("control")
        .ok_or_else(|| bad("it has no control file"))?
        .read(&name, 1 << 20)?;
    let fields = String::from_utf8_lossy(&fields);
    let version = PackageVersion {
        name: field(&fields, "Package").ok_or_else(|| bad("it does not say its name"))?,
        version: field(&fields, "Version").ok_or_else(|| bad("it does not say its version"))?,
    };
    let depends = depends(&field(&fields, "Depends").unwrap_or_default());

    context.tell("unpack", &format!("{} {}", version.name, version.version));
    let data = spool(data, &name, context)?;
    let mut tree = Tree::default();
    tree.add_tar(&data, &name, context)?;
    Ok(Package {
        version,
        depends,
        tree,
    })
}

fn spool(bytes: &[u8], name: &str, context: &Context) -> Result<Arc<File>, BuildError> {
    let folder = &context.cache_dir;
    let mut file = spool_file(folder)?;
    let mut decoder = Compression::detect(bytes)
        .decoder(bytes)
        .map_err(|error| BuildError::archive(name, error))?;
    copy(
        &mut decoder,
        &mut file,
        (name, folder),
        MAX_UNPACKED,
        context,
        &mut |_, _| {},
    )?;
    Ok(Arc::new(file))
}

/// The members of an `ar` archive.
fn ar_members(bytes: &[u8]) -> Result<Vec<(String, &[u8])>, &'static str> {
    let mut rest = bytes
        .strip_prefix(b"!<arch>\n")
        .ok_or("it is not a Debian package")?;
    let mut members = Vec::new();
    while !rest.is_empty() {
        let (header, after) = rest.split_at_checked(60).ok_or("it is cut off")?;
        if !header.ends_with(b"`\n") {
            return Err("a member has no valid header");
        }
        let text =
            |range: std::ops::Range<usize>| std::str::from_utf8(&header[range]).unwrap_or("");
        let length: usize = text(48..58)
            .trim_end()
            .parse()
            .map_err(|_| "a member has no valid length")?;
        let (content, after) = after.split_at_checked(length).ok_or("it is cut off")?;
        members.push((
            text(0..16).trim_end().trim_end_matches('/').to_owned(),
            content,
        ));
        // Members start at even offsets.
        rest = if length % 2 == 1 {
            after.get(1..).unwrap_or(&[])
        } else {
            after
        };
    }
    Ok(members)
}

/// The value of `name` in a stanza of dpkg's; continuation lines are joined.
pub(crate) fn field(stanza: &str, name: &str) -> Option<String> {
    let mut lines = stanza.lines();
    let first = lines.by_ref().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then_some(value)
    })?;
    let rest = lines.take_while(|line| line.starts_with([' ', '\t']));
    let value = std::iter::once(first)
        .chain(rest)
        .map(str::trim)
        .collect::<Vec<_>>();
    Some(value.join(" ").trim().to_owned())
}

/// Package names of a `Depends` field, first alternatives only.
fn depends(field: &str) -> Vec<String> {
    field
        .split(',')
        .filter_map(|clause| {
            let first = clause.split('|').next()?.trim();
            let end = first.find([' ', '(', ':', '[']).unwrap_or(first.len());
            (!first.is_empty()).then(|| first[..end].to_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ar(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut bytes = b"!<arch>\n".to_vec();
        for (name, content) in members {
            bytes.extend(
                format!(
                    "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n",
                    0,
                    0,
                    0,
                    100644,
                    content.len()
                )
                .bytes(),
            );
            bytes.extend_from_slice(content);
            if content.len() % 2 == 1 {
                bytes.push(b'\n');
            }
        }
        bytes
    }

    fn tar(path: &str, content: &[u8]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        builder.append_data(&mut header, path, content).unwrap();
        builder.into_inner().unwrap()
    }

    fn package(data: &[u8]) -> Vec<u8> {
        let control =
            "Package: some\nVersion: 1:2.0-3\nDepends: libc6 (>= 2.36), awk:any | mawk,\n libz\n";
        ar(&[
            ("debian-binary", b"2.0\n"),
            ("control.tar", &tar("./control", control.as_bytes())),
            ("data.tar.zst", &zstd::encode_all(data, 1).unwrap()),
        ])
    }

    fn read(bytes: &[u8]) -> Result<Package, BuildError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("some.deb");
        std::fs::write(&path, bytes).unwrap();
        read_package(&path, &Context::quiet(dir.path().join("cache")))
    }

    #[test]
    fn a_package_is_read_with_its_version_and_dependencies() {
        let package = read(&package(&tar("./usr/bin/some", b"content"))).unwrap();
        assert_eq!(package.version.name, "some");
        assert_eq!(package.version.version, "1:2.0-3");
        assert_eq!(package.depends, ["libc6", "awk", "libz"]);
        let file = package.tree.file("usr/bin/some").unwrap();
        assert_eq!(file.read("", 100).unwrap(), b"content");
    }

    #[test]
    fn a_package_cut_off_anywhere_is_an_error_and_never_a_panic() {
        let whole = package(&tar("./usr/bin/some", &[7; 3000]));
        for length in (0..whole.len() - 1).step_by(97) {
            assert!(read(&whole[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn what_is_no_package_is_called_so() {
        let error = read(b"just some text").err().unwrap().to_string();
        assert!(error.contains("not a Debian package"), "{error}");
    }

    fn legacy(blocks: &[&[u8]]) -> Vec<u8> {
        let mut bytes = LZ4_LEGACY_MAGIC.to_le_bytes().to_vec();
        for block in blocks {
            let packed = lz4_flex::block::compress(block);
            bytes.extend((packed.len() as u32).to_le_bytes());
            bytes.extend(packed);
        }
        bytes
    }

    #[test]
    fn legacy_lz4_is_read_block_by_block() {
        let plain = decompress(&legacy(&[b"hello ", b"world"]), "test", 100).unwrap();
        assert_eq!(plain, b"hello world");
    }

    #[test]
    fn bad_lz4_is_an_error() {
        let good = legacy(&[&[1; 5000]]);
        for bad in [
            &good[..6],
            &good[..good.len() - 3],
            &[&good[..4], &[0xff; 4]].concat(),
        ] {
            assert!(decompress(bad, "test", 1 << 20).is_err());
        }
        let mut broken = good.clone();
        broken[8..].fill(0xf7);
        assert!(decompress(&broken, "test", 1 << 20).is_err());
    }

    #[test]
    fn a_small_file_that_unpacks_to_too_much_is_refused() {
        let bomb = zstd::encode_all(&vec![0u8; 1 << 20][..], 3).unwrap();
        assert!(bomb.len() < 1000);
        let error = decompress(&bomb, "bomb", 1 << 10).unwrap_err().to_string();
        assert!(error.contains("more than 1024"), "{error}");
    }
}
