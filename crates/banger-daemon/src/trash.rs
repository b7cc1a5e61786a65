//! VMs in the trash are removed for ever when their time is over, and earlier when the disk has no room left.

use crate::server::App;
use jiff::{SignedDuration, Timestamp};
use std::time::Duration;

/// How often the trash is looked at. Nobody waits for it.
const LOOK: Duration = Duration::from_secs(15 * 60);

/// Looks at the trash for as long as the daemon lives.
pub(crate) async fn keep_emptying(app: App) {
    let mut timer = tokio::time::interval(LOOK);
    let mut last = None;
    loop {
        timer.tick().await;
        let now = Timestamp::now();
        // A clock that was set leaves everything as it is until the next look.
        if clock_went_on(last.replace(now), now)
            && let Some(until) = before(now, app.world.config.trash.keep)
        {
            empty(&app, until).await;
        }
    }
}

async fn empty(app: &App, until: Timestamp) {
    for outcome in app.registry.empty_trash(until).await {
        match outcome.error {
            None => {
                tracing::info!(vm = %outcome.id, name = %outcome.name, "its time in the trash is over")
            }
            Some(error) => {
                tracing::warn!(vm = %outcome.id, error = error.message, "it cannot be removed from the trash")
            }
        }
    }
}

/// Whether the clock moved by about the time between two looks. The first look trusts nothing but what it measures
/// itself, so it removes nothing.
fn clock_went_on(last: Option<Timestamp>, now: Timestamp) -> bool {
    let Some(last) = last else { return false };
    let moved = now.duration_since(last);
    moved > SignedDuration::ZERO && moved.unsigned_abs() < LOOK * 4
}

fn before(now: Timestamp, keep: Duration) -> Option<Timestamp> {
    let keep = SignedDuration::try_from(keep).ok()?;
    now.checked_sub(keep).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_was_set_empties_nothing() {
        let now = Timestamp::UNIX_EPOCH + SignedDuration::from_hours(24);
        let after = |duration| Some(now - duration);
        assert!(!clock_went_on(None, now));
        assert!(clock_went_on(after(SignedDuration::from_mins(15)), now));
        assert!(!clock_went_on(after(SignedDuration::from_hours(24)), now));
        assert!(!clock_went_on(after(SignedDuration::from_mins(-15)), now));
    }

    #[test]
    fn time_is_over_when_the_keeping_time_has_passed() {
        let now = Timestamp::UNIX_EPOCH + SignedDuration::from_hours(24 * 30);
        let until = before(now, Duration::from_secs(7 * 24 * 3600)).unwrap();
        assert_eq!(
            until,
            Timestamp::UNIX_EPOCH + SignedDuration::from_hours(24 * 23)
        );
        assert_eq!(before(now, Duration::MAX), None);
    }
}
