//! What the machine remembers of our objects between two operations: one file per instance, and one of the devices
//! that forward for our sake. In `/run`, so that it goes with the objects at a reboot.

use super::tag::Tag;
use crate::crash::step;
use banger_core::addr::Pool;
use banger_core::id::InstanceId;
use rustix::fs::{FlockOperation, Mode, OFlags};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const LOCK: &str = "lock";
const FORWARDING: &str = "forwarding.json";

/// The facts could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// A file or the folder.
    #[error("cannot use `{}`", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody else could write there.
    #[error("`{}` is not a folder that only its owner, uid {uid}, can write", path.display())]
    Unsafe {
        /// The folder.
        path: PathBuf,
        /// Who should own it.
        uid: u32,
    },
}

/// What is known of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) uid: u32,
    pub(super) instance: InstanceId,
    pub(super) pool: Pool,
    /// NAT is wanted.
    pub(super) nat: bool,
    /// The table as it was when it was whole.
    pub(super) table: Option<TableMark>,
    /// The name server that systemd-resolved was told.
    pub(super) dns: Option<Ipv4Addr>,
}

/// The table that was loaded, and what it looked like then.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TableMark {
    pub(super) uplinks: Vec<String>,
    pub(super) lent: Vec<String>,
    pub(super) checksum: u32,
    /// Of the file that its rules are made from: another version of us has others.
    #[serde(default)]
    pub(super) made_from: u32,
}

/// A device that did not forward before us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lent {
    /// Its number: another device of the same name is not it.
    pub(super) index: u32,
    /// Whether the host was a router as a whole when it was taken.
    pub(super) everywhere: bool,
}

impl Record {
    pub(super) fn tag(&self) -> Tag {
        Tag {
            uid: self.uid,
            instance: self.instance,
        }
    }
}

/// The facts, held by one operation at a time on the whole machine.
#[derive(Debug)]
pub(super) struct Ledger {
    folder: PathBuf,
    /// Whoever has it open keeps others waiting.
    pub(super) lock: Arc<File>,
}

impl Ledger {
    /// Makes the folder if need be, and waits for other operations to end.
    pub(super) fn open(folder: &Path) -> Result<Self, LedgerError> {
        let failed = |source| LedgerError::Io {
            path: folder.to_owned(),
            source,
        };
        match std::fs::DirBuilder::new().mode(0o700).create(folder) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(error)),
        }
        let facts = std::fs::symlink_metadata(folder).map_err(failed)?;
        let uid = rustix::process::geteuid().as_raw();
        if !facts.is_dir() || facts.uid() != uid || facts.mode() & 0o022 != 0 {
            return Err(LedgerError::Unsafe {
                path: folder.to_owned(),
                uid,
            });
        }
        let path = folder.join(LOCK);
        let failed = |source| LedgerError::Io {
            path: path.clone(),
            source,
        };
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let lock = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| failed(errno.into()))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)
            .map_err(|errno| failed(errno.into()))?;
        Ok(Self {
            folder: folder.to_owned(),
            lock: Arc::new(lock.into()),
        })
    }

    fn record_path(&self, instance: InstanceId) -> PathBuf {
        self.folder.join(format!("{instance}.json"))
    }

    /// All instances. What cannot be read is nobody's, and stays for a person to look at.
    pub(super) fn records(&self) -> Result<Vec<Record>, LedgerError> {
        let failed = |source| LedgerError::Io {
            path: self.folder.clone(),
            source,
        };
        let mut records = Vec::new();
        for entry in std::fs::read_dir(&self.folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let name = path.file_name().and_then(std::ffi::OsStr::to_str);
            // Not those that a killed process left half written.
            let stem = name.and_then(|name| name.strip_suffix(".json"));
            let Some(instance) = stem.and_then(|stem| stem.parse::<InstanceId>().ok()) else {
                continue;
            };
            match read::<Record>(&path)? {
                Some(record) if record.instance == instance => records.push(record),
                _ => tracing::warn!("`{}` is not understood", path.display()),
            }
        }
        records.sort_unstable_by_key(|record| (record.uid, record.instance));
        Ok(records)
    }

    pub(super) fn save(&self, record: &Record) -> Result<(), LedgerError> {
        step("record", || {
            self.write(&self.record_path(record.instance), record)
        })
    }

    pub(super) fn forget(&self, instance: InstanceId) -> Result<(), LedgerError> {
        step("forget", || self.remove(instance))
    }

    fn remove(&self, instance: InstanceId) -> Result<(), LedgerError> {
        let record = self.record_path(instance);
        for path in [partial(&record), record] {
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(LedgerError::Io { path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The devices that forward for our sake.
    pub(super) fn lent(&self) -> Result<BTreeMap<String, Lent>, LedgerError> {
        Ok(read(&self.folder.join(FORWARDING))?.unwrap_or_default())
    }

    pub(super) fn save_lent(&self, lent: &BTreeMap<String, Lent>) -> Result<(), LedgerError> {
        step("lent", || self.write(&self.folder.join(FORWARDING), lent))
    }

    /// Replaces a file as a whole. No fsync: the folder does not outlive the kernel.
    fn write(&self, path: &Path, facts: &impl Serialize) -> Result<(), LedgerError> {
        let failed = |source| LedgerError::Io {
            path: path.to_owned(),
            source,
        };
        let bytes = serde_json::to_vec(facts).map_err(|error| failed(error.into()))?;
        let partial = partial(path);
        File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&partial)
            .and_then(|mut file| file.write_all(&bytes))
            .map_err(failed)?;
        std::fs::rename(&partial, path).map_err(failed)
    }
}

/// Where a file's next content is written before it takes its place.
fn partial(path: &Path) -> PathBuf {
    path.with_extension("partial")
}

/// The facts in a file; nothing if it is not there or not understood.
fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, LedgerError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(LedgerError::Io {
            path: path.to_owned(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn record() -> Record {
        Record {
            uid: 1000,
            instance: "0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a".parse().unwrap(),
            pool: Pool::at(Ipv4Addr::new(172, 16, 16, 0)),
            nat: true,
            table: Some(TableMark::default()),
            dns: None,
        }
    }

    #[test]
    fn what_is_saved_is_found_again_and_what_is_damaged_is_passed_over() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().join("banger");
        let ledger = Ledger::open(&folder).unwrap();
        assert_eq!(ledger.records().unwrap(), []);
        ledger.save(&record()).unwrap();
        std::fs::write(
            folder.join("0198c2a4-7d1e-7b3a-9c4d-000000000000.json"),
            "{\"uid\":",
        )
        .unwrap();
        // What a process left that was killed between writing and renaming.
        let partial = folder.join(format!("{}.partial", record().instance));
        std::fs::copy(ledger.record_path(record().instance), &partial).unwrap();
        assert_eq!(ledger.records().unwrap(), [record()]);
        ledger.forget(record().instance).unwrap();
        assert!(!partial.exists());
        ledger.forget(record().instance).unwrap();
        assert_eq!(ledger.records().unwrap(), []);
    }

    #[test]
    fn a_folder_that_others_can_write_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().join("banger");
        std::fs::create_dir(&folder).unwrap();
        std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o777)).unwrap();
        assert!(matches!(
            Ledger::open(&folder),
            Err(LedgerError::Unsafe { .. })
        ));
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(directory.path(), &link).unwrap();
        assert!(matches!(
            Ledger::open(&link),
            Err(LedgerError::Unsafe { .. })
        ));
    }
}
