//! A file tree that becomes an ext4 image, without a mount, without root.

use crate::Result;
use crate::error::Error;
use mkext4::sink::FileSink;
use mkext4::{FsBuilder, InodeCount, InodeHandle, Meta, Options, ROOT, SpecialKind};
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

const BLOCK_BYTES: u64 = 4096;

/// Where a file's content comes from.
enum Content {
    /// A range of the archive that the tree was read from.
    Archive {
        offset: u64,
        bytes: u64,
    },
    File(PathBuf),
    Bytes(Vec<u8>),
}

/// A tree of files, declared and not yet written.
pub struct Tree {
    builder: FsBuilder,
    image: PathBuf,
    archive: Option<File>,
    /// Folders and files by their path, for children and hard links.
    known: HashMap<PathBuf, InodeHandle>,
    contents: Vec<(InodeHandle, Content)>,
}

impl Tree {
    /// A tree that will be written to the new file `image`, a filesystem of `bytes` bytes.
    ///
    /// # Errors
    /// `bytes` is no size for an ext4 filesystem.
    pub fn new(image: &Path, bytes: u64) -> Result<Self> {
        let mut options = Options::new(bytes, *b"banger-test-host", 0);
        // The default ratio is generous for a large image and mean for a small one.
        options.inodes =
            InodeCount::Exact(u32::try_from(bytes / 32_768).unwrap_or(u32::MAX).max(4096));
        Ok(Self {
            builder: FsBuilder::new(options).map_err(Error::ext4(image))?,
            image: image.to_owned(),
            archive: None,
            known: HashMap::new(),
            contents: Vec::new(),
        })
    }

    /// Adds all of the tar archive `archive`, handing the ones for which `wanted` says so to `keep` as well.
    ///
    /// # Errors
    /// The archive cannot be read, or holds what ext4 cannot.
    pub fn add_archive(
        &mut self,
        archive: File,
        wanted: impl Fn(&Path) -> bool,
        mut keep: impl FnMut(&Path, Vec<u8>),
    ) -> Result<()> {
        let subject = Path::new("mmdebstrap's archive");
        let unreadable = || Error::io("read", subject);
        let mut reader = tar::Archive::new(archive.try_clone().map_err(unreadable())?);
        for entry in reader.entries_with_seek().map_err(unreadable())? {
            let mut entry = entry.map_err(unreadable())?;
            let path = normal(&entry.path().map_err(unreadable())?);
            let header = entry.header();
            let number = |value: std::io::Result<u64>| {
                value
                    .map(|value| u32::try_from(value).unwrap_or(0))
                    .map_err(unreadable())
            };
            let meta = Meta::new(
                u16::try_from(header.mode().map_err(unreadable())? & 0o7777).unwrap_or(0o755),
                number(header.uid())?,
                number(header.gid())?,
                (
                    i64::try_from(header.mtime().map_err(unreadable())?).unwrap_or(0),
                    0,
                ),
            );
            let target = match entry.link_name().map_err(unreadable())? {
                Some(target) => target.into_owned(),
                None => PathBuf::new(),
            };
            match header.entry_type() {
                tar::EntryType::Directory => {
                    self.folder(&path, meta)?;
                }
                tar::EntryType::Symlink => self.symlink(&path, &target, meta)?,
                tar::EntryType::Link => {
                    let existing = *self
                        .known
                        .get(&normal(&target))
                        .ok_or_else(|| Error::incomplete(target.display().to_string()))?;
                    let (parent, name) = self.place(&path)?;
                    self.builder
                        .hardlink(parent, &name, existing)
                        .map_err(Error::ext4(&self.image))?;
                }
                tar::EntryType::Regular => {
                    let bytes = entry.size();
                    let offset = entry.raw_file_position();
                    if wanted(&path) {
                        let mut content = Vec::new();
                        entry.read_to_end(&mut content).map_err(unreadable())?;
                        keep(&path, content);
                    }
                    self.declare(&path, meta, bytes, Content::Archive { offset, bytes })?;
                }
                kind @ (tar::EntryType::Char | tar::EntryType::Block) => {
                    let major = header.device_major().map_err(unreadable())?.unwrap_or(0);
                    let minor = header.device_minor().map_err(unreadable())?.unwrap_or(0);
                    let kind = if kind == tar::EntryType::Char {
                        SpecialKind::Char { major, minor }
                    } else {
                        SpecialKind::Block { major, minor }
                    };
                    let (parent, name) = self.place(&path)?;
                    self.builder
                        .mknod(parent, &name, meta, kind)
                        .map_err(Error::ext4(&self.image))?;
                }
                // Sockets and pipes are made by what uses them.
                _ => {}
            }
        }
        self.archive = Some(archive);
        Ok(())
    }

