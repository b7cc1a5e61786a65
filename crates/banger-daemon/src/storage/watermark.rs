//! No guest takes the host's filesystem to zero: who grows on it is paused before a write is lost, and goes on when
//! there is room. Nobody tells of a filling filesystem, so it is asked, as often as the headroom makes necessary, and
//! only while a VM runs.

use super::Layer;
use super::tending::Snapshots;
use crate::record::VmRecord;
use crate::registry::Registry;
use crate::vm::actor::note;
use crate::vm::files::VmFiles;
use crate::vm::{Ask, Handle, View};
use crate::world::World;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::event::EventKind;
use banger_core::decide::Request;
use banger_core::id::VmId;
use banger_core::phase::{PausedBy, Phase};
use banger_core::spec::Storage;
use banger_core::watermark::{SHORTEST_MS, UNLIMITED_WRITES, Verdict, filesystem, pause_at};
use banger_host::storage::{Space, allocated, space};
use banger_vmm::driver::capabilities;
use std::collections::HashMap;
use std::mem::Discriminant;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::broadcast;
use tokio::task::{JoinHandle, JoinSet};

/// A VM that went on is not let go on again before this: what stops it may be a quota that we cannot see.
const GOES_ON_EVERY: Duration = Duration::from_secs(5);
/// How long VMs may take to be paused or to go on, before the filesystem is looked at again.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// How soon a filesystem that could not be measured is measured again, and a snapshot that is lost looked at.
pub(super) const AGAIN: Duration = Duration::from_secs(5);
/// Between two looks is at least this: guests can make news without end.
pub(super) const PACE: Duration = Duration::from_millis(SHORTEST_MS);
/// Watches until the daemon goes down.
pub(crate) async fn watch(world: Arc<World>, registry: Arc<Registry>) {
    let (_, mut events) = world.hub.follow(None);
    let mut down = world.shutdown.subscribe();
    let mut known = HashMap::new();
    let mut all = All {
        due: Instant::now(),
        giving_way: None,
        snapshots: Snapshots::default(),
    };
    loop {
        let looked = Instant::now();
        // What changed until now is seen by this look.
        events = events.resubscribe();
        let next = look(&world, &registry, &mut known, &mut all).await;
        tokio::select! {
            () = after(next) => {}
            () = vm_changed(&mut events, &known) => {}
            _ = down.wait_for(|down| *down) => return,
        }
        tokio::time::sleep_until((looked + PACE).into()).await;
    }
}

/// What is remembered beside the VMs.
struct All {
    /// When all are measured: not each time that one of them changes, or a thousand starts would measure a million
    /// times.
    due: Instant,
    /// A VM in the trash is being removed, which may take longer than there is time.
    giving_way: Option<JoinHandle<bool>>,
    snapshots: Snapshots,
}

impl All {
    /// Makes room by what is in the trash. Whether room was made; who takes longer than `limit` is not waited for.
    async fn give_way(&mut self, registry: &Arc<Registry>, limit: Duration) -> bool {
        let giving_way = self.giving_way.get_or_insert_with(|| {
            let registry = Arc::clone(registry);
            tokio::spawn(async move { registry.give_way().await })
        });
        let Ok(gave_way) = tokio::time::timeout(limit, giving_way).await else {
            return false;
        };
        self.giving_way = None;
        gave_way.unwrap_or_default()
    }
}

async fn after(next: Option<Duration>) {
    match next {
        Some(next) => tokio::time::sleep(next).await,
        None => std::future::pending().await,
    }
}

/// Resolves when a VM is watched that was not, or stands otherwise than at the last look. One that ended is missed at
/// the next look.
async fn vm_changed(
    events: &mut broadcast::Receiver<Arc<banger_api::event::Event>>,
    known: &HashMap<VmId, Known>,
) {
    loop {
        match events.recv().await {
            Ok(event) => match &event.kind {
                EventKind::VmChanged { vm } if is_news(known, vm.id, &vm.phase) => return,
                _ => {}
            },
            Err(broadcast::error::RecvError::Lagged(_)) => return,
            // The hub lives as long as the daemon.
            Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
        }
    }
}

