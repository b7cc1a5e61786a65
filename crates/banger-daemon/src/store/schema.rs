//! The schema and its migrations, which are only ever added to.

use super::{Rows, StoreError, Thread};
use rusqlite::Connection;
use rusqlite_migration::{M, Migrations};
use std::path::Path;
use std::time::Duration;

const MIGRATIONS: &[M<'static>] = &[M::up(
    "CREATE TABLE vm (
         id TEXT PRIMARY KEY,
         name TEXT NOT NULL,
         trashed INTEGER NOT NULL,
         record TEXT NOT NULL
     ) STRICT;
     CREATE UNIQUE INDEX vm_name ON vm (name) WHERE trashed = 0;
     CREATE TABLE named (
         kind TEXT NOT NULL,
         id TEXT NOT NULL,
         name TEXT,
         record TEXT NOT NULL,
         PRIMARY KEY (kind, id),
         UNIQUE (kind, name)
     ) STRICT;
     CREATE TABLE journal (
         sequence INTEGER PRIMARY KEY AUTOINCREMENT,
         vm TEXT NOT NULL,
         entry TEXT NOT NULL
     ) STRICT;
     CREATE INDEX journal_vm ON journal (vm, sequence);",
)];

/// The newest schema that this banger knows.
pub(crate) const SCHEMA_VERSION: u64 = MIGRATIONS.len() as u64;

impl Thread {
    /// Opens the database, migrates it and reads all rows.
    pub(super) fn open(path: &Path) -> Result<(Self, Rows), StoreError> {
        let sql = |action| {
            move |source| StoreError::Sql {
                path: path.to_owned(),
                action,
                source,
            }
        };
        let mut durable = Connection::open(path).map_err(sql("opened"))?;
        durable
            .busy_timeout(Duration::from_secs(5))
            .map_err(sql("opened"))?;
        let found: u32 = durable
            .query_row("PRAGMA user_version", [], |row| row.get(0))
            .map_err(sql("read"))?;
        let found = u64::from(found);
        if found > SCHEMA_VERSION {
            return Err(StoreError::Newer {
                path: path.to_owned(),
                found,
                known: SCHEMA_VERSION,
            });
        }
        durable
            .execute_batch(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA cache_size = -512;",
            )
            .map_err(sql("opened"))?;
        Migrations::from_slice(MIGRATIONS)
            .to_latest(&mut durable)
            .map_err(|source| StoreError::Migrate {
                path: path.to_owned(),
                known: SCHEMA_VERSION,
                source: Box::new(source),
            })?;
        // It waits for no disk, so it must never be the one to move the log into the database.
        let journal = Connection::open(path).map_err(sql("opened"))?;
        journal
            .busy_timeout(Duration::from_secs(5))
            .map_err(sql("opened"))?;
        journal
            .execute_batch("PRAGMA synchronous = OFF; PRAGMA wal_autocheckpoint = 0; PRAGMA cache_size = -128;")
            .map_err(sql("opened"))?;
        let thread = Self {
            path: path.to_owned(),
            durable,
            journal,
        };
        let rows = thread.rows()?;
        Ok((thread, rows))
    }
}
