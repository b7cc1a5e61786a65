//! A filesystem tree that exists only as a list: names and metadata in memory, contents in the archives they came
//! from. Hostile archives can make it refuse, never write to the host.

use crate::context::Context;
use crate::error::BuildError;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// The most entries a tree may have.
const MAX_ENTRIES: usize = 1_000_000;
/// The longest path in bytes.
const MAX_PATH: usize = 4095;
/// The deepest path.
const MAX_DEPTH: usize = 100;
/// The most bytes all files of a tree may have together.
const MAX_BYTES: u64 = 64 << 30;

/// Where a file's content is.
#[derive(Debug, Clone)]
pub(crate) enum Content {
    /// In memory.
    Bytes(Arc<[u8]>),
    /// `length` bytes at `offset` of an open file.
    Spooled {
        file: Arc<File>,
        offset: u64,
        length: u64,
    },
}

impl Content {
    pub(crate) fn length(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Spooled { length, .. } => *length,
        }
    }

    pub(crate) fn reader(&self) -> Box<dyn Read + '_> {
        match self {
            Self::Bytes(bytes) => Box::new(&bytes[..]),
            Self::Spooled {
                file,
                offset,
                length,
            } => Box::new(SpoolReader {
                file,
                offset: *offset,
                left: *length,
            }),
        }
    }

    /// The whole content, if it has at most `limit` bytes.
    pub(crate) fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, BuildError> {
        if self.length() > limit {
            let reason = format!("{} bytes where at most {limit} make sense", self.length());
            return Err(BuildError::archive(name, reason));
        }
        let mut bytes = Vec::new();
        self.reader()
            .read_to_end(&mut bytes)
            .map_err(|error| BuildError::archive(name, error))?;
        Ok(bytes)
    }
}

struct SpoolReader<'a> {
    file: &'a File,
    offset: u64,
    left: u64,
}

impl Read for SpoolReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let wanted = buffer
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if wanted == 0 {
            return Ok(0);
        }
        let count = self.file.read_at(&mut buffer[..wanted], self.offset)?;
        if count == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        self.offset += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

/// What an entry is.
#[derive(Debug, Clone)]
pub(crate) enum Kind {
    Directory,
    File(Content),
    Symlink(String),
    /// Another name of the file at this path.
    HardLink(String),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

/// One entry of a tree.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    /// Permission bits.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since 1970.
    pub(crate) mtime: i64,
    pub(crate) xattrs: Vec<(String, Vec<u8>)>,
}

impl Entry {
    /// An entry of root's without extended attributes.
    pub(crate) fn new(kind: Kind, mode: u16, mtime: i64) -> Self {
        Self {
            kind,
            mode,
            uid: 0,
            gid: 0,
            mtime,
            xattrs: Vec::new(),
        }
    }
}

/// Paths, without a leading slash, and what is there. The root directory is the empty path. A parent sorts before
/// what is in it.
#[derive(Debug, Default, Clone)]
pub(crate) struct Tree {
    entries: BTreeMap<String, Entry>,
    bytes: u64,
}

