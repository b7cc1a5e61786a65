//! The snapshots of VMs that run: their copy-on-write files are grown in time, and who cannot be looked at is known.

use super::watermark::{AGAIN, PACE};
use super::{Layer, Tended, Untended};
use crate::record::VmRecord;
use crate::vm::actor::note;
use crate::vm::files::VmFiles;
use crate::world::World;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_core::id::VmId;
use banger_core::spec::Storage;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// How long one look waits for those that tend snapshots; who is slower is seen by the next.
const TEND_LIMIT: Duration = Duration::from_millis(100);
/// How long a VM on a snapshot may run while somebody looks at it, and has not answered: a host that is as slow as that
/// does not write as fast either as a guest might elsewhere, and to pause every VM of it would help nobody. Also how
/// long one may run that was never seen: the start, or an earlier daemon, saw it.
const SLOW_LIMIT: Duration = Duration::from_secs(10);

/// What is remembered of snapshots from one look to the next.
#[derive(Debug, Default)]
pub(super) struct Snapshots {
    watched: HashMap<VmId, Watched>,
}

impl Snapshots {
    /// Its copy-on-write file cannot grow.
    pub(super) fn is_cramped(&self, vm: VmId) -> bool {
        self.watched.get(&vm).is_some_and(|watched| watched.cramped)
    }

    /// Nobody knows how full its copy-on-write file is, and it could be full soon.
    pub(super) fn is_blind(&self, vm: VmId) -> bool {
        self.watched.get(&vm).is_some_and(|watched| watched.blind)
    }

    /// Tends the snapshots for which it is time, side by side, and forgets all others than those of `live`. Gives the
    /// time until it must be done again.
    pub(super) async fn tend<'a>(
        &mut self,
        world: &Arc<World>,
        live: impl Iterator<Item = &'a Arc<VmRecord>>,
    ) -> Duration {
        let live: HashMap<VmId, &Arc<VmRecord>> = live
            .filter(|record| record.spec.storage == Storage::Snapshot)
            .map(|record| (record.id, record))
            .collect();
        self.watched.retain(|id, _| live.contains_key(id));
        let now = Instant::now();
        for (id, record) in &live {
            let watched = self.watched.entry(*id).or_default();
            if watched.tending.is_none() && watched.tend_at.is_none_or(|at| at <= now) {
                let (world, record) = (Arc::clone(world), Arc::clone(record));
                let tending = tokio::task::spawn_blocking(move || {
                    let layer = Layer::of(&world, &record, &VmFiles::of(&world.paths, record.id))?;
                    world.storage.snapshot().tend(&layer)
                });
                watched.tending = Some((now, tending));
            }
        }
        let until = now + TEND_LIMIT;
        let mut next = Duration::MAX;
        for (id, watched) in &mut self.watched {
            if let Some((since, tended)) = watched.answer(until).await
                && let Some(text) = watched.see(since, Instant::now(), tended)
            {
                note(world, *id, "storage", text, None);
            }
            let tend_at = watched.tend_at.unwrap_or(now);
            next = next.min(tend_at.saturating_duration_since(Instant::now()));
        }
        next
    }
}

/// What is remembered of a VM's snapshot.
#[derive(Debug, Default)]
struct Watched {
    /// When it must be tended again.
    tend_at: Option<Instant>,
    /// When it began to be tended, and who does so.
    tending: Option<(Instant, JoinHandle<Result<Tended, Untended>>)>,
    /// When it was last seen, and for how long its copy-on-write file could not be full from then on.
    seen: Option<(Instant, Duration)>,
    cramped: bool,
    blind: bool,
    /// It cannot be tended, which has been told.
    told: bool,
}

impl Watched {
    /// What came of its tending until `until`, if it is tended: when that began, and nothing if it goes on.
    async fn answer(
        &mut self,
        until: Instant,
    ) -> Option<(Instant, Option<Result<Tended, Untended>>)> {
        let (since, tending) = self.tending.as_mut()?;
        let since = *since;
        let Ok(tended) = tokio::time::timeout_at(until.into(), tending).await else {
            return Some((since, None));
        };
        self.tending = None;
        let panicked =
            |error| Untended::Unknown(ErrorBody::from_error(ErrorCode::Internal, &error));
        Some((
            since,
            Some(tended.unwrap_or_else(|error| Err(panicked(error)))),
        ))
    }