fn is_news(known: &HashMap<VmId, Known>, vm: VmId, phase: &Phase) -> bool {
    let stands = known.get(&vm).and_then(|known| known.stands);
    is_watched(phase) && stands != Some(std::mem::discriminant(phase))
}

/// What is remembered of a running VM from one look to the next.
#[derive(Debug, Default)]
struct Known {
    /// Whether it ran, stopped, or was paused.
    stands: Option<Discriminant<Phase>>,
    /// What it had taken of the host, by then.
    taken: Option<u64>,
    went_on: Option<Instant>,
}

/// Looks at everything once. Gives the time to the next look, if a VM runs.
async fn look(
    world: &Arc<World>,
    registry: &Arc<Registry>,
    known: &mut HashMap<VmId, Known>,
    all: &mut All,
) -> Option<Duration> {
    let live: Vec<(Handle, View)> = registry
        .list(false)
        .into_iter()
        .filter(|handle| is_watched(&handle.view.borrow().phase))
        .map(|handle| (handle.clone(), handle.latest()))
        .collect();
    known.retain(|id, _| live.iter().any(|(handle, _)| handle.id == *id));
    if live.is_empty() {
        return None;
    }
    let folder = world.paths.vms();
    let Ok(Ok(room)) = tokio::task::spawn_blocking(move || space(&folder)).await else {
        tracing::warn!("the filesystem of the VMs cannot be measured");
        return Some(AGAIN);
    };
    let paused = live.iter().any(|(_, view)| is_paused_for_room(&view.phase));
    let mark = filesystem(room.available, room.total, UNLIMITED_WRITES, paused);
    let mut next = Duration::from_millis(mark.next_check_ms);
    let records = live.iter().map(|(_, view)| &view.record);
    next = next.min(all.snapshots.tend(world, records).await);
    // What was thrown away goes before anybody is paused, as long as there is the time.
    if mark.verdict == Verdict::PauseGrowing && all.give_way(registry, next).await {
        return Some(Duration::ZERO);
    }
    // All at once: one VM that is slow to answer must not let the others write on.
    let mut told = JoinSet::new();
    let now = Instant::now();
    let is_due = all.due <= now || mark.verdict != Verdict::Ok;
    if is_due {
        all.due = now + Duration::from_millis(mark.next_check_ms);
    } else {
        next = next.min(all.due - now);
    }
    let measured = live.iter().filter(|(handle, _)| {
        let taken = known.get(&handle.id).and_then(|known| known.taken);
        is_due || taken.is_none()
    });
    let measured = measure(world, measured.map(|(_, view)| view)).await;
    for (handle, view) in live {
        let known = known.entry(handle.id).or_default();
        known.stands = Some(std::mem::discriminant(&view.phase));
        let taken = measured.get(&handle.id).copied();
        let grew = taken > known.taken && known.taken.is_some();
        known.taken = taken.or(known.taken);
        let is = Is {
            grew,
            cramped: all.snapshots.is_cramped(handle.id),
            blind: all.snapshots.is_blind(handle.id),
            pauses_itself: pauses_itself(&view),
        };
        match intent(&view.phase, mark.verdict, is) {
            Intent::Nothing => {}
            Intent::Pause => {
                told.spawn(pause(Arc::clone(world), handle, room, is));
            }
            Intent::End => {
                told.spawn(end(Arc::clone(world), handle, room));
            }
            Intent::GoOn if known.went_on.is_some_and(|at| at.elapsed() < GOES_ON_EVERY) => {
                next = next.min(GOES_ON_EVERY);
            }
            Intent::GoOn => {
                known.went_on = Some(Instant::now());
                // Written while it was paused for another reason; it is measured anew.
                known.taken = None;
                told.spawn(go_on(Arc::clone(world), handle));
            }
        }
    }
    if tokio::time::timeout(ANSWER_LIMIT, told.join_all())
        .await
        .is_err()
    {
        tracing::warn!("a VM does not answer whether it was paused for room, or goes on");
    }
    if mark.verdict == Verdict::PauseAll && all.give_way(registry, next).await {
        return Some(Duration::ZERO);
    }
    Some(next)
}