impl Tree {
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.entries
            .iter()
            .map(|(path, entry)| (path.as_str(), entry))
    }

    pub(crate) fn get(&self, path: &str) -> Option<&Entry> {
        self.entries.get(path)
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The content of the file at `path`, also where it is a hard link.
    pub(crate) fn file(&self, path: &str) -> Option<&Content> {
        match &self.entries.get(path)?.kind {
            Kind::File(content) => Some(content),
            Kind::HardLink(target) => match &self.entries.get(target)?.kind {
                Kind::File(content) => Some(content),
                _ => None,
            },
            _ => None,
        }
    }

    /// Puts `entry` at `path` in place of what was there. Directories keep what is in them.
    pub(crate) fn insert(&mut self, path: &str, entry: Entry) {
        if !matches!(entry.kind, Kind::Directory) {
            self.remove(path);
        }
        if let Kind::File(content) = &entry.kind {
            self.bytes += content.length();
        }
        self.add_parents(path, entry.mtime);
        self.entries.insert(path.to_owned(), entry);
    }

    fn add_parents(&mut self, path: &str, mtime: i64) {
        for (at, _) in path.match_indices('/') {
            self.entries
                .entry(path[..at].to_owned())
                .or_insert_with(|| Entry::new(Kind::Directory, 0o755, mtime));
        }
        self.entries
            .entry(String::new())
            .or_insert_with(|| Entry::new(Kind::Directory, 0o755, mtime));
    }

    /// Puts a file with `content` at `path`.
    pub(crate) fn write(&mut self, path: &str, mode: u16, mtime: i64, content: impl Into<Vec<u8>>) {
        let content = Content::Bytes(content.into().into());
        self.insert(path, Entry::new(Kind::File(content), mode, mtime));
    }

    /// Makes sure of a directory at `path`; one that is there keeps its metadata.
    pub(crate) fn directory(&mut self, path: &str, mode: u16, mtime: i64) {
        if !matches!(self.get(path), Some(entry) if matches!(entry.kind, Kind::Directory)) {
            self.insert(path, Entry::new(Kind::Directory, mode, mtime));
        }
    }

    /// Puts a symbolic link to `target` at `path`.
    pub(crate) fn symlink(&mut self, path: &str, target: &str, mtime: i64) {
        self.insert(
            path,
            Entry::new(Kind::Symlink(target.to_owned()), 0o777, mtime),
        );
    }

    /// Removes what is at `path` with all that is in it. A file that has other names lives on under them.
    pub(crate) fn remove(&mut self, path: &str) {
        let inside = format!("{path}/");
        let doomed: Vec<String> = self
            .entries
            .range(inside.clone()..)
            .take_while(|(other, _)| other.starts_with(&inside))
            .map(|(other, _)| other.clone())
            .chain(self.entries.contains_key(path).then(|| path.to_owned()))
            .collect();
        let mut files = Vec::new();
        for path in doomed {
            if let Some(entry) = self.entries.remove(&path)
                && let Kind::File(content) = &entry.kind
            {
                self.bytes = self.bytes.saturating_sub(content.length());
                files.push((path, entry));
            }
        }
        for (path, entry) in files {
            self.rehome(&path, entry);
        }
    }

    /// Gives a file whose first name is gone to its next name.
    fn rehome(&mut self, gone: &str, entry: Entry) {
        let mut names = self
            .entries
            .iter_mut()
            .filter(|(_, other)| matches!(&other.kind, Kind::HardLink(target) if target == gone));
        let Some((heir, slot)) = names.next() else {
            return;
        };
        let heir = heir.clone();
        *slot = entry;
        for (_, other) in names {
            other.kind = Kind::HardLink(heir.clone());
        }
        if let Some(Kind::File(content)) = self.entries.get(&heir).map(|e| &e.kind) {
            self.bytes += content.length();
        }
    }

    /// Moves what is below `prefix` to the root of a new tree.
    pub(crate) fn subtree(&self, prefix: &str) -> Self {
        let inside = format!("{prefix}/");
        let mut tree = Self::default();
        for (path, entry) in self.entries.range(inside.clone()..) {
            let Some(rest) = path.strip_prefix(&inside) else {
                break;
            };
            let mut entry = entry.clone();
            if let Kind::HardLink(target) = &mut entry.kind {
                match target.strip_prefix(&inside) {
                    Some(inner) => *target = inner.to_owned(),
                    None => match self.file(path) {
                        Some(content) => entry.kind = Kind::File(content.clone()),
                        None => continue,
                    },
                }
            }
            tree.insert(rest, entry);
        }
        tree
    }

    /// Adds every entry of the uncompressed tar archive in `file`; `name` is for errors. What comes later replaces
    /// what was there.
    pub(crate) fn add_tar(
        &mut self,
        file: &Arc<File>,
        name: &str,
        context: &Context,
    ) -> Result<(), BuildError> {
        let bad = |reason: &dyn std::fmt::Display| BuildError::archive(name, reason);
        let end = file.metadata().map_err(|error| bad(&error))?.len();
        // Its cursor stands where it was last written.
        let mut reader: &File = file;
        std::io::Seek::rewind(&mut reader).map_err(|error| bad(&error))?;
        let mut archive = tar::Archive::new(reader);
        let entries = archive.entries_with_seek().map_err(|error| bad(&error))?;
        for entry in entries {
            context.check()?;
            let mut entry = entry.map_err(|error| bad(&error))?;
            let path = clean(&entry.path_bytes()).map_err(|reason| bad(&reason))?;
            let header = entry.header();
            let kind = header.entry_type();
            let number = |value: std::io::Result<u64>| -> Result<u32, BuildError> {
                let value = value.map_err(|error| bad(&error))?;
                u32::try_from(value)
                    .map_err(|_| bad(&format!("`{path}` has an owner beyond 32 bits")))
            };
            let mut made = Entry::new(Kind::Directory, 0, 0);
            made.mode = (header.mode().map_err(|error| bad(&error))? & 0o7777) as u16;
            made.uid = number(header.uid())?;
            made.gid = number(header.gid())?;
            made.mtime = i64::try_from(header.mtime().unwrap_or(0))
                .unwrap_or(0)
                .min(MAX_TIME);
            let device = || -> Option<(u32, u32)> {
                Some((header.device_major().ok()??, header.device_minor().ok()??))
            };
            let no_device = || bad(&format!("`{path}` is a device without numbers"));
            let link = || -> Result<Vec<u8>, BuildError> {
                let target = entry.link_name_bytes().map(|target| target.into_owned());
                target.ok_or_else(|| bad(&format!("`{path}` is a link to nowhere")))
            };
            made.kind = match kind {
                tar::EntryType::Directory => Kind::Directory,
                tar::EntryType::Regular | tar::EntryType::Continuous => {
                    let (offset, length) = (entry.raw_file_position(), entry.size());
                    if offset.checked_add(length).is_none_or(|after| after > end) {
                        return Err(bad(&format!("`{path}` is cut off")));
                    }
                    Kind::File(Content::Spooled {
                        file: Arc::clone(file),
                        offset,
                        length,
                    })
                }
                tar::EntryType::Symlink => {
                    let target = String::from_utf8(link()?).map_err(|_| {
                        bad(&format!("`{path}` is a link to a name that is not UTF-8"))
                    })?;
                    if target.is_empty() || target.len() > MAX_PATH {
                        return Err(bad(&format!("`{path}` is a link to nowhere")));
                    }
                    Kind::Symlink(target)
                }
                tar::EntryType::Link => {
                    let target = clean(&link()?).map_err(|reason| bad(&reason))?;
                    match self.entries.get(&target).map(|entry| &entry.kind) {
                        Some(Kind::File(_)) if target != path => Kind::HardLink(target),
                        Some(Kind::HardLink(first)) if *first != path => {
                            Kind::HardLink(first.clone())
                        }
                        _ => {
                            let reason = format!(
                                "`{path}` is a hard link to `{target}`, which is no earlier file"
                            );
                            return Err(bad(&reason));
                        }
                    }
                }
                tar::EntryType::Char => {
                    let (major, minor) = device().ok_or_else(no_device)?;
                    Kind::CharDevice(major, minor)
                }
                tar::EntryType::Block => {
                    let (major, minor) = device().ok_or_else(no_device)?;
                    Kind::BlockDevice(major, minor)
                }
                tar::EntryType::Fifo => Kind::Fifo,
                tar::EntryType::XGlobalHeader => continue,
                other => {
                    return Err(bad(&format!(
                        "`{path}` has the unknown type {:?}",
                        other.as_byte() as char
                    )));
                }
            };
            made.xattrs = xattrs(&mut entry).map_err(|error| bad(&error))?;
            self.check_parents(&path).map_err(|reason| bad(&reason))?;
            let replaces_full_directory = !matches!(made.kind, Kind::Directory)
                && matches!(self.get(&path), Some(old) if matches!(old.kind, Kind::Directory));
            if replaces_full_directory {
                return Err(bad(&format!(
                    "`{path}` is first a directory and then something else"
                )));
            }
            if matches!(made.kind, Kind::Directory)
                && matches!(self.get(&path), Some(old) if !matches!(old.kind, Kind::Directory))
            {
                return Err(bad(&format!("`{path}` becomes a directory")));
            }
            self.insert(&path, made);
            if self.entries.len() > MAX_ENTRIES || self.bytes > MAX_BYTES {
                return Err(bad(&"it holds more files than an image may have"));
            }
        }
        Ok(())
    }

    fn check_parents(&self, path: &str) -> Result<(), String> {
        for (at, _) in path.match_indices('/') {
            match self.entries.get(&path[..at]).map(|entry| &entry.kind) {
                None | Some(Kind::Directory) => {}
                Some(_) => {
                    return Err(format!(
                        "`{path}` lies below something that is no directory"
                    ));
                }
            }
        }
        Ok(())
    }
}

