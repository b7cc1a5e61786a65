//! Growing an ext4 that nobody uses: its file, then the filesystem in it. What is broken off is taken back, so the old
//! filesystem is there or the new one, and its files are in either.

use crate::context::Context;
use crate::error::BuildError;
use crate::run::{Outcome, Program, printable};
use crate::template::read_ext4_bytes;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Checking reads all of a filesystem's metadata.
const LIMIT: Duration = Duration::from_secs(600);

/// Grows the ext4 in the file at `path`, which nobody may be using, to `bytes` bytes; also one that is full. Durable
/// when this returns.
///
/// # Errors
/// It would shrink, it is damaged beyond what a check mends by itself, or a program is missing or fails; the
/// filesystem is then as it was.
pub fn grow_ext4(path: &Path, bytes: u64, context: &Context) -> Result<(), BuildError> {
    settle_ext4(path, context)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(BuildError::io("open", path))?;
    let before = file
        .metadata()
        .map_err(BuildError::io("measure", path))?
        .len();
    let holds = read_ext4_bytes(path)?;
    // What the file has beyond its filesystem holds nothing.
    if bytes < holds {
        return Err(BuildError::Shrink {
            path: path.to_owned(),
            from: holds,
            to: bytes,
        });
    }
    if (before, holds) == (bytes, bytes) {
        return Ok(());
    }
    mend(path, context)?;
    let undo = undo_of(path);
    let grown = file
        .set_len(bytes)
        .map_err(BuildError::io("grow", path))
        .and_then(|()| {
            let arguments = [OsString::from("-z"), undo.clone().into(), path.into()];
            program("resize2fs", arguments.into())
                .succeed(context)
                .map(drop)
        });
    if let Err(error) = grown {
        // The first failure is what counts; a start settles it again.
        let _ = settle_ext4(path, context);
        let _ = file.set_len(before);
        return Err(error);
    }
    file.sync_all().map_err(BuildError::io("sync", path))?;
    match std::fs::remove_file(&undo) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(BuildError::io("remove", &undo)(error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Takes back a growth that was broken off. Nothing happens if there is none.
///
/// # Errors
/// `e2undo` is missing or fails; the filesystem must not be used then.
pub fn settle_ext4(path: &Path, context: &Context) -> Result<(), BuildError> {
    let undo = undo_of(path);
    match std::fs::metadata(&undo) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(BuildError::io("measure", &undo)(error)),
        // It has no header yet, so nothing was overwritten.
        Ok(facts) if facts.len() == 0 => {}
        Ok(_) => {
            let arguments = [OsString::from("-f"), undo.clone().into(), path.into()];
            program("e2undo", arguments.into()).succeed(context)?;
            File::open(path)
                .and_then(|file| file.sync_all())
                .map_err(BuildError::io("sync", path))?;
        }
    }
    std::fs::remove_file(&undo).map_err(BuildError::io("remove", &undo))
}

fn undo_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".undo");
    name.into()
}

/// Replays the journal and mends what needs no decision.
fn mend(path: &Path, context: &Context) -> Result<(), BuildError> {
    let outcome = program("e2fsck", ["-f".into(), "-p".into(), path.into()].into()).run(context)?;
    // 1 says that something was mended.
    match outcome.status.code() {
        Some(0 | 1) => Ok(()),
        _ => Err(BuildError::NotClean {
            path: path.to_owned(),
            output: said(&outcome),
        }),
    }
}

fn said(outcome: &Outcome) -> String {
    let said = printable(&outcome.stdout);
    let skip = said.chars().count().saturating_sub(600);
    said.chars().skip(skip).collect()
}

