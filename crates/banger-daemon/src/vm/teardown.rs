//! The teardown of a VM: its processes, its storage and its port, and last its `run/` folder. Every part can be
//! repeated, goes on after errors, and needs no write to succeed, so it works on a full disk.

use super::files::VmFiles;
use crate::crash::{Side, point};
use crate::record::VmRecord;
use crate::storage::Owner;
use crate::world::World;
use banger_core::id::VmId;
use banger_vmm::lock::{LockError, Locked, holders, try_lock, wait_free};
use banger_vmm::process::{ending_signal, kill_holder};
use rustix::process::Signal;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long killed processes may take to be gone.
const DEATH: Duration = Duration::from_secs(10);

/// Ends every process that holds the VM's lock: SIGTERM where that is heard, at most `grace` to follow it, then
/// SIGKILL. Answers the lock, taken. Blocks.
pub(crate) fn end_processes(lock: &Path, grace: Duration) -> Result<Locked, LockError> {
    let free = try_lock(lock);
    if !matches!(free, Err(LockError::Held(_))) {
        return free;
    }
    if !grace.is_zero() {
        signal_all(lock, ending_signal);
        let freed = wait_free(lock, Instant::now() + grace);
        if !matches!(freed, Err(LockError::Held(_))) {
            return freed;
        }
    }
    signal_all(lock, |_| Signal::KILL);
    // A process that was stopped dies all the same; one in the middle of I/O may take a while.
    wait_free(lock, Instant::now() + DEATH)
}

fn signal_all(lock: &Path, signal: impl Fn(i32) -> Signal) {
    match holders(lock) {
        Ok(pids) => {
            for pid in pids {
                if let Err(error) = kill_holder(pid, lock, signal(pid)) {
                    tracing::debug!(pid, %error, "a holder of the lock went away by itself");
                }
            }
        }
        Err(error) => {
            tracing::warn!(lock = %lock.display(), %error, "the lock's holders cannot be listed")
        }
    }
}

/// After a failed start: no process and no port of it is left. The attempt's folder stays until the reason is recorded.
///
/// # Errors
/// A process of the VM does not die.
pub(super) async fn unwind(
    world: &Arc<World>,
    record: &VmRecord,
) -> Result<Vec<Problem>, LockError> {
    let lock = VmFiles::of(&world.paths, record.id).lock();
    let path = lock.clone();
    let ended = tokio::task::spawn_blocking(move || end_processes(&path, Duration::ZERO));
    let _lock = ended.await.unwrap_or_else(|_| Err(LockError::Held(lock)))?;
    Ok(release_host_objects(world, record, "unwind", Disks::Unwritten).await)
}

/// Whether a guest may have written to the VM's disks since they were last made durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Disks {
    Written,
    Unwritten,
}

/// Something of a dead VM that stays on the host.
#[derive(Debug, thiserror::Error)]
#[error("its {object} cannot be {removal}: {why}")]
pub(crate) struct Problem {
    object: &'static str,
    removal: &'static str,
    why: String,
}

/// Releases what a dead VM has on the host outside of its folder, its lock being held: detaches its storage, makes
/// written disks durable, removes its port. Answers what could not be done; the rest is done all the same.
pub(crate) async fn release_host_objects(
    world: &Arc<World>,
    record: &VmRecord,
    verb: &'static str,
    disks: Disks,
) -> Vec<Problem> {
    let closed = close_storage(world, record, verb).await;
    if disks == Disks::Written {
        point(verb, "sync", Side::Before);
        sync_disks(&VmFiles::of(&world.paths, record.id)).await;
        point(verb, "sync", Side::After);
    }
    let released = release_port(world, record.id, verb).await;
    let detached = closed.map(|why| Problem {
        object: "storage",
        removal: "detached",
        why,
    });
    let removed = released.map(|why| Problem {
        object: "port",
        removal: "removed",
        why,
    });
    detached.into_iter().chain(removed).collect()
}

/// Removes a dead VM's port of the bridge. Answers what could not be removed.
async fn release_port(world: &World, id: VmId, verb: &'static str) -> Option<String> {
    point(verb, "release-port", Side::Before);
    let released = world.network.release(id.tap_name()).await;
    point(verb, "release-port", Side::After);
    let problem = released.err().map(|error| banger_host::error_chain(&error));
    if let Some(problem) = &problem {
        tracing::warn!(vm = %id, problem, "a port was left behind");
    }
    problem
}

/// Detaches what a dead VM's storage driver attached. Answers what could not be detached.
pub(crate) async fn close_storage(
    world: &Arc<World>,
    record: &VmRecord,
    verb: &'static str,
) -> Option<String> {
    point(verb, "close-storage", Side::Before);
    let (shared, storage) = (Arc::clone(world), record.spec.storage);
    let owner = Owner {
        instance: world.instance.id,
        vm: record.id,
    };
    let closed =
        tokio::task::spawn_blocking(move || shared.storage.driver(storage).close(&owner)).await;
    point(verb, "close-storage", Side::After);
    let problem = match closed {
        Ok(Ok(())) => return None,
        Ok(Err(error)) => error.message,
        Err(error) => error.to_string(),
    };
    tracing::warn!(vm = %record.id, problem, "a storage was left attached");
    Some(problem)
}

/// Removes what a dead VM's attempt left in its folder. Answers what could not be removed.
pub(crate) async fn clear_run(world: &World, id: VmId, verb: &'static str) -> Option<String> {
    let run = VmFiles::of(&world.paths, id).run();
    point(verb, "clear-run", Side::Before);
    let removed = tokio::fs::remove_dir_all(&run).await;
    point(verb, "clear-run", Side::After);
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(vm = %id, run = %run.display(), %error, "a run folder was left behind");
            Some(format!("cannot remove `{}`: {error}", run.display()))
        }
        Ok(()) | Err(_) => None,
    }
}

/// Makes what the guest wrote durable.
async fn sync_disks(files: &VmFiles) {
    let paths = [files.overlay(), files.disk()];
    let synced = tokio::task::spawn_blocking(move || {
        for path in paths.iter().filter(|path| path.exists()) {
            if let Err(error) = banger_host::storage::sync_file(path) {
                tracing::warn!(path = %path.display(), %error, "a disk was not synced");
            }
        }
    });
    // It neither panics nor is cancelled.
    let _ = synced.await;
}
