//! Takes away what is left over of banger on the host, or all of it, and tells by measuring what came of it.

use super::{Found, INSTANCE, OTHER_INSTANCE, Remedy, look};
use crate::blocking::blocking;
use crate::network::network_error;
use crate::registry;
use crate::server::App;
use crate::storage::{Owner, StorageDriver};
use crate::vm::Ask;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::host::{CleanHost, HostKind, HostObject, Mended};
use banger_core::decide::Request;
use banger_vmm::lock::{LockError, Locked, try_lock};
use banger_vmm::process;
use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a process that was killed, or lost what it lives by, may take to be gone.
const DEATH: Duration = Duration::from_secs(10);

/// What a removal may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Removal {
    /// Nothing that anybody could miss.
    Careful,
    /// Also end processes whose disks are gone.
    Forced,
}

/// Removes what is left over, and tells what came of it.
pub(crate) async fn remove_left_over(app: &App) -> Result<Mended, ErrorBody> {
    let mut mended = Mended::default();
    let before = left_over(app).await?;
    if before.is_empty() {
        return Ok(mended);
    }
    let refused = remove(app, &before, Removal::Careful).await;
    let after = look(app).await?;
    mended.done.extend(gone(&before, &after));
    let left = after.iter().filter(|found| !found.object.expected);
    let left = left.map(|found| left_as_it_is(found, &refused));
    mended.left.extend(left);
    Ok(mended)
}

async fn left_over(app: &App) -> Result<Vec<Found>, ErrorBody> {
    let mut found = look(app).await?;
    found.retain(|found| !found.object.expected);
    Ok(found)
}

/// What was there `before` and is not `after`, whoever it belongs to by then.
pub(super) fn gone<'a>(
    before: &'a [Found],
    after: &'a [Found],
) -> impl Iterator<Item = String> + 'a {
    let there: BTreeSet<_> = after.iter().map(key).collect();
    let gone = before
        .iter()
        .filter(move |found| !there.contains(&key(found)));
    gone.map(|found| removed(&found.object))
}

fn key(found: &Found) -> (HostKind, &str) {
    (found.object.kind, &found.object.name)
}

/// Why what could not be removed.
pub(super) type Refused = BTreeMap<(HostKind, String), ErrorBody>;

async fn remove(app: &App, found: &[Found], removal: Removal) -> Refused {
    let mut refused = Refused::new();
    let (mut ports, mut snapshots) = (BTreeSet::new(), BTreeSet::new());
    let mut swept = false;
    for Found { object, remedy } in found {
        let tried = match remedy {
            Remedy::Nothing | Remedy::Waiting(_) | Remedy::Stranger(_) => Ok(()),
            // What is published there goes with it.
            Remedy::Port(tap, _) if !ports.insert(tap) => Ok(()),
            Remedy::Port(tap, lock) => release(app, tap, lock.clone()).await,
            Remedy::HostSide if std::mem::replace(&mut swept, true) => Ok(()),
            Remedy::HostSide => {
                let gone = app.world.network.sweep().await;
                gone.map_err(|error| network_error(&error))
            }
            // It has two devices, and goes as a whole.
            Remedy::Snapshot(owner, _) if !snapshots.insert((owner.instance, owner.vm)) => Ok(()),
            Remedy::Snapshot(owner, lock) => detach(app, *owner, lock.clone()).await,
            Remedy::Process(pid, lock) => {
                let (pid, lock) = (*pid, lock.clone());
                end(move || process::end_holder(pid, &lock, DEATH)).await
            }
            Remedy::Stray(stray) if removal == Removal::Forced => {
                let stray = stray.clone();
                end(move || stray.end(DEATH)).await
            }
            Remedy::Stray(_) => Ok(()),
        };
        if let Err(error) = tried {
            tracing::warn!(
                kind = object.kind.name(),
                name = object.name,
                error = error.message,
                causes = ?error.causes,
                "it is left over and could not be removed"
            );
            refused.insert((object.kind, object.name.clone()), error);
        }
    }
    refused
}