    /// Adds the file or folder `from`, with all that is in it, as `path`. Links are followed.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn add_path(&mut self, from: &Path, path: &Path) -> Result<()> {
        let metadata = std::fs::metadata(from).map_err(Error::io("read", from))?;
        if metadata.is_dir() {
            self.folder(path, folder_meta())?;
            let mut entries: Vec<_> = std::fs::read_dir(from)
                .and_then(Iterator::collect)
                .map_err(Error::io("list", from))?;
            entries.sort_by_key(std::fs::DirEntry::file_name);
            for entry in entries {
                self.add_path(&entry.path(), &path.join(entry.file_name()))?;
            }
            return Ok(());
        }
        let mode = u16::try_from(metadata.permissions().mode() & 0o777).unwrap_or(0o755);
        let meta = Meta::new(mode, 0, 0, (0, 0));
        self.declare(path, meta, metadata.len(), Content::File(from.to_owned()))
    }

    /// Adds a file of mode 0755 with this content.
    ///
    /// # Errors
    /// There is one by that path.
    pub fn add_bytes(&mut self, path: &Path, content: Vec<u8>) -> Result<()> {
        let bytes = content.len() as u64;
        self.declare(path, folder_meta(), bytes, Content::Bytes(content))
    }

    /// Writes the image.
    ///
    /// # Errors
    /// It cannot be written, or content is not what it was when it was declared.
    pub fn write(self) -> Result<()> {
        let failed = || Error::ext4(&self.image);
        let cannot_write = || Error::io("write", &self.image);
        let layout = self.builder.seal().map_err(failed())?;
        let mut sink = FileSink::create(&self.image, layout.image_len()).map_err(cannot_write())?;
        let mut writer = layout.writer(&mut sink).map_err(failed())?;
        let mut archive = self.archive;
        for (handle, content) in self.contents {
            match content {
                Content::Archive { offset, bytes } => {
                    let archive = archive
                        .as_mut()
                        .ok_or_else(|| Error::incomplete("archive"))?;
                    archive
                        .seek(SeekFrom::Start(offset))
                        .map_err(cannot_write())?;
                    writer.fill(handle, &mut archive.take(bytes))
                }
                Content::File(path) => {
                    let mut file = File::open(&path).map_err(Error::io("read", &path))?;
                    writer.fill(handle, &mut file)
                }
                Content::Bytes(bytes) => writer.fill(handle, &mut bytes.as_slice()),
            }
            .map_err(failed())?;
        }
        writer.finish().map_err(failed())?;
        Ok(())
    }

    fn declare(&mut self, path: &Path, meta: Meta, bytes: u64, content: Content) -> Result<()> {
        let (parent, name) = self.place(path)?;
        let handle = self
            .builder
            .file(parent, &name, meta, bytes)
            .map_err(Error::ext4(&self.image))?;
        self.known.insert(path.to_owned(), handle);
        if bytes > 0 {
            self.contents.push((handle, content));
        }
        Ok(())
    }

    fn symlink(&mut self, path: &Path, target: &Path, meta: Meta) -> Result<()> {
        let (parent, name) = self.place(path)?;
        self.builder
            .symlink(parent, &name, &target.to_string_lossy(), meta)
            .map_err(Error::ext4(&self.image))
            .map(|handle| {
                self.known.insert(path.to_owned(), handle);
            })
    }

    fn folder(&mut self, path: &Path, meta: Meta) -> Result<InodeHandle> {
        if path.as_os_str().is_empty() {
            return Ok(ROOT);
        }
        if let Some(&known) = self.known.get(path) {
            self.builder
                .set_meta(known, meta)
                .map_err(Error::ext4(&self.image))?;
            return Ok(known);
        }
        let (parent, name) = self.place(path)?;
        let handle = self
            .builder
            .mkdir(parent, &name, meta)
            .map_err(Error::ext4(&self.image))?;
        self.known.insert(path.to_owned(), handle);
        Ok(handle)
    }

    /// The folder that `path` is in, made if it is not there, and its name.
    fn place(&mut self, path: &Path) -> Result<(InodeHandle, String)> {
        let name = path
            .file_name()
            .ok_or_else(|| Error::incomplete(format!("name in `{}`", path.display())))?
            .to_string_lossy()
            .into_owned();
        let parent = path.parent().unwrap_or(Path::new("")).to_owned();
        let parent = match self.known.get(&parent) {
            Some(&known) => known,
            None => self.folder(&parent, folder_meta())?,
        };
        Ok((parent, name))
    }
}

