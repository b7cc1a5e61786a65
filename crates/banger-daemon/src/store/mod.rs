//! The database: the only place that speaks SQL.
//!
//! One thread owns two connections. On the first every commit waits for the disk: what it has answered is durable.
//! The second carries the journal, which is best effort and waits for nothing.

mod journal;
mod rows;
mod schema;

pub(crate) use schema::SCHEMA_VERSION;

use crate::images::{Bundle, ImageRecord, KernelRecord, Manifest};
use crate::record::VmRecord;
use banger_api::vm::JournalEntry;
use banger_core::id::VmId;
use rusqlite::Connection;
use std::path::{Path, PathBuf};
use tokio::sync::{mpsc, oneshot};

/// Jobs that may wait for the database's thread.
const QUEUE: usize = 256;

/// Why the database cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("the database `{}` was written by a newer banger (schema {found}, this one knows {known})", path.display())]
    Newer {
        path: PathBuf,
        found: u64,
        known: u64,
    },
    #[error("the database `{}` cannot be {action}", path.display())]
    Sql {
        path: PathBuf,
        action: &'static str,
        #[source]
        source: rusqlite::Error,
    },
    #[error("the database `{}` cannot be brought to schema {known}", path.display())]
    Migrate {
        path: PathBuf,
        known: u64,
        #[source]
        source: Box<rusqlite_migration::Error>,
    },
    #[error("a row of the database `{}` is not understood", path.display())]
    Row {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("the damaged database `{}` cannot be moved aside", path.display())]
    Aside {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the name `{0}` is taken")]
    NameTaken(String),
    #[error("the database's thread has ended")]
    Closed,
}

impl StoreError {
    /// Whether the disk was full.
    pub(crate) fn is_no_space(&self) -> bool {
        matches!(self, Self::Sql { source, .. } if source.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull))
    }

    /// Whether the file is no database that can be used, so that it is to be made again from the folders.
    fn is_damage(&self) -> bool {
        use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
        let damaged = |source: &rusqlite::Error| {
            matches!(
                source.sqlite_error_code(),
                Some(NotADatabase | DatabaseCorrupt)
            )
        };
        match self {
            Self::Sql { source, .. } => damaged(source),
            Self::Migrate { source, .. } => match &**source {
                rusqlite_migration::Error::RusqliteError { err, .. } => damaged(err),
                _ => false,
            },
            Self::Row { .. } => true,
            Self::Newer { .. } | Self::Aside { .. } | Self::NameTaken(_) | Self::Closed => false,
        }
    }
}

/// All rows, as read when the daemon starts.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    pub(crate) vms: Vec<VmRecord>,
    pub(crate) images: Vec<ImageRecord>,
    pub(crate) kernels: Vec<KernelRecord>,
}

/// What opening found.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) store: Store,
    pub(crate) rows: Rows,
    /// Where a damaged database was moved to.
    pub(crate) damaged: Option<PathBuf>,
}

type Job = Box<dyn FnOnce(&mut Thread) + Send>;

/// What the thread owns.
struct Thread {
    path: PathBuf,
    durable: Connection,
    journal: Connection,
}

/// A handle to the database's thread.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    jobs: mpsc::Sender<Job>,
}