/// The last second that an ext4 superblock's own fields can hold.
const MAX_TIME: i64 = u32::MAX as i64;

/// A path of an archive as a path below the root: `./a//b/` is `a/b`. Absolute paths and `..` are refused.
pub(crate) fn clean(path: &[u8]) -> Result<String, String> {
    let shown = String::from_utf8_lossy(path)
        .escape_debug()
        .take(80)
        .collect::<String>();
    let path = std::str::from_utf8(path).map_err(|_| format!("the name `{shown}` is not UTF-8"))?;
    if path.starts_with('/') {
        return Err(format!("`{shown}` is an absolute name"));
    }
    if path.len() > MAX_PATH {
        return Err(format!("the name `{shown}`… is too long"));
    }
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => return Err(format!("`{shown}` leads out of the archive")),
            part if part.len() > 255 || part.contains('\0') => {
                return Err(format!("the name `{shown}`… is not allowed"));
            }
            part => parts.push(part),
        }
    }
    if parts.len() > MAX_DEPTH {
        return Err(format!("`{shown}`… is too deep"));
    }
    Ok(parts.join("/"))
}

fn xattrs<R: Read>(entry: &mut tar::Entry<'_, R>) -> std::io::Result<Vec<(String, Vec<u8>)>> {
    let mut found = Vec::new();
    let Some(extensions) = entry.pax_extensions()? else {
        return Ok(found);
    };
    for extension in extensions {
        let extension = extension?;
        let Ok(key) = extension.key() else { continue };
        // Access control lists have an encoding of their own and no place in an image.
        if let Some(name) = key.strip_prefix("SCHILY.xattr.")
            && (name == "security.capability" || name.starts_with("user."))
        {
            found.push((name.to_owned(), capability(name, extension.value_bytes())));
        }
    }
    Ok(found)
}