    /// Learns from a tending that began at `since` and has answered, or not yet. Gives what is new and worth telling.
    fn see(
        &mut self,
        since: Instant,
        now: Instant,
        tended: Option<Result<Tended, Untended>>,
    ) -> Option<String> {
        match tended {
            Some(Ok(tended)) => {
                self.cramped = tended.must_pause;
                self.blind = false;
                self.told = false;
                // What was seen is no younger than the question.
                self.seen = Some((since, Duration::from_millis(tended.safe_ms)));
                self.tend_at = Some(now + Duration::from_millis(tended.next_check_ms));
                let bytes = tended.grown_to?;
                Some(format!(
                    "its copy-on-write file has {} MiB now",
                    bytes >> 20
                ))
            }
            // Its VM can save what it has in memory, and nothing is made worse.
            Some(Err(Untended::Lost(error))) => {
                self.blind = false;
                self.tend_at = Some(now + AGAIN);
                self.tell(error)
            }
            Some(Err(Untended::Unknown(error))) => {
                self.not_seen(since, now, Duration::ZERO);
                self.tell(error)
            }
            None => {
                self.not_seen(since, now, SLOW_LIMIT);
                None
            }
        }
    }

    /// Soon again. What could be full before that is a reason to pause, but not before `least` has passed.
    fn not_seen(&mut self, since: Instant, now: Instant, least: Duration) {
        let (seen, safe) = *self.seen.get_or_insert((since, SLOW_LIMIT));
        self.blind = now + PACE >= seen + safe.max(least);
        self.tend_at = Some(now + PACE);
    }

    fn tell(&mut self, error: ErrorBody) -> Option<String> {
        if std::mem::replace(&mut self.told, true) {
            return None;
        }
        tracing::error!(
            error = error.message,
            causes = ?error.causes,
            "a snapshot cannot be tended"
        );
        Some(error.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error() -> Option<Result<Tended, Untended>> {
        let error = ErrorBody::new(ErrorCode::Internal, "too many requests");
        Some(Err(Untended::Unknown(error)))
    }

    fn good() -> Option<Result<Tended, Untended>> {
        Some(Ok(Tended {
            next_check_ms: 199,
            safe_ms: 474,
            must_pause: false,
            grown_to: None,
        }))
    }

    #[test]
    fn a_snapshot_that_cannot_be_tended_is_tried_again_at_once_and_its_vm_paused_before_it_is_full()
    {
        let since = Instant::now();
        let at = |ms| since + Duration::from_millis(ms);
        let mut watched = Watched::default();
        assert_eq!(watched.see(since, at(5), good()), None);
        // It is told once, tried again at the pace, and nobody is paused while there is time.
        assert!(watched.see(at(204), at(210), error()).is_some());
        assert_eq!(watched.tend_at, Some(at(210) + PACE));
        assert!(!watched.blind);
        assert_eq!(watched.see(at(230), at(440), error()), None);
        assert!(!watched.blind);
        watched.see(at(460), at(465), error());
        assert!(watched.blind);
        watched.see(at(480), at(485), good());
        assert!(!watched.blind && watched.tend_at == Some(at(684)));
        // One that is lost is not paused for that.
        let lost = Untended::Lost(ErrorBody::new(ErrorCode::Internal, "lost"));
        assert!(watched.see(at(5000), at(5001), Some(Err(lost))).is_some());
        assert!(!watched.blind && watched.tend_at == Some(at(5001) + AGAIN));
    }

    #[test]
    fn a_host_that_is_slow_to_answer_is_given_its_time_and_one_that_never_does_is_not() {
        let since = Instant::now();
        let at = |ms| since + Duration::from_millis(ms);
        let mut watched = Watched::default();
        watched.see(since, at(5), good());
        for ms in [300, 1000, 9_900] {
            watched.see(at(200), at(ms), None);
            assert!(!watched.blind, "{ms}");
        }
        watched.see(at(200), at(10_000), None);
        assert!(watched.blind);
        // Never seen by this daemon, but by whoever started it.
        let mut watched = Watched::default();
        watched.see(since, at(5), error());
        assert!(!watched.blind);
        watched.see(since, at(10_000), error());
        assert!(watched.blind);
    }
}