fn is_watched(phase: &Phase) -> bool {
    match phase {
        Phase::Running { .. } | Phase::Stopping { .. } => true,
        // One that a person paused writes nothing.
        Phase::Paused { by } => *by == PausedBy::FullDisk,
        Phase::Stopped { .. } | Phase::Starting { .. } => false,
    }
}

/// Whether a VM that was paused for room may go on.
///
/// # Errors
/// The host's filesystem is still too full, or its copy-on-write file, which cannot grow.
pub(crate) fn has_room(world: &World, record: &VmRecord) -> Result<(), ErrorBody> {
    let (name, folder) = (&record.name, world.paths.vms());
    if record.spec.storage == Storage::Snapshot {
        let layer = Layer::of(world, record, &VmFiles::of(&world.paths, record.id))?;
        if world.storage.snapshot().tend(&layer)?.must_pause {
            let message = format!(
                "VM `{name}` was paused because its copy-on-write file is full, and the host has no room for a larger one"
            );
            return Err(ErrorBody::new(ErrorCode::NoSpace, message)
                .hint("free some space and it goes on by itself"));
        }
    }
    let Ok(room) = space(&folder) else {
        // What cannot be measured stops nobody; the VM is paused again if it must be.
        return Ok(());
    };
    match filesystem(room.available, room.total, UNLIMITED_WRITES, true).verdict {
        Verdict::Ok => Ok(()),
        Verdict::Hold | Verdict::PauseGrowing | Verdict::PauseAll => Err(ErrorBody::new(
            ErrorCode::NoSpace,
            format!(
                "VM `{name}` was paused because the host is full: `{}` has {} MiB free",
                folder.display(),
                room.available >> 20
            ),
        )
        .hint(format!(
            "free {} MiB and it goes on by itself",
            (pause_at(room.total) * 2).saturating_sub(room.available) >> 20
        ))),
    }
}

pub(crate) fn is_paused_for_room(phase: &Phase) -> bool {
    matches!(
        phase,
        Phase::Paused {
            by: PausedBy::FullDisk
        }
    )
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Intent {
    Nothing,
    Pause,
    /// Its VMM is ended: it cannot be paused, and would lose all that it ever wrote.
    End,
    GoOn,
}

/// How a VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Is {
    /// It has taken room since the last look.
    grew: bool,
    /// Its copy-on-write file cannot grow.
    cramped: bool,
    /// Nobody knows how full its copy-on-write file is, and it could be full soon.
    blind: bool,
    /// Its VMM pauses it when a write finds no room, and loses none.
    pauses_itself: bool,
}

/// What is to be done about one VM.
fn intent(phase: &Phase, verdict: Verdict, is: Is) -> Intent {
    let running = matches!(
        phase,
        Phase::Running {
            reachable: true,
            ..
        }
    );
    match (phase, verdict) {
        _ if running && (is.cramped || is.blind) => Intent::Pause,
        // Only what it has not yet written is lost, instead of everything. On a guess nobody is ended.
        (Phase::Running { .. } | Phase::Stopping { .. }, _) if is.cramped => Intent::End,
        // One that writes nothing, and would lose nothing if it did, can still be stopped in order.
        (_, Verdict::PauseAll) if running && (is.grew || !is.pauses_itself) => Intent::Pause,
        // One that stops is let write its last: below the mark there is room kept for that.
        (_, Verdict::PauseGrowing) if running && is.grew => Intent::Pause,
        (phase, Verdict::Ok) if is_paused_for_room(phase) && !is.cramped && !is.blind => {
            Intent::GoOn
        }
        _ => Intent::Nothing,
    }
}

