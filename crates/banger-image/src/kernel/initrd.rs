//! Banger's initrd: a cpio archive of directories, modules and `banger-init`, uncompressed.

use cpio::newc;
use std::io;

/// The directories that `banger-init` mounts on or writes to, and that of the modules.
const DIRECTORIES: [&str; 7] = ["dev", "modules", "newroot", "proc", "run", "sys", "tmp"];
/// Archives appended to the initrd are only found at a multiple of 4; this is what loaders like.
const ALIGNMENT: usize = 512;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;

/// The part of the initrd that does not depend on `banger-init`: `modules` are file names and contents in load order.
pub(crate) fn base(modules: &[(String, Vec<u8>)]) -> io::Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in DIRECTORIES {
        archive.add(directory, DIRECTORY | 0o755, &[])?;
    }
    let mut load = String::new();
    for (name, content) in modules {
        load.push_str(name);
        load.push('\n');
        archive.add(&format!("modules/{name}"), REGULAR | 0o644, content)?;
    }
    archive.add("modules/load", REGULAR | 0o644, load.as_bytes())?;
    Ok(archive.bytes)
}

/// The end of the initrd: `banger-init` as `/init`, and the archive's trailer.
pub(crate) fn tail(base_length: usize, init: &[u8]) -> io::Result<Vec<u8>> {
    let mut archive = Archive {
        bytes: Vec::new(),
        inode: u32::MAX / 2,
    };
    archive.add("init", REGULAR | 0o755, init)?;
    let mut bytes = newc::trailer(archive.bytes)?;
    let length = base_length + bytes.len();
    bytes.resize(bytes.len() + length.next_multiple_of(ALIGNMENT) - length, 0);
    Ok(bytes)
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let length = u32::try_from(content.len()).map_err(io::Error::other)?;
        self.inode += 1;
        let entry = newc::Builder::new(name)
            .ino(self.inode)
            .mode(mode)
            .nlink(1)
            .mtime(0);
        let mut writer = entry.write(std::mem::take(&mut self.bytes), length);
        io::Write::write_all(&mut writer, content)?;
        self.bytes = writer.finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut left = archive;
        let mut found = Vec::new();
        loop {
            let mut reader = newc::Reader::new(left).unwrap();
            if reader.entry().is_trailer() {
                return found;
            }
            let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
            let mut content = Vec::new();
            io::Read::read_to_end(&mut reader, &mut content).unwrap();
            found.push((name, mode, content));
            left = reader.finish().unwrap();
        }
    }

    fn initrd(init: &[u8]) -> Vec<u8> {
        let modules = [
            ("virtio.ko", b"one".to_vec()),
            ("ext4.ko", b"three".to_vec()),
        ]
        .map(|(name, content)| (name.to_owned(), content));
        let mut archive = base(&modules).unwrap();
        archive.extend(tail(archive.len(), init).unwrap());
        archive
    }

    #[test]
    fn an_initrd_has_directories_first_and_modules_in_load_order() {
        let entries = list(&initrd(b"program"));
        let names: Vec<&str> = entries.iter().map(|entry| entry.0.as_str()).collect();
        assert_eq!(names[..7], DIRECTORIES);
        assert_eq!(
            names[7..],
            [
                "modules/virtio.ko",
                "modules/ext4.ko",
                "modules/load",
                "init"
            ]
        );
        assert_eq!(entries[9].2, b"virtio.ko\next4.ko\n");
        assert_eq!(
            (entries[10].1, &entries[10].2[..]),
            (0o100_755, &b"program"[..])
        );
    }

    #[test]
    fn an_initrd_is_the_same_every_time_and_padded_for_appending() {
        for length in 0..9 {
            let init = vec![1; length];
            assert_eq!(initrd(&init), initrd(&init));
            assert_eq!(initrd(&init).len() % ALIGNMENT, 0);
        }
    }
}
