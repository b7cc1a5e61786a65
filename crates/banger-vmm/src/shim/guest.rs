//! What a guest was heard to say and do, and what follows from it. Pure.

use crate::console::KernelWord;
use crate::protocol::{BootTimes, LastEvent};
use banger_guest::agent_protocol::{GuestEnd, GuestStage};
use std::time::{Duration, Instant};

/// How long after the agent's farewell a guest may still be busy going down, where its console says nothing.
const FAREWELL_LIMIT: Duration = Duration::from_secs(10);
/// The most warnings that are passed on over a VM's life.
const MAX_WARNINGS: u32 = 64;
const MAX_WARNING_CHARS: usize = 512;

/// The story of one guest.
#[derive(Debug, Default)]
pub(super) struct Guest {
    pub(super) ready: bool,
    /// The agent runs and is connected.
    pub(super) agent: bool,
    /// The VMM's first sign of life, in milliseconds since its exec.
    pub(super) vmm_up: Option<u64>,
    ready_at: Option<u64>,
    /// When each stage was told, and at which uptime it was reached.
    stages: [Option<(u64, u64)>; 4],
    /// The earliest guess of the kernel's start.
    kernel_started: Option<u64>,
    bye: Option<GuestEnd>,
    agent_closed: Option<Instant>,
    powered_down: bool,
    restarting: bool,
    panicked: bool,
    /// The VMM's own word for the machine's end.
    shutdown: Option<LastEvent>,
    /// A client had the VMM ended.
    pub(super) ended: bool,
    warnings: u32,
}

impl Guest {
    /// A stage was told `now` (since the VMM's exec) and was reached at `uptime` (since the kernel's start), both in
    /// milliseconds. Messages may come late, but never early, so the earliest guess of the kernel's start is best.
    pub(super) fn stage(&mut self, stage: GuestStage, uptime: u64, now: u64) {
        let guess = now.saturating_sub(uptime);
        let started = self.kernel_started.map_or(guess, |known| known.min(guess));
        self.kernel_started = Some(started);
        self.stages[stage as usize].get_or_insert((now, uptime));
        if stage >= GuestStage::Agent {
            self.agent_speaks();
        }
    }

    /// The boot's times, as far as they are known.
    pub(super) fn boot(&self) -> BootTimes {
        let at = |stage: GuestStage| {
            let (told, uptime) = self.stages[stage as usize]?;
            let started = self.kernel_started?;
            Some(started.saturating_add(uptime).min(told))
        };
        BootTimes {
            vmm_up: self.vmm_up,
            kernel: at(GuestStage::Init),
            banger_init: at(GuestStage::ImageInit),
            agent: at(GuestStage::Agent),
            ssh: at(GuestStage::Ssh),
            ready: self.ready_at,
        }
    }

    pub(super) fn ready(&mut self, now: u64) {
        self.ready = true;
        self.ready_at.get_or_insert(now);
        self.agent_speaks();
    }

    /// Something came that only a running agent says.
    pub(super) fn agent_speaks(&mut self) {
        self.agent = true;
        self.agent_closed = None;
    }

    pub(super) fn agent_closed(&mut self, now: Instant) {
        self.agent = false;
        self.agent_closed.get_or_insert(now);
    }

    pub(super) fn bye(&mut self, end: GuestEnd) {
        self.bye = Some(end);
    }

    pub(super) fn kernel_said(&mut self, word: KernelWord) {
        match word {
            KernelWord::PowerDown => self.powered_down = true,
            KernelWord::Restarting => self.restarting = true,
            KernelWord::Panic => self.panicked = true,
        }
    }

    pub(super) fn panicked(&mut self) {
        self.panicked = true;
    }

    /// QEMU told why the machine ends.
    pub(super) fn vmm_shutdown(&mut self, reason: &str) {
        let event = match reason {
            "guest-shutdown" => LastEvent::GuestPoweroff,
            "guest-reset" => LastEvent::GuestReboot,
            "guest-panic" => LastEvent::GuestPanic,
            _ => return,
        };
        self.shutdown.get_or_insert(event);
    }

    /// Bounded, escaped text of a warning, unless there were too many.
    pub(super) fn warning(&mut self, text: &str) -> Option<String> {
        self.warnings = self.warnings.saturating_add(1);
        (self.warnings <= MAX_WARNINGS).then(|| escaped(text, MAX_WARNING_CHARS))
    }

    fn said_off(&self) -> bool {
        matches!(self.bye, Some(GuestEnd::Poweroff | GuestEnd::Halt))
    }

    /// Whether the guest is off though its VMM runs on, as Firecracker's does.
    pub(super) fn is_off(&self, now: Instant) -> bool {
        let silent = self.off_at().is_some_and(|deadline| deadline <= now);
        (self.powered_down && (self.said_off() || !self.agent)) || silent
    }

    /// When the guest will count as off, if nothing more is heard.
    pub(super) fn off_at(&self) -> Option<Instant> {
        let closed = self.agent_closed.filter(|_| self.said_off())?;
        Some(closed + FAREWELL_LIMIT)
    }

    /// The guest is off, and its VMM is ended because of it.
    pub(super) fn off(&mut self) {
        self.shutdown.get_or_insert(LastEvent::GuestPoweroff);
    }