fn pauses_itself(view: &View) -> bool {
    let driver = view.attempt.as_ref().map(|attempt| attempt.driver);
    driver.is_some_and(|driver| capabilities(driver).pause_on_full_disk)
}

/// What each of these VMs has taken of the host.
async fn measure(world: &World, views: impl Iterator<Item = &View>) -> HashMap<VmId, u64> {
    let wanted: Vec<_> = views
        .map(|view| {
            let record = &view.record;
            let pid = view.attempt.as_ref().and_then(|attempt| attempt.vmm_pid);
            let shares_blocks = record.spec.storage == Storage::Reflink;
            (
                record.id,
                VmFiles::of(&world.paths, record.id),
                shares_blocks,
                pid,
            )
        })
        .collect();
    if wanted.is_empty() {
        return HashMap::new();
    }
    let measured = tokio::task::spawn_blocking(move || {
        let of = |(id, files, shares_blocks, pid)| (id, taken(&files, shares_blocks, pid));
        wanted.into_iter().map(of).collect()
    });
    measured.await.unwrap_or_default()
}

/// What a VM has taken of the host. Writes to shared blocks take room that no file shows, so there the VMM's own count
/// of what it wrote comes on top.
fn taken(files: &VmFiles, shares_blocks: bool, vmm_pid: Option<i32>) -> u64 {
    let file = |path: &Path| allocated(path).unwrap_or_default();
    let written = vmm_pid
        .filter(|_| shares_blocks)
        .and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/io")).ok())
        .and_then(|io| read_write_bytes(&io));
    file(&files.overlay()) + file(&files.disk()) + written.unwrap_or_default()
}

fn read_write_bytes(io: &str) -> Option<u64> {
    io.lines()
        .find_map(|line| line.strip_prefix("write_bytes: "))?
        .trim()
        .parse()
        .ok()
}

async fn pause(world: Arc<World>, handle: Handle, room: Space, is: Is) {
    let free = room.available >> 20;
    let why = if is.cramped {
        format!("paused: its copy-on-write file is full, and the host has {free} MiB free")
    } else if is.blind {
        "paused: nobody can say whether its copy-on-write file is full".to_owned()
    } else {
        format!("paused: the host's filesystem has {free} MiB free")
    };
    tell(&world, &handle, Request::Pause, why).await;
}

async fn end(world: Arc<World>, handle: Handle, room: Space) {
    let free = room.available >> 20;
    let why = format!(
        "ended, as it cannot be paused: its copy-on-write file is full, and the host has {free} MiB free"
    );
    tell(&world, &handle, Request::Kill, why).await;
}

async fn go_on(world: Arc<World>, handle: Handle) {
    let why = "goes on: the host has room again".to_owned();
    tell(&world, &handle, Request::Resume, why).await;
}