/// Nobody starts the VM while the answer is held, since that takes its lock. A VM whose folder was removed has none,
/// and is started by nobody.
fn keep_from_starting(lock: Option<&Path>) -> Result<Option<Locked>, ErrorBody> {
    match lock.map(try_lock).transpose() {
        Err(LockError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        Err(error @ LockError::Held(_)) => Err(ErrorBody::from_error(ErrorCode::InUse, &error)),
        Err(error @ LockError::Io { .. }) => {
            Err(ErrorBody::from_error(ErrorCode::Internal, &error))
        }
        Ok(held) => Ok(held),
    }
}

async fn release(app: &App, tap: &str, lock: Option<PathBuf>) -> Result<(), ErrorBody> {
    let held = blocking(move || keep_from_starting(lock.as_deref())).await??;
    let released = app.world.network.release(tap.to_owned()).await;
    drop(held);
    released.map_err(|error| network_error(&error))
}

async fn detach(app: &App, owner: Owner, lock: Option<PathBuf>) -> Result<(), ErrorBody> {
    let world = app.world.clone();
    blocking(move || {
        let _held = keep_from_starting(lock.as_deref())?;
        StorageDriver::close(world.storage.snapshot(), &owner)
    })
    .await?
}

async fn end(
    kill: impl FnOnce() -> Result<(), process::KillError> + Send + 'static,
) -> Result<(), ErrorBody> {
    match blocking(kill).await? {
        // It ended by itself.
        Ok(()) | Err(process::KillError::NotHolder { .. }) => Ok(()),
        Err(error) => Err(ErrorBody::from_error(ErrorCode::Internal, &error)),
    }
}

fn removed(object: &HostObject) -> String {
    let verb = if object.kind == HostKind::Process {
        "ended"
    } else {
        "removed"
    };
    let (kind, name, owner) = (object.kind.name(), &object.name, &object.owner);
    if owner == INSTANCE {
        format!("{verb} {kind} {name}")
    } else {
        format!("{verb} {kind} {name} of {owner}")
    }
}

/// An object that stays, why, and what helps.
pub(super) fn left_as_it_is(found: &Found, refused: &Refused) -> ErrorBody {
    let HostObject {
        kind, name, owner, ..
    } = &found.object;
    let message = format!("{} {name} of {owner}", kind.name());
    let mut body = ErrorBody::new(ErrorCode::HostUnfit, message);
    if let Some(error) = refused.get(&(*kind, name.clone())) {
        body.causes.push(error.message.clone());
        body.causes.extend(error.causes.iter().cloned());
        body.hints.extend(error.hints.iter().cloned());
    }
    let (cause, hint) = match &found.remedy {
        Remedy::Stranger(pid) => (
            Some("it holds the lock of a VM that does not run, and banger did not start it".to_owned()),
            format!("the VM starts when it has ended; `kill {pid}` ends it"),
        ),
        Remedy::Stray(stray) => (
            Some("the VM's folder was removed while it ran: what is on its disks is nowhere else".to_owned()),
            format!(
                "copy what you need from `/proc/{}/fd`; then `banger host clean --force` ends it",
                stray.pid
            ),
        ),
        Remedy::Process(pid, _) | Remedy::Waiting(pid) => {
            (None, format!("`kill -9 {pid}` ends it, unless it waits for a disk"))
        }
        Remedy::Snapshot(..) => (
            None,
            "end what has it open (`lsblk`, `fuser -v /dev/dm-*` show that), then repeat the command"
                .to_owned(),
        ),
        Remedy::Nothing if *kind == HostKind::Loop => {
            (None, "it goes with the snapshot above it".to_owned())
        }
        Remedy::Nothing | Remedy::Port(..) | Remedy::HostSide => {
            (None, "`banger daemon logs` tells more; repeat the command".to_owned())
        }
    };
    body.causes.extend(cause);
    if body.hints.is_empty() {
        body.hints.push(hint);
    }
    body
}

/// Returns the host to what it was before banger: VMs keep their files and records.
pub(crate) async fn clean(app: &App, request: &CleanHost) -> Result<Mended, ErrorBody> {
    let live: Vec<_> = app
        .registry
        .list(false)
        .into_iter()
        .filter(|handle| handle.view.borrow().phase.is_live())
        .collect();
    if !live.is_empty() && !request.force {
        let names: Vec<String> = live
            .iter()
            .map(|handle| handle.latest().record.name.to_string())
            .collect();
        return Err(ErrorBody::new(
            ErrorCode::WrongPhase,
            format!("cannot clean the host: {} are live", names.join(", ")),
        )
        .hint("`banger vm stop` them first, or `banger host clean --force` stops them"));
    }
    let before = look(app).await?;
    let mut mended = Mended::default();
    let mut alive = false;
    for outcome in registry::each(live, Ask::new(Request::Stop)).await {
        if let Some(error) = outcome.error {
            let keeps = format!("VM `{}` is live, and keeps what it needs", outcome.name);
            let hint = "then `banger host clean` takes the rest away; `banger host ls` shows it";
            let mut error = error.hint(hint);
            error.causes.insert(0, keeps);
            mended.left.push(error);
            alive = true;
        }
    }
    let removal = if request.force {
        Removal::Forced
    } else {
        Removal::Careful
    };
    // A process that is left over may hold the namespace.
    let mut refused = remove(app, &left_over(app).await?, removal).await;
    if let Err(error) = app.world.network.close().await {
        mended.left.push(network_error(&error));
    }
    if !alive {
        wait_for_ends(&before).await;
    }
    // What stood on the namespace, or on nothing but it.
    refused.extend(remove(app, &left_over(app).await?, removal).await);
    let after = look(app).await?;
    mended.done.extend(gone(&before, &after));
    let own = format!("{} (bangerd)", std::process::id());
    for found in &after {
        let HostObject {
            name,
            owner,
            expected,
            ..
        } = &found.object;
        // Another instance's is no business of ours, and this daemon goes when it is told to stop.
        let others = owner.starts_with(OTHER_INSTANCE) && *expected;
        // What those who live on need was told with them.
        let needed = *expected && alive;
        if !others && !needed && *name != own {
            mended.left.push(left_as_it_is(found, &refused));
        }
    }
    Ok(mended)
}

/// `pasta`, and who holds it, end a moment after the keeper.
async fn wait_for_ends(before: &[Found]) {
    let ends = before.iter().filter_map(|found| match found.remedy {
        Remedy::Waiting(pid) => process::open(pid).ok(),
        _ => None,
    });
    let ends: Vec<_> = ends.collect();
    let waited = tokio::task::spawn_blocking(move || {
        let deadline = Instant::now() + DEATH;
        for end in ends {
            let left = deadline.saturating_duration_since(Instant::now());
            // Who is not gone by then is told of.
            let _ = process::wait_any(&[end], left);
        }
    });
    let _ = waited.await;
}
