//! Why a VM stopped, from what its VMM left.

use banger_core::phase::{GoingDown, StopReason};
use banger_vmm::protocol::{Exit, LastEvent};

/// What the daemon itself had asked for when the VMM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Intent {
    /// Nothing.
    None,
    /// A stop; `forced` once the guest's time was up.
    Stop { forced: bool },
    /// A kill.
    Kill,
}

/// The reason why a VM is stopped now.
pub(super) fn reason(intent: Intent, exit: Option<&Exit>) -> StopReason {
    match intent {
        Intent::Kill => return StopReason::Killed,
        Intent::Stop { forced: true } => return StopReason::AskedThenForced,
        Intent::Stop { forced: false } => return StopReason::Asked,
        Intent::None => {}
    }
    let Some(exit) = exit else {
        return StopReason::Unknown;
    };
    match exit.last_event {
        LastEvent::GuestPoweroff if exit.shutdown_asked => StopReason::Asked,
        LastEvent::GuestPoweroff => StopReason::GuestPoweroff,
        LastEvent::GuestReboot => StopReason::GuestReboot,
        LastEvent::GuestPanic => StopReason::GuestPanic,
        LastEvent::Ended => StopReason::Killed,
        LastEvent::None => {
            let status = match (exit.signal, exit.code) {
                (Some(signal), _) => format!("signal {signal}"),
                (None, Some(code)) => format!("exit status {code}"),
                (None, None) => "unknown status".to_owned(),
            };
            StopReason::VmmDied { status }
        }
    }
}

/// `why`, or what goes down if that is what the VM was stopped for. What ended it by itself meanwhile stays the reason.
pub(super) fn or_going_down(why: StopReason, going_down: Option<GoingDown>) -> StopReason {
    match (going_down, &why) {
        (
            Some(going_down),
            StopReason::Asked
            | StopReason::AskedThenForced
            | StopReason::Killed
            | StopReason::StartCancelled,
        ) => going_down.stop_reason(),
        (Some(_) | None, _) => why,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_for_the_host_is_told_from_one_that_a_person_wanted() {
        let host = Some(GoingDown::Host);
        assert_eq!(
            or_going_down(StopReason::AskedThenForced, host),
            StopReason::HostShutDown
        );
        assert_eq!(
            or_going_down(StopReason::StartCancelled, Some(GoingDown::User)),
            StopReason::UserLoggedOut
        );
        assert_eq!(
            or_going_down(StopReason::GuestPanic, host),
            StopReason::GuestPanic
        );
        assert_eq!(or_going_down(StopReason::Asked, None), StopReason::Asked);
    }

    fn exit(last_event: LastEvent) -> Exit {
        Exit {
            vm: String::new(),
            attempt: String::new(),
            code: None,
            signal: Some(11),
            last_event,
            shutdown_asked: false,
            at_unix_ms: 0,
            stderr: String::new(),
        }
    }

    #[test]
    fn what_was_asked_for_names_the_reason_before_what_the_vmm_left() {
        let panic = exit(LastEvent::GuestPanic);
        assert_eq!(reason(Intent::Kill, Some(&panic)), StopReason::Killed);
        assert_eq!(
            reason(Intent::Stop { forced: true }, Some(&panic)),
            StopReason::AskedThenForced
        );
        assert_eq!(reason(Intent::None, Some(&panic)), StopReason::GuestPanic);
    }

    #[test]
    fn a_vmm_that_dies_by_itself_is_told_from_a_guest_that_powers_off() {
        let died = StopReason::VmmDied {
            status: "signal 11".into(),
        };
        assert_eq!(reason(Intent::None, Some(&exit(LastEvent::None))), died);
        assert_eq!(
            reason(Intent::None, Some(&exit(LastEvent::GuestPoweroff))),
            StopReason::GuestPoweroff
        );
        assert_eq!(reason(Intent::None, None), StopReason::Unknown);
    }
}