/// A capability set inside a user namespace (revision 3) names that namespace's root; in the image it is root.
fn capability(name: &str, value: &[u8]) -> Vec<u8> {
    const REVISION_2: u8 = 2;
    const REVISION_3: u8 = 3;
    let mut value = value.to_vec();
    if name == "security.capability" && value.len() == 24 && value[3] == REVISION_3 {
        value.truncate(20);
        value[3] = REVISION_2;
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spool(bytes: &[u8]) -> Arc<File> {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        Arc::new(file)
    }

    fn header(path: &str, kind: tar::EntryType, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(0o4755);
        header.set_uid(7);
        header.set_gid(8);
        header.set_mtime(9);
        header.set_size(size);
        header.set_cksum();
        header
    }

    fn archive(entries: &[(&str, tar::EntryType, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, kind, text) in entries {
            let is_link = matches!(kind, tar::EntryType::Link | tar::EntryType::Symlink);
            let content = if is_link { "" } else { text };
            let mut header = header(path, *kind, content.len() as u64);
            if is_link {
                header.as_old_mut().linkname[..text.len()].copy_from_slice(text.as_bytes());
                header.set_cksum();
            }
            builder.append(&header, content.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn read(bytes: &[u8]) -> Result<Tree, BuildError> {
        let mut tree = Tree::default();
        tree.add_tar(&spool(bytes), "test.tar", &Context::quiet("/nonexistent"))?;
        Ok(tree)
    }

    use tar::EntryType::{Directory, Link, Regular, Symlink};

    #[test]
    fn an_archive_becomes_a_tree_with_owners_and_modes() {
        let tree = read(&archive(&[
            ("./", Directory, ""),
            ("./bin/", Directory, ""),
            ("./bin/a", Regular, "hello"),
            ("./bin/b", Link, "./bin/a"),
            ("./bin/c", Symlink, "../../../etc/passwd"),
        ]))
        .unwrap();
        let entry = tree.get("bin/a").unwrap();
        assert_eq!(
            (entry.mode, entry.uid, entry.gid, entry.mtime),
            (0o4755, 7, 8, 9)
        );
        assert_eq!(tree.file("bin/b").unwrap().read("", 10).unwrap(), b"hello");
        assert!(matches!(&tree.get("bin/c").unwrap().kind, Kind::Symlink(_)));
    }

    #[test]
    fn names_that_lead_out_of_the_archive_are_refused() {
        for name in ["../evil", "a/../../evil", "/etc/evil"] {
            let error = read(&archive(&[(name, Regular, "x")])).unwrap_err();
            assert!(matches!(error, BuildError::BadArchive { .. }), "{name}");
        }
        let error = read(&archive(&[("a", Link, "../../etc/shadow")])).unwrap_err();
        assert!(error.to_string().contains("leads out"), "{error}");
    }

    #[test]
    fn nothing_may_lie_below_a_link_or_replace_a_directory() {
        let below = archive(&[("a", Symlink, "/etc"), ("a/passwd", Regular, "x")]);
        assert!(read(&below).is_err());
        let replaced = archive(&[("a/b", Regular, "x"), ("a", Symlink, "/etc")]);
        assert!(read(&replaced).is_err());
        let dangling = archive(&[("a", Link, "b")]);
        assert!(read(&dangling).is_err());
        let itself = archive(&[("a", Regular, "x"), ("a", Link, "a")]);
        assert!(read(&itself).is_err());
    }

    #[test]
    fn a_size_beyond_the_archive_is_refused() {
        for size in [513, 1 << 40, u64::MAX / 2] {
            let mut bytes = header("huge", Regular, size).as_bytes().to_vec();
            bytes.resize(1024, 0);
            assert!(read(&bytes).is_err(), "{size}");
        }
    }

    #[test]
    fn noise_is_refused() {
        assert!(read(&[0x5a; 2048]).is_err());
        assert_eq!(read(&[]).unwrap().len(), 0);
    }

    #[test]
    fn removing_the_first_name_of_a_file_keeps_the_others() {
        let mut tree = Tree::default();
        tree.write("a", 0o644, 1, "text");
        for name in ["b", "c"] {
            tree.insert(name, Entry::new(Kind::HardLink("a".to_owned()), 0o644, 1));
        }
        tree.remove("a");
        assert!(tree.get("a").is_none());
        assert_eq!(tree.file("b").unwrap().read("", 10).unwrap(), b"text");
        assert_eq!(tree.file("c").unwrap().read("", 10).unwrap(), b"text");
    }

    #[test]
    fn removing_a_directory_spares_names_that_only_start_alike() {
        let mut tree = Tree::default();
        for path in ["doc/a", "doc-base/b", "doc.txt", "doc/c/d"] {
            tree.write(path, 0o644, 1, "");
        }
        tree.remove("doc");
        let left: Vec<&str> = tree.entries().map(|(path, _)| path).collect();
        assert_eq!(left, ["", "doc-base", "doc-base/b", "doc.txt"]);
    }

    #[test]
    fn a_capability_made_in_a_user_namespace_becomes_roots() {
        let mut value = vec![0u8; 24];
        value[0] = 1;
        value[3] = 3;
        let plain = capability("security.capability", &value);
        assert_eq!((plain.len(), plain[0], plain[3]), (20, 1, 2));
        assert_eq!(capability("user.x", &value), value);
    }
}
