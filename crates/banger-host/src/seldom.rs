//! Lines of a log that somebody else can cause at will: each is told at once the first time, then seldom, with how
//! often it came meanwhile.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

/// The least time between two lines about the same.
pub const PAUSE: Duration = Duration::from_secs(10);
/// The most different lines that are remembered; of more, none is held back.
const MAX_LINES: usize = 64;

/// What was told not long ago.
#[derive(Debug, Default)]
pub struct Seldom {
    told: BTreeMap<String, Told>,
}

#[derive(Debug)]
struct Told {
    at: Instant,
    held_back: u64,
}

/// How often something came without being told; displayed as an addition to a line, empty for never.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldBack(pub u64);

impl fmt::Display for HeldBack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            times => write!(f, " (and {times} times since this was last told)"),
        }
    }
}

impl Seldom {
    /// Whether `line` is to be told at `now`, and how often it came since it was last told.
    pub fn tell(&mut self, line: &str, now: Instant) -> Option<HeldBack> {
        let is_recent = |told: &Told| now.saturating_duration_since(told.at) < PAUSE;
        if let Some(told) = self.told.get_mut(line) {
            if is_recent(told) {
                told.held_back += 1;
                return None;
            }
            let held_back = HeldBack(std::mem::take(&mut told.held_back));
            told.at = now;
            return Some(held_back);
        }
        self.told.retain(|_, told| is_recent(told));
        if self.told.len() < MAX_LINES {
            let told = Told {
                at: now,
                held_back: 0,
            };
            self.told.insert(line.to_owned(), told);
        }
        Some(HeldBack(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_all_the_time_is_told_seldom_and_counted() {
        let mut seldom = Seldom::default();
        let start = Instant::now();
        let mut told = Vec::new();
        for tenth in 0..250 {
            let now = start + Duration::from_millis(100 * tenth);
            told.extend(seldom.tell("flushed", now).map(|held| (tenth, held.0)));
        }
        assert_eq!(told, [(0, 0), (100, 99), (200, 99)]);
        // Something else is told at once.
        let now = start + Duration::from_secs(25);
        assert_eq!(seldom.tell("failed", now), Some(HeldBack(0)));
        assert_eq!(seldom.tell("failed", now), None);
    }

    #[test]
    fn no_number_of_different_lines_fills_the_memory() {
        let mut seldom = Seldom::default();
        let now = Instant::now();
        for number in 0..1000 {
            assert!(seldom.tell(&number.to_string(), now).is_some());
        }
        assert_eq!(seldom.told.len(), MAX_LINES);
        let later = now + PAUSE;
        assert!(seldom.tell("later", later).is_some());
        assert_eq!(seldom.told.len(), 1);
    }

    #[test]
    fn only_what_was_held_back_is_counted_in_the_line() {
        assert_eq!(HeldBack(0).to_string(), "");
        assert_eq!(
            HeldBack(7).to_string(),
            " (and 7 times since this was last told)"
        );
    }
}
