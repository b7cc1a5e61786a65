//! Rows of VMs, images and kernels.

use super::{Rows, StoreError, Thread};
use crate::record::VmRecord;
use banger_core::id::VmId;
use rusqlite::{Connection, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

const UPDATE_VM: &str = "UPDATE vm SET name = ?2, trashed = ?3, record = ?4 WHERE id = ?1";

impl Thread {
    pub(super) fn sql(
        &self,
        action: &'static str,
    ) -> impl Fn(rusqlite::Error) -> StoreError + use<> {
        let path = self.path.clone();
        move |source| StoreError::Sql {
            path: path.clone(),
            action,
            source,
        }
    }

    fn to_json(&self, record: &impl Serialize) -> Result<String, StoreError> {
        serde_json::to_string(record).map_err(|source| StoreError::Row {
            path: self.path.clone(),
            source,
        })
    }

    fn read<T: DeserializeOwned>(&self, query: &str) -> Result<Vec<T>, StoreError> {
        let sql = self.sql("read");
        let mut statement = self.durable.prepare(query).map_err(&sql)?;
        let texts = statement
            .query_map([], |row| row.get::<_, String>(0))
            .map_err(&sql)?;
        texts
            .map(|text| {
                serde_json::from_str(&text.map_err(&sql)?).map_err(|source| StoreError::Row {
                    path: self.path.clone(),
                    source,
                })
            })
            .collect()
    }

    pub(super) fn rows(&self) -> Result<Rows, StoreError> {
        Ok(Rows {
            vms: self.read("SELECT record FROM vm")?,
            images: self.read("SELECT record FROM named WHERE kind = 'image'")?,
            kernels: self.read("SELECT record FROM named WHERE kind = 'kernel'")?,
        })
    }

    fn put_vm(&self, statement: &str, record: &VmRecord) -> Result<(), StoreError> {
        self.put_vm_by(&self.durable, statement, record)
    }

    fn put_vm_by(
        &self,
        connection: &Connection,
        statement: &str,
        record: &VmRecord,
    ) -> Result<(), StoreError> {
        let json = self.to_json(record)?;
        let trashed = record.trashed_at.is_some() || record.purging;
        let values = params![record.id.to_string(), record.name.as_str(), trashed, json];
        match connection
            .prepare_cached(statement)
            .and_then(|mut statement| statement.execute(values))
        {
            Ok(_) => Ok(()),
            Err(error) if is_unique(&error) => Err(StoreError::NameTaken(record.name.to_string())),
            Err(error) => Err(self.sql("written")(error)),
        }
    }

    pub(super) fn insert_vm(&self, record: &VmRecord) -> Result<(), StoreError> {
        self.put_vm(
            "INSERT INTO vm (id, name, trashed, record) VALUES (?1, ?2, ?3, ?4)",
            record,
        )
    }

    pub(super) fn update_vm(&self, record: &VmRecord) -> Result<(), StoreError> {
        self.put_vm(UPDATE_VM, record)
    }

    pub(super) fn update_vms(&self, records: &[VmRecord]) -> Result<(), StoreError> {
        let sql = self.sql("written");
        let transaction = self.durable.unchecked_transaction().map_err(&sql)?;
        // No name is in another's way meanwhile: a slash is in none.
        for record in records {
            let parked = "UPDATE vm SET name = '/' || id WHERE id = ?1";
            transaction
                .execute(parked, [record.id.to_string()])
                .map_err(&sql)?;
        }
        for record in records {
            self.put_vm_by(&transaction, UPDATE_VM, record)?;
        }
        transaction.commit().map_err(sql)
    }

    pub(super) fn delete_vm(&mut self, id: VmId) -> Result<(), StoreError> {
        let sql = self.sql("written");
        let remove = |connection: &mut Connection| {
            let transaction = connection.transaction()?;
            transaction.execute("DELETE FROM journal WHERE vm = ?1", [id.to_string()])?;
            transaction.execute("DELETE FROM vm WHERE id = ?1", [id.to_string()])?;
            transaction.commit()
        };
        remove(&mut self.durable).map_err(sql)
    }

    pub(super) fn put_named(
        &mut self,
        kind: &str,
        id: &str,
        name: Option<&str>,
        record: &impl Serialize,
    ) -> Result<(), StoreError> {
        let json = self.to_json(record)?;
        let sql = self.sql("written");
        let put = |connection: &mut Connection| {
            let transaction = connection.transaction()?;
            transaction.execute(
                "UPDATE named SET name = NULL, record = json_set(record, '$.name', NULL)
                 WHERE kind = ?1 AND name = ?2 AND id <> ?3",
                params![kind, name, id],
            )?;
            transaction.execute(
                "INSERT INTO named (kind, id, name, record) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (kind, id) DO UPDATE SET name = ?3, record = ?4",
                params![kind, id, name, json],
            )?;
            transaction.commit()
        };
        put(&mut self.durable).map_err(sql)
    }

    pub(super) fn delete_named(&self, kind: &str, id: &str) -> Result<(), StoreError> {
        let removed = self
            .durable
            .execute("DELETE FROM named WHERE kind = ?1 AND id = ?2", [kind, id]);
        removed.map(|_| ()).map_err(self.sql("written"))
    }
}

fn is_unique(error: &rusqlite::Error) -> bool {
    error
        .sqlite_error()
        .is_some_and(|error| error.extended_code == rusqlite::ffi::SQLITE_CONSTRAINT_UNIQUE)
}
