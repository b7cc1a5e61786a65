//! VMs in the trash are removed for good when their time is over. Those that must go earlier, because the disk has no
//! room left, go by [`crate::registry::Registry::give_way`].

use crate::server::App;
use jiff::{SignedDuration, Timestamp};
use std::time::Duration;

/// How often the trash is looked at. Nobody waits for it.
const LOOK: Duration = Duration::from_secs(15 * 60);
/// By how much the clock may differ between two looks from the time that has passed.
const DRIFT: SignedDuration = SignedDuration::from_mins(1);
/// The file in the state folder that says when the clock was last found to have been set.
const CLOCK_SET: &str = "clock-set";

/// Looks at the trash for as long as the daemon lives.
pub(crate) async fn keep_emptying(app: App) {
    let mut timer = tokio::time::interval(LOOK);
    let path = app.world.paths.state.join(CLOCK_SET);
    let said = std::fs::read_to_string(&path).ok();
    let set = said.and_then(|said| said.trim().parse::<Timestamp>().ok());
    // One in the future was set back while no daemon ran.
    let mut set = set.map(|set| set.min(Timestamp::now()));
    let mut last: Option<Look> = None;
    loop {
        timer.tick().await;
        let look = Look::now();
        let before_that = last.replace(look);
        if before_that.is_some_and(|last| was_set(last, look)) {
            // What is in the trash may seem to be there for years.
            tracing::info!(
                "the clock was changed: the trash is not emptied automatically for one full keep period"
            );
            set = Some(look.wall);
            let noted =
                banger_host::storage::replace_file(&path, look.wall.to_string().as_bytes(), 0o600);
            if let Err(error) = noted {
                tracing::warn!(%error, "a daemon that comes after this one will not know that");
            }
        }
        // The first look knows nothing of the clock yet.
        if before_that.is_some()
            && let Some(until) = before(look.wall, app.world.config.trash.keep)
            && set.is_none_or(|set| set <= until)
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

/// What the clock said, and for how long the host had been up, asleep or not.
#[derive(Debug, Clone, Copy)]
struct Look {
    wall: Timestamp,
    up: SignedDuration,
}

impl Look {
    fn now() -> Self {
        let up = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Self {
            wall: Timestamp::now(),
            up: SignedDuration::from_secs(up.tv_sec),
        }
    }
}

/// Whether somebody set the clock between two looks.
fn was_set(last: Look, now: Look) -> bool {
    let (moved, passed) = (now.wall.duration_since(last.wall), now.up - last.up);
    let drift = moved.checked_sub(passed);
    drift.is_none_or(|drift| drift.abs() > DRIFT)
}

fn before(now: Timestamp, keep: Duration) -> Option<Timestamp> {
    let keep = SignedDuration::try_from(keep).ok()?;
    now.checked_sub(keep).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_was_set_is_told_from_a_host_that_slept() {
        let start = Look {
            wall: Timestamp::UNIX_EPOCH,
            up: SignedDuration::from_secs(10),
        };
        let later = |wall, up| Look {
            wall: start.wall + SignedDuration::from_mins(wall),
            up: start.up + SignedDuration::from_mins(up),
        };
        assert!(!was_set(start, later(15, 15)));
        assert!(!was_set(start, later(9 * 60, 9 * 60)), "it slept");
        assert!(was_set(start, later(20, 15)));
        assert!(was_set(start, later(-15, 15)));
        assert!(was_set(start, later(60 * 24 * 365 * 50, 15)));
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