fn folder_meta() -> Meta {
    Meta::new(0o755, 0, 0, (0, 0))
}

/// `./usr/bin/` and `/usr/bin` are `usr/bin`.
fn normal(path: &Path) -> PathBuf {
    path.components()
        .filter(|component| matches!(component, Component::Normal(_)))
        .collect()
}

/// A size for an image that holds `content` bytes in whole and has `room` bytes to spare.
pub(crate) fn image_bytes(content: u64, room: u64) -> u64 {
    // A twentieth is more than the metadata takes.
    (content + content / 20 + room).next_multiple_of(BLOCK_BYTES)
}

/// How much all files in `path` take.
///
/// # Errors
/// It cannot be read.
pub(crate) fn bytes_in(path: &Path) -> Result<u64> {
    let metadata = std::fs::metadata(path).map_err(Error::io("read", path))?;
    if !metadata.is_dir() {
        return Ok(metadata.len().next_multiple_of(BLOCK_BYTES));
    }
    let mut bytes = BLOCK_BYTES;
    for entry in std::fs::read_dir(path).map_err(Error::io("list", path))? {
        bytes += bytes_in(&entry.map_err(Error::io("list", path))?.path())?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_and_paths_become_a_clean_filesystem() {
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("a.tar");
        let mut builder = tar::Builder::new(File::create(&archive).unwrap());
        let mut header = tar::Header::new_gnu();
        header.set_size(5);
        header.set_mode(0o644);
        header.set_mtime(1);
        header.set_uid(0);
        header.set_gid(0);
        builder
            .append_data(&mut header, "./etc/hello", &b"hello"[..])
            .unwrap();
        header.set_entry_type(tar::EntryType::Link);
        header.set_size(0);
        builder
            .append_link(&mut header, "./etc/again", "./etc/hello")
            .unwrap();
        builder.finish().unwrap();

        let image = folder.path().join("a.ext4");
        let mut tree = Tree::new(&image, 16 << 20).unwrap();
        let mut kept = Vec::new();
        tree.add_archive(
            File::open(&archive).unwrap(),
            |path| path == Path::new("etc/hello"),
            |path, content| kept.push((path.to_owned(), content)),
        )
        .unwrap();
        tree.add_path(&archive, Path::new("deep/er/a.tar")).unwrap();
        tree.add_bytes(Path::new("run"), b"#!/bin/sh\n".to_vec())
            .unwrap();
        tree.write().unwrap();

        assert_eq!(kept, [(PathBuf::from("etc/hello"), b"hello".to_vec())]);
        match crate::run::output_of(crate::run::command("e2fsck").arg("-fn").arg(&image)) {
            Ok(said) => assert!(said.contains("a.ext4"), "{said}"),
            Err(Error::Program { reason, .. }) if reason.contains("No such file") => eprintln!(
                "SKIPPED: an_archive_and_paths_become_a_clean_filesystem: no e2fsck to check with"
            ),
            Err(error) => panic!("{}", error.report()),
        }
    }
}