async fn tell(world: &World, handle: &Handle, request: Request, why: String) {
    let ask = Ask {
        for_room: true,
        ..Ask::new(request)
    };
    match handle.ask(ask).await {
        Ok(_) => note(world, handle.id, "storage", why, None),
        // It may have ended meanwhile.
        Err(error) => {
            tracing::warn!(vm = %handle.id, request = request.verb(), error = error.message, "a VM did not follow what the host's room demands");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNNING: Phase = Phase::Running {
        ready: true,
        reachable: true,
    };

    const fn paused(by: PausedBy) -> Phase {
        Phase::Paused { by }
    }

    const IDLE: Is = Is {
        grew: false,
        cramped: false,
        blind: false,
        pauses_itself: false,
    };
    const GROWS: Is = Is { grew: true, ..IDLE };
    const CRAMPED: Is = Is {
        cramped: true,
        ..IDLE
    };

    #[test]
    fn who_grows_is_paused_first_and_at_the_last_all_whose_writes_would_be_lost() {
        let of = |verdict, is| intent(&RUNNING, verdict, is);
        assert_eq!(of(Verdict::Ok, GROWS), Intent::Nothing);
        assert_eq!(of(Verdict::PauseGrowing, IDLE), Intent::Nothing);
        assert_eq!(of(Verdict::PauseGrowing, GROWS), Intent::Pause);
        assert_eq!(of(Verdict::PauseAll, IDLE), Intent::Pause);
        assert_eq!(of(Verdict::Hold, GROWS), Intent::Nothing);
        let careful = Is {
            pauses_itself: true,
            ..IDLE
        };
        assert_eq!(of(Verdict::PauseAll, careful), Intent::Nothing);
    }

    #[test]
    fn a_vm_that_stands_as_before_is_no_reason_to_look() {
        let vm = VmId::from_uuid(uuid::Uuid::from_u128(1));
        let mut known = HashMap::new();
        assert!(is_news(&known, vm, &RUNNING));
        let stands = Some(std::mem::discriminant(&RUNNING));
        known.insert(
            vm,
            Known {
                stands,
                ..Known::default()
            },
        );
        let booting = Phase::Running {
            ready: false,
            reachable: true,
        };
        assert!(!is_news(&known, vm, &RUNNING) && !is_news(&known, vm, &booting));
        assert!(is_news(&known, vm, &paused(PausedBy::FullDisk)));
        assert!(!is_news(&known, vm, &paused(PausedBy::Person)));
        let other = VmId::from_uuid(uuid::Uuid::from_u128(2));
        assert!(is_news(&known, other, &RUNNING));
    }

    #[test]
    fn only_who_was_paused_for_room_goes_on_by_itself() {
        let of = |by, verdict| intent(&paused(by), verdict, IDLE);
        assert_eq!(of(PausedBy::FullDisk, Verdict::Ok), Intent::GoOn);
        assert_eq!(of(PausedBy::FullDisk, Verdict::Hold), Intent::Nothing);
        assert_eq!(of(PausedBy::FullDisk, Verdict::PauseAll), Intent::Nothing);
        assert_eq!(of(PausedBy::Person, Verdict::Ok), Intent::Nothing);
    }

    #[test]
    fn a_copy_on_write_file_that_cannot_grow_pauses_its_vm_whatever_the_filesystem_says() {
        assert_eq!(intent(&RUNNING, Verdict::Ok, CRAMPED), Intent::Pause);
        let full = paused(PausedBy::FullDisk);
        assert_eq!(intent(&full, Verdict::Ok, CRAMPED), Intent::Nothing);
    }

    #[test]
    fn one_that_cannot_be_paused_is_ended_only_when_its_copy_on_write_file_is_surely_full() {
        let blind = Is {
            blind: true,
            ..IDLE
        };
        assert_eq!(intent(&RUNNING, Verdict::Ok, blind), Intent::Pause);
        let full = paused(PausedBy::FullDisk);
        assert_eq!(intent(&full, Verdict::Ok, blind), Intent::Nothing);
        let stopping = Phase::Stopping {
            deadline: jiff::Timestamp::UNIX_EPOCH,
        };
        let unreachable = Phase::Running {
            ready: true,
            reachable: false,
        };
        for phase in [stopping, unreachable] {
            assert!(is_watched(&phase), "{phase:?}");
            assert_eq!(intent(&phase, Verdict::Ok, CRAMPED), Intent::End);
            assert_eq!(intent(&phase, Verdict::Ok, blind), Intent::Nothing);
            assert_eq!(intent(&phase, Verdict::PauseAll, GROWS), Intent::Nothing);
        }
    }

    #[test]
    fn the_kernels_count_of_a_process_writes_is_read() {
        let io = "rchar: 1\nwchar: 2\nread_bytes: 3\nwrite_bytes: 4096\ncancelled_write_bytes: 0\n";
        assert_eq!(read_write_bytes(io), Some(4096));
        assert_eq!(read_write_bytes(""), None);
    }
}
