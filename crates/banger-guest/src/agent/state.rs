//! What the agent knows and has still to say. Pure: time and the look at the port come in as arguments.

use super::protocol::cut;
use banger_guest::agent_protocol::{FromGuest, GuestStage};
use std::time::{Duration, Instant};

/// How often the ssh port is looked at in the first minute, and how long that minute is.
const QUICK: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(60));
/// How often after it, and when that ends.
const SLOW: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(600));
/// Warnings that are kept, and the bytes of each.
const WARNINGS: usize = 32;
const WARNING_BYTES: usize = 600;

/// See the module.
#[derive(Debug)]
pub(crate) struct State {
    /// Whether the image has an ssh server.
    pub(crate) has_sshd: bool,
    /// Whether the host asked for the end.
    pub(crate) asked_to_power_off: bool,
    agent_uptime_ms: u64,
    image_init_at: Option<Instant>,
    next_look: Option<Instant>,
    /// Said again to every host that connects: stages, ready, warnings, the end.
    lasting: Vec<FromGuest>,
    unsaid: Vec<FromGuest>,
}

impl State {
    /// The state of an agent that started at this uptime.
    pub(crate) fn new(uptime_ms: u64) -> Self {
        Self {
            agent_uptime_ms: uptime_ms,
            has_sshd: true,
            asked_to_power_off: false,
            image_init_at: None,
            next_look: None,
            lasting: Vec::new(),
            unsaid: Vec::new(),
        }
    }

    /// Notes a stage with its uptime in decimal digits. The agent's own is said after the one that came before it.
    pub(crate) fn reached_at(&mut self, stage: GuestStage, uptime_ms: &str) {
        if let Ok(uptime_ms) = uptime_ms.trim().parse() {
            self.say(FromGuest::Stage { stage, uptime_ms });
        }
        if stage == GuestStage::Init {
            let stage = GuestStage::Agent;
            let uptime_ms = self.agent_uptime_ms;
            self.say(FromGuest::Stage { stage, uptime_ms });
        }
    }

    /// Notes a warning, up to a number of them.
    pub(crate) fn warn(&mut self, text: &str) {
        let is_warning = |message: &&FromGuest| matches!(message, FromGuest::Warning { .. });
        if self.lasting.iter().filter(is_warning).count() < WARNINGS {
            let text = cut(text, WARNING_BYTES);
            self.say(FromGuest::Warning { text });
        }
    }

    /// Notes anything; all but an answer is kept for the next host.
    pub(crate) fn say(&mut self, message: FromGuest) {
        if message != FromGuest::Pong {
            self.lasting.push(message.clone());
        }
        self.unsaid.push(message);
    }

    /// A host connected that has heard nothing yet.
    pub(crate) fn say_all_again(&mut self) {
        self.unsaid = self.lasting.clone();
    }

    /// What has not been said to this host.
    pub(crate) fn take_unsaid(&mut self) -> Vec<FromGuest> {
        std::mem::take(&mut self.unsaid)
    }

    /// The image's init took over: from now on the guest may become ready.
    pub(crate) fn image_init_runs(&mut self, now: Instant) {
        self.image_init_at = Some(now);
        if self.has_sshd {
            self.next_look = Some(now);
        } else {
            self.say(FromGuest::Ready);
        }
    }

    /// When the ssh port is to be looked at next.
    pub(crate) fn next_look(&self) -> Option<Instant> {
        self.next_look
    }

    /// Looks at the ssh port if it is time.
    pub(crate) fn look_for_ssh(
        &mut self,
        now: Instant,
        uptime_ms: impl FnOnce() -> u64,
        listens: impl FnOnce() -> bool,
    ) {
        let (Some(since), Some(next)) = (self.image_init_at, self.next_look) else {
            return;
        };
        if next > now {
            return;
        }
        if listens() {
            self.next_look = None;
            let uptime_ms = uptime_ms();
            let stage = GuestStage::Ssh;
            self.say(FromGuest::Stage { stage, uptime_ms });
            self.say(FromGuest::Ready);
            return;
        }
        let waited = now.saturating_duration_since(since);
        self.next_look = [QUICK, SLOW]
            .into_iter()
            .find(|(_, end)| waited < *end)
            .map(|(period, _)| now + period);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stages(messages: &[FromGuest]) -> Vec<GuestStage> {
        messages
            .iter()
            .filter_map(|message| match message {
                FromGuest::Stage { stage, .. } => Some(*stage),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn ready_follows_the_ssh_port_and_is_said_again_to_a_new_host() {
        let start = Instant::now();
        let mut state = State::new(5);
        state.reached_at(GuestStage::Init, "3");
        state.image_init_runs(start);
        state.look_for_ssh(start, || 0, || false);
        assert!(!state.take_unsaid().contains(&FromGuest::Ready));
        let next = state.next_look().unwrap();
        state.look_for_ssh(
            next - Duration::from_millis(1),
            || 0,
            || panic!("too early"),
        );
        state.look_for_ssh(next, || 99, || true);
        assert!(state.take_unsaid().contains(&FromGuest::Ready));
        assert_eq!(state.next_look(), None);
        state.say_all_again();
        let again = state.take_unsaid();
        assert_eq!(
            stages(&again),
            [GuestStage::Init, GuestStage::Agent, GuestStage::Ssh]
        );
        assert_eq!(again.last(), Some(&FromGuest::Ready));
    }

    #[test]
    fn an_image_without_an_ssh_server_is_ready_when_its_init_runs() {
        let mut state = State::new(5);
        state.has_sshd = false;
        state.image_init_runs(Instant::now());
        assert!(state.take_unsaid().contains(&FromGuest::Ready));
        assert_eq!(state.next_look(), None);
    }

    #[test]
    fn the_port_is_looked_at_often_then_seldom_then_never() {
        let start = Instant::now();
        let mut state = State::new(5);
        state.image_init_runs(start);
        let mut period_after = |seconds| {
            let now = start + Duration::from_secs(seconds);
            state.look_for_ssh(now, || 0, || false);
            state.next_look().map(|next| next - now)
        };
        assert_eq!(period_after(1), Some(Duration::from_millis(20)));
        assert_eq!(period_after(61), Some(Duration::from_millis(250)));
        assert_eq!(period_after(601), None);
    }

    #[test]
    fn answers_are_not_said_twice_and_warnings_are_bounded() {
        let mut state = State::new(5);
        state.say(FromGuest::Pong);
        for _ in 0..100 {
            state.warn(&"x".repeat(5000));
        }
        state.say_all_again();
        let said = state.take_unsaid();
        assert_eq!(said.len(), WARNINGS);
        assert!(!said.contains(&FromGuest::Pong));
        assert!(said.iter().all(|message| match message {
            FromGuest::Warning { text } => text.len() == WARNING_BYTES,
            _ => true,
        }));
    }
}
