//! The actor's part that puts a VM into the trash or removes it for good.

use super::actor::{Actor, Run};
use super::files::lock_error;
use super::teardown::{Disks, Problem, release_host_objects};
use crate::blocking::blocking;
use crate::crash::{Side, point};
use crate::images::store_error;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_core::decide::{Deny, Request};
use banger_core::name::VmName;
use banger_core::phase::Desired;
use banger_vmm::lock::{LockError, try_lock};
use jiff::Timestamp;

/// What becomes of a VM that is deleted. Where both were asked for, the greater one counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Removal {
    Trash,
    Purge,
}

impl Actor {
    pub(super) async fn remove(&mut self, removal: Removal) -> Result<(), ErrorBody> {
        match removal {
            Removal::Trash => self.trash().await,
            Removal::Purge => self.purge().await,
        }
    }

    async fn trash(&mut self) -> Result<(), ErrorBody> {
        point("delete", "record", Side::Before);
        self.change(|record| {
            record.trashed_at = Some(Timestamp::now());
            record.desired = Desired::Off;
        })
        .await?;
        point("delete", "record", Side::After);
        self.note("delete", "put into the trash", None);
        self.publish(|_| {});
        Ok(())
    }

    /// Brings it back from the trash, under `name` if there is one; whoever asks has made sure that it is free.
    pub(super) async fn undelete(&mut self, name: Option<VmName>) -> Result<(), ErrorBody> {
        if self.record.purging {
            let message = format!("VM `{}` is being removed permanently", self.record.name);
            return Err(ErrorBody::new(ErrorCode::WrongPhase, message)
                .hint("its files may be gone already; it cannot come back"));
        }
        point("undelete", "record", Side::Before);
        self.change(|record| {
            record.trashed_at = None;
            if let Some(name) = name {
                record.name = name;
            }
        })
        .await?;
        point("undelete", "record", Side::After);
        self.note("undelete", "back from the trash", None);
        self.publish(|_| {});
        Ok(())
    }

    /// Removes record and files permanently: first the promise, then the files, then the row.
    pub(super) async fn purge(&mut self) -> Result<(), ErrorBody> {
        // Held to the end: nothing starts on these disks, and nothing that lives loses them.
        let _lock = match (&self.run, try_lock(&self.files.lock())) {
            (Run::Starting(_) | Run::Live(_), _) => {
                return Err(self.denied(
                    Deny::Unreachable,
                    Request::Delete {
                        force: true,
                        purge: true,
                    },
                ));
            }
            (Run::Idle, Ok(lock)) => Some(lock),
            (Run::Idle, Err(LockError::Io { .. })) if !self.files.folder.exists() => None,
            (Run::Idle, Err(error)) => {
                return Err(lock_error(&self.record.name, "delete", &error));
            }
        };
        point("delete", "promise", Side::Before);
        if !self.record.purging {
            self.change(|record| {
                record.purging = true;
                record.trashed_at.get_or_insert_with(Timestamp::now);
            })
            .await?;
            self.publish(|_| {});
        }
        point("delete", "promise", Side::After);
        let problems =
            release_host_objects(&self.world, &self.record, "delete", Disks::Unwritten).await;
        if !problems.is_empty() {
            return Err(self.left_on_the_host(&problems));
        }
        self.clear_run("delete").await;
        point("delete", "unlink", Side::Before);
        let folder = self.files.folder.clone();
        let removed = blocking(move || remove_folder(&folder)).await?;
        removed.map_err(|error| super::files::io_error("remove", &self.files.folder, &error))?;
        point("delete", "unlink", Side::After);
        point("delete", "row", Side::Before);
        self.world
            .store
            .delete_vm(self.record.id)
            .await
            .map_err(|error| store_error(&error))?;
        point("delete", "row", Side::After);
        self.world.images.unpin(self.record.id);
        self.publish(|view| view.purged = true);
        Ok(())
    }
}

impl Actor {
    /// Without its record nobody would know whose it is.
    fn left_on_the_host(&self, problems: &[Problem]) -> ErrorBody {
        let message = format!("cannot remove VM `{}` from the host", self.record.name);
        let mut error = ErrorBody::new(ErrorCode::Internal, message);
        error.causes.extend(problems.iter().map(Problem::to_string));
        error.hint(
            "`banger host ls` shows what is left on the host; repeat the command when it is free",
        )
    }
}

/// Unlinks all files of a VM, its record's mirror last, so that what is left of a purge can always be told.
fn remove_folder(folder: &std::path::Path) -> std::io::Result<()> {
    let gone = |outcome: std::io::Result<()>| match outcome {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    };
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_name() == crate::record::VM_FILE {
            continue;
        }
        let path = entry.path();
        gone(if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(&path)
        } else {
            std::fs::remove_file(&path)
        })?;
    }
    gone(std::fs::remove_file(folder.join(crate::record::VM_FILE)))?;
    gone(std::fs::remove_dir(folder))
}
