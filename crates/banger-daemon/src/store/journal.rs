//! The journal: a VM's story, bounded, and lost without harm.

use super::{StoreError, Thread};
use banger_api::vm::JournalEntry;
use banger_core::id::VmId;
use rusqlite::params;

/// How many lines are kept of a VM.
const KEPT: u32 = 400;

impl Thread {
    pub(super) fn note(&self, vm: VmId, entry: &JournalEntry) -> Result<(), StoreError> {
        let json = serde_json::to_string(entry).map_err(|source| StoreError::Row {
            path: self.path.clone(),
            source,
        })?;
        let vm = vm.to_string();
        let write = || {
            let mut insert = self
                .journal
                .prepare_cached("INSERT INTO journal (vm, entry) VALUES (?1, ?2)")?;
            insert.execute(params![vm, json])?;
            let mut trim = self.journal.prepare_cached(
                "DELETE FROM journal WHERE vm = ?1 AND sequence <=
                     (SELECT sequence FROM journal WHERE vm = ?1 ORDER BY sequence DESC LIMIT 1 OFFSET ?2)",
            )?;
            trim.execute(params![vm, KEPT])
        };
        write().map(|_| ()).map_err(self.sql("written"))
    }

    pub(super) fn journal_of(&self, vm: VmId) -> Result<Vec<JournalEntry>, StoreError> {
        let sql = self.sql("read");
        let mut statement = self
            .journal
            .prepare_cached("SELECT entry FROM journal WHERE vm = ?1 ORDER BY sequence")
            .map_err(&sql)?;
        let lines = statement
            .query_map([vm.to_string()], |row| row.get::<_, String>(0))
            .map_err(&sql)?;
        lines
            .map(|line| {
                serde_json::from_str(&line.map_err(&sql)?).map_err(|source| StoreError::Row {
                    path: self.path.clone(),
                    source,
                })
            })
            .collect()
    }
}