fn program(name: &'static str, arguments: Vec<OsString>) -> Program<'static> {
    Program {
        name,
        package: "e2fsprogs",
        arguments,
        folder: None,
        environment: Vec::new(),
        limit: LIMIT,
        stage: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::{clone_empty_ext4, ensure_empty_ext4};
    use uuid::Uuid;

    const MIB: u64 = 1 << 20;

    struct Disk {
        folder: tempfile::TempDir,
        context: Context,
        content: Vec<u8>,
    }

    /// A disk of 32 MiB that is as full as it gets, or nothing, said, without the programs.
    fn full(test: &str) -> Option<Disk> {
        for tool in ["mke2fs", "e2fsck", "resize2fs", "e2undo", "debugfs"] {
            if crate::run::find(tool).is_none() {
                eprintln!("SKIPPED: {test}: {tool} is not installed");
                return None;
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let context = Context::quiet(folder.path().join("cache"));
        let template = ensure_empty_ext4(32 * MIB, &context).unwrap();
        let disk = Disk {
            content: (0..20 * MIB).map(|n| (n / 251 % 256) as u8).collect(),
            folder,
            context,
        };
        clone_empty_ext4(&template, &disk.path(), Uuid::now_v7()).unwrap();
        disk.put("content", &disk.content);
        // Ends when there is no room left.
        for number in 0..64 {
            disk.put(&format!("filler-{number}"), &vec![number; MIB as usize]);
        }
        Some(disk)
    }

    impl Disk {
        fn path(&self) -> PathBuf {
            self.folder.path().join("disk.img")
        }

        fn debugfs(&self, request: &str) {
            let arguments = ["-w".into(), "-R".into(), request.into(), self.path().into()];
            program("debugfs", arguments.into())
                .succeed(&self.context)
                .unwrap();
        }

        fn put(&self, name: &str, content: &[u8]) {
            let source = self.folder.path().join("source");
            std::fs::write(&source, content).unwrap();
            self.debugfs(&format!("write {} {name}", source.display()));
        }

        fn get(&self, name: &str) -> Vec<u8> {
            let target = self.folder.path().join("target");
            self.debugfs(&format!("dump {name} {}", target.display()));
            std::fs::read(target).unwrap()
        }

        fn is_whole(&self, bytes: u64) {
            crate::ext4::check(&self.path(), &self.context).unwrap();
            assert_eq!(read_ext4_bytes(&self.path()).unwrap(), bytes);
            assert!(self.get("content") == self.content);
            assert!(!undo_of(&self.path()).exists());
        }
    }

    #[test]
    fn a_full_disk_grows_and_loses_nothing() {
        let Some(disk) = full("a_full_disk_grows_and_loses_nothing") else {
            return;
        };
        for size in [64 * MIB, 2048 * MIB] {
            grow_ext4(&disk.path(), size, &disk.context).unwrap();
            disk.is_whole(size);
            assert_eq!(disk.path().metadata().unwrap().len(), size);
        }
        let more = vec![9; 40 * MIB as usize];
        disk.put("more", &more);
        assert!(disk.get("more") == more);
        // Again is a success and changes nothing.
        grow_ext4(&disk.path(), 2048 * MIB, &disk.context).unwrap();
    }

    #[test]
    fn a_disk_never_shrinks() {
        let Some(disk) = full("a_disk_never_shrinks") else {
            return;
        };
        let error = grow_ext4(&disk.path(), 16 * MIB, &disk.context).unwrap_err();
        assert!(matches!(error, BuildError::Shrink { .. }), "{error}");
        assert!(error.to_string().contains("disk.img"), "{error}");
        disk.is_whole(32 * MIB);
    }

    #[test]
    fn a_growth_that_was_broken_off_is_taken_back() {
        let Some(disk) = full("a_growth_that_was_broken_off_is_taken_back") else {
            return;
        };
        // As after a kill before the last step: the filesystem is new and half written, the undo file is there.
        OpenOptions::new()
            .write(true)
            .open(disk.path())
            .unwrap()
            .set_len(256 * MIB)
            .unwrap();
        let undo = undo_of(&disk.path());
        let arguments = ["-z".into(), undo.clone().into(), disk.path().into()];
        program("resize2fs", arguments.into())
            .succeed(&disk.context)
            .unwrap();
        assert!(undo.exists());
        settle_ext4(&disk.path(), &disk.context).unwrap();
        disk.is_whole(32 * MIB);
        std::fs::write(&undo, "").unwrap();
        grow_ext4(&disk.path(), 128 * MIB, &disk.context).unwrap();
        disk.is_whole(128 * MIB);
    }

    #[test]
    fn what_a_check_cannot_mend_by_itself_is_not_grown() {
        let Some(disk) = full("what_a_check_cannot_mend_by_itself_is_not_grown") else {
            return;
        };
        disk.debugfs("clri <2>");
        let error = grow_ext4(&disk.path(), 64 * MIB, &disk.context).unwrap_err();
        assert!(matches!(error, BuildError::NotClean { .. }), "{error}");
        assert_eq!(disk.path().metadata().unwrap().len(), 32 * MIB);
    }
}