impl Store {
    /// Opens or makes the database, and reads all rows. A damaged one is moved aside and begun anew.
    pub(crate) fn open(path: &Path) -> Result<Opened, StoreError> {
        let (thread, rows, damaged) = match Thread::open(path) {
            Ok((thread, rows)) => (thread, rows, None),
            Err(error) if error.is_damage() => {
                let aside = move_aside(path)?;
                let (thread, rows) = Thread::open(path)?;
                (thread, rows, Some(aside))
            }
            Err(error) => return Err(error),
        };
        let (jobs, mut inbox) = mpsc::channel::<Job>(QUEUE);
        let spawned = std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || {
                let mut thread = thread;
                while let Some(job) = inbox.blocking_recv() {
                    job(&mut thread);
                }
            });
        match spawned {
            Ok(_) => Ok(Opened {
                store: Self { jobs },
                rows,
                damaged,
            }),
            Err(_) => Err(StoreError::Closed),
        }
    }

    async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Thread) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |thread| {
            // A caller that went away no longer wants the answer.
            let _ = reply.send(job(thread));
        });
        self.jobs.send(job).await.map_err(|_| StoreError::Closed)?;
        answer.await.map_err(|_| StoreError::Closed)?
    }

    /// Adds a VM's row; durable when this returns.
    pub(crate) async fn insert_vm(&self, record: VmRecord) -> Result<(), StoreError> {
        self.run(move |thread| thread.insert_vm(&record)).await
    }

    /// Replaces a VM's row; durable when this returns.
    pub(crate) async fn update_vm(&self, record: VmRecord) -> Result<(), StoreError> {
        self.run(move |thread| thread.update_vm(&record)).await
    }

    /// Replaces the rows of several VMs at once, which may have swapped names; durable when this returns.
    pub(crate) async fn update_vms(&self, records: Vec<VmRecord>) -> Result<(), StoreError> {
        self.run(move |thread| thread.update_vms(&records)).await
    }

    /// Removes a VM's row and journal.
    pub(crate) async fn delete_vm(&self, id: VmId) -> Result<(), StoreError> {
        self.run(move |thread| thread.delete_vm(id)).await
    }

    /// Adds or replaces the row of an image or kernel, and takes its name from whichever had it.
    pub(crate) async fn put_bundle<M: Manifest>(
        &self,
        bundle: Bundle<M>,
    ) -> Result<(), StoreError> {
        self.run(move |thread| {
            let id = bundle.manifest.id().to_string();
            let name = bundle.name.as_ref().map(ToString::to_string);
            thread.put_named(M::KIND, &id, name.as_deref(), &bundle)
        })
        .await
    }

    /// Removes the row of an image or kernel.
    pub(crate) async fn delete_bundle<M: Manifest>(&self, id: M::Id) -> Result<(), StoreError> {
        let id = id.to_string();
        self.run(move |thread| thread.delete_named(M::KIND, &id))
            .await
    }

    /// Adds a line to a VM's journal, if the thread has time for it.
    pub(crate) fn note(&self, vm: VmId, entry: JournalEntry) {
        let job: Job = Box::new(move |thread| {
            if let Err(error) = thread.note(vm, &entry) {
                tracing::warn!(%vm, %error, "a journal entry was not kept");
            }
        });
        if self.jobs.try_send(job).is_err() {
            tracing::warn!(%vm, "a journal entry was dropped");
        }
    }

    /// A VM's journal, oldest first.
    pub(crate) async fn journal(&self, vm: VmId) -> Result<Vec<JournalEntry>, StoreError> {
        self.run(move |thread| thread.journal_of(vm)).await
    }

    /// Waits until all that was asked before is done, and moves it from the log into the database's own file, so that
    /// the file alone is whole while no daemon runs.
    pub(crate) async fn checkpoint(&self) {
        let moved = self.run(|thread| {
            let sql = "PRAGMA wal_checkpoint(TRUNCATE)";
            thread
                .durable
                .query_row(sql, [], |_| Ok(()))
                .map_err(|source| StoreError::Sql {
                    path: thread.path.clone(),
                    action: "closed",
                    source,
                })
        });
        if let Err(error) = moved.await {
            // The log still has it.
            tracing::warn!(%error, "the database keeps its log");
        }
    }
}

/// Renames the database and its companions; answers the new name.
fn move_aside(path: &Path) -> Result<PathBuf, StoreError> {
    let stamp = jiff::Timestamp::now().as_second();
    let with_suffix = |suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    let aside = with_suffix(&format!(".damaged-{stamp}"));
    for companion in ["-wal", "-shm"] {
        // A companion belongs to the damaged file and must not be applied to the new one; there may be none.
        let mut beside = aside.clone().into_os_string();
        beside.push(companion);
        let _ = std::fs::rename(with_suffix(companion), beside);
    }
    std::fs::rename(path, &aside).map_err(|source| StoreError::Aside {
        path: path.to_owned(),
        source,
    })?;
    Ok(aside)
}