    /// What ended the guest, now that its VMM has ended with `code`. `exits_on_reset`: a code of 0 means a reset.
    pub(super) fn last_event(&self, code: Option<i32>, exits_on_reset: bool) -> LastEvent {
        if self.panicked {
            return LastEvent::GuestPanic;
        }
        if let Some(event) = self.shutdown {
            return event;
        }
        if self.ended {
            return LastEvent::Ended;
        }
        let reset = exits_on_reset && code == Some(0);
        match (self.restarting || reset, self.said_off()) {
            (true, _) => LastEvent::GuestReboot,
            (false, true) => LastEvent::GuestPoweroff,
            (false, false) => LastEvent::None,
        }
    }
}

/// `text` without control characters, cut after `max` characters.
pub(super) fn escaped(text: &str, max: usize) -> String {
    let mut escaped = String::new();
    for c in text.chars().take(max) {
        // Direction marks and the like could make a terminal show something else.
        if c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
        {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemus_word_for_the_end_wins_over_a_kill_that_came_later() {
        let mut guest = Guest::default();
        guest.vmm_shutdown("guest-shutdown");
        guest.ended = true;
        assert_eq!(guest.last_event(Some(0), false), LastEvent::GuestPoweroff);
        let mut guest = Guest::default();
        guest.vmm_shutdown("host-signal");
        guest.ended = true;
        assert_eq!(guest.last_event(Some(0), false), LastEvent::Ended);
    }

    #[test]
    fn a_reset_after_a_panic_is_a_panic() {
        let mut guest = Guest::default();
        guest.kernel_said(KernelWord::Panic);
        guest.vmm_shutdown("guest-reset");
        assert_eq!(guest.last_event(Some(0), false), LastEvent::GuestPanic);
    }

    #[test]
    fn an_unexplained_end_is_no_event_of_the_guest() {
        assert_eq!(Guest::default().last_event(Some(1), true), LastEvent::None);
        assert_eq!(Guest::default().last_event(None, false), LastEvent::None);
        assert_eq!(
            Guest::default().last_event(Some(0), true),
            LastEvent::GuestReboot
        );
    }

    #[test]
    fn a_guest_without_agent_is_off_by_its_console_alone() {
        let mut guest = Guest::default();
        let now = Instant::now();
        assert!(!guest.is_off(now));
        guest.kernel_said(KernelWord::PowerDown);
        assert!(guest.is_off(now));
        guest.off();
        guest.ended = true;
        assert_eq!(guest.last_event(None, true), LastEvent::GuestPoweroff);
    }

    #[test]
    fn while_an_agent_speaks_a_console_line_alone_ends_nothing() {
        let mut guest = Guest::default();
        let now = Instant::now();
        guest.ready(5);
        guest.kernel_said(KernelWord::PowerDown);
        assert!(!guest.is_off(now));
        guest.bye(GuestEnd::Poweroff);
        assert!(guest.is_off(now));
    }

    #[test]
    fn a_farewell_counts_ten_seconds_after_the_agent_is_gone() {
        let mut guest = Guest::default();
        let now = Instant::now();
        guest.ready(5);
        guest.bye(GuestEnd::Halt);
        assert!(!guest.is_off(now) && guest.off_at().is_none());
        guest.agent_closed(now);
        assert!(!guest.is_off(now));
        assert!(guest.is_off(now + FAREWELL_LIMIT));
        let mut rebooting = Guest::default();
        rebooting.ready(5);
        rebooting.bye(GuestEnd::Reboot);
        rebooting.agent_closed(now);
        assert!(!rebooting.is_off(now + FAREWELL_LIMIT));
    }

    #[test]
    fn stages_told_late_are_set_back_to_when_they_happened() {
        let mut guest = Guest::default();
        // The kernel began at 900 ms; three stages come in one go at 3000 ms.
        guest.stage(GuestStage::Init, 700, 3000);
        guest.stage(GuestStage::ImageInit, 1200, 3000);
        guest.stage(GuestStage::Agent, 2100, 3000);
        let boot = guest.boot();
        assert_eq!(
            (boot.kernel, boot.banger_init, boot.agent),
            (Some(1600), Some(2100), Some(3000))
        );
        // A lie is never later than its arrival, and the first word counts.
        guest.stage(GuestStage::Ssh, u64::MAX, 9000);
        assert!(guest.boot().ssh <= Some(9000));
        guest.stage(GuestStage::Agent, 9000, 9000);
        assert!(guest.boot().agent <= Some(3000));
    }

    #[test]
    fn warnings_are_bounded_in_number_and_length_and_harmless_on_a_terminal() {
        let mut guest = Guest::default();
        let text = format!("\u{1b}[2Jdisk\n{}", "x".repeat(5000));
        let warning = guest.warning(&text).unwrap();
        assert!(warning.starts_with("\\u{1b}[2Jdisk\\nxxx"));
        assert!(warning.len() < 600 && !warning.contains(char::is_control));
        let passed = (0..1000).filter(|_| guest.warning("w").is_some()).count();
        assert_eq!(passed, 63);
    }
}
