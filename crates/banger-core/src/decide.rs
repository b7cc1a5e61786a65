//! The decision table: how a request to a VM is answered, before anything touches the host.
//! `ARCHITECTURE.md` has it as a table.

use crate::phase::{PausedBy, Phase};

/// A request to one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Request {
    /// Boot it.
    Start,
    /// Ask the guest to shut down, then escalate.
    Stop,
    /// End the VMM at once.
    Kill,
    /// Stop, then start.
    Restart,
    /// Pause its vCPUs.
    Pause,
    /// Let its vCPUs run on.
    Resume,
    /// Change the spec.
    Set {
        /// The change holds at once, whatever the VM does.
        live: bool,
    },
    /// Throw its overlay away.
    Reset,
    /// Put it into the trash, or remove it for good.
    Delete {
        /// Kill it first if it is live.
        force: bool,
        /// Remove record and files for good.
        purge: bool,
    },
    /// Bring it back from the trash.
    Undelete,
}

impl Request {
    /// The verb, as typed on the command line.
    pub const fn verb(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Kill => "kill",
            Self::Restart => "restart",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Set { .. } => "set",
            Self::Reset => "reset",
            Self::Delete { .. } => "delete",
            Self::Undelete => "undelete",
        }
    }
}

/// Where a VM stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing<'a> {
    /// It is an ordinary VM in this phase.
    Present(&'a Phase),
    /// It is in the trash.
    Trashed,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Boot it.
    Start,
    /// Ask it to shut down.
    Stop,
    /// Let it run on, then ask it to shut down.
    ResumeThenStop,
    /// Ask it to shut down, and start it when it has.
    StopThenStart,
    /// Let it run on, ask it to shut down, and start it when it has.
    ResumeThenStopThenStart,
    /// It is stopping already: start it when it has stopped.
    ThenStart,
    /// Cancel the start and unwind it.
    CancelStart,
    /// End the VMM.
    Kill,
    /// Stop waiting for the guest and end the VMM.
    Escalate,
    /// Pause it.
    Pause,
    /// Resume it.
    Resume,
    /// Record the new spec; what holds at once is done at once.
    Set,
    /// Record the new spec when the start that is under way has ended.
    SetAfterStart,
    /// Throw its overlay away.
    Reset,
    /// Put it into the trash.
    Trash,
    /// Remove record and files for good.
    Purge,
    /// End the VMM, then put it into the trash.
    KillThenTrash,
    /// End the VMM, then remove record and files for good.
    KillThenPurge,
    /// Bring it back from the trash.
    Undelete,
}

/// Why a request is refused. Each says what to do instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Deny {
    /// Paused: resume it.
    Paused,
    /// Paused because the host's disk is full: free space or kill it.
    PausedByFullDisk,
    /// A start is under way: wait for it or stop it.
    Starting,
    /// A stop is under way: wait for it or restart it.
    Stopping,
    /// It runs: stop it first.
    Running,
    /// It is stopped: start it first.
    Stopped,
    /// A process of it is alive but does not answer: kill it first.
    Unreachable,
    /// It is live: say `--force`.
    NeedsForce,
    /// It is in the trash.
    Trashed,
}

/// How a request is answered.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Decision {
    /// Do this.
    Run(Action),
    /// The same thing is under way: wait for its end.
    Join,
    /// Nothing is to be done.
    AlreadyThere,
    /// Refused.
    Deny(Deny),
}

/// Judges `request` for a VM that stands so. Every pair is written out.
pub fn decide(standing: Standing<'_>, request: Request) -> Decision {
    let phase = match standing {
        Standing::Present(phase) => phase,
        Standing::Trashed => return decide_trashed(request),
    };
    use Decision::{AlreadyThere, Deny as Refuse, Join, Run};
    match (request, phase) {
        (Request::Start, Phase::Stopped { .. }) => Run(Action::Start),
        (Request::Start, Phase::Starting { .. }) => Join,
        (
            Request::Start,
            Phase::Running {
                reachable: true, ..
            },
        ) => AlreadyThere,
        (
            Request::Start,
            Phase::Running {
                reachable: false, ..
            },
        ) => Refuse(Deny::Unreachable),
        (
            Request::Start,
            Phase::Paused {
                by: PausedBy::Person,
            },
        ) => Refuse(Deny::Paused),
        (
            Request::Start,
            Phase::Paused {
                by: PausedBy::FullDisk,
            },
        ) => Refuse(Deny::PausedByFullDisk),
        (Request::Start, Phase::Stopping { .. }) => Refuse(Deny::Stopping),

        (Request::Stop, Phase::Stopped { .. }) => AlreadyThere,
        (Request::Stop, Phase::Starting { .. }) => Run(Action::CancelStart),
        (
            Request::Stop,
            Phase::Running {
                reachable: true, ..
            },
        ) => Run(Action::Stop),
        (
            Request::Stop,
            Phase::Running {
                reachable: false, ..
            },
        ) => Refuse(Deny::Unreachable),
        (
            Request::Stop,
            Phase::Paused {
                by: PausedBy::Person,
            },
        ) => Run(Action::ResumeThenStop),
        (
            Request::Stop,
            Phase::Paused {
                by: PausedBy::FullDisk,
            },
        ) => Refuse(Deny::PausedByFullDisk),
        (Request::Stop, Phase::Stopping { .. }) => Join,

        (Request::Kill, Phase::Stopped { .. }) => AlreadyThere,
        (Request::Kill, Phase::Starting { .. }) => Run(Action::CancelStart),
        (Request::Kill, Phase::Running { .. } | Phase::Paused { .. }) => Run(Action::Kill),
        (Request::Kill, Phase::Stopping { .. }) => Run(Action::Escalate),

        (Request::Restart, Phase::Stopped { .. }) => Run(Action::Start),
        (Request::Restart, Phase::Starting { .. }) => Join,
        (
            Request::Restart,
            Phase::Running {
                reachable: true, ..
            },
        ) => Run(Action::StopThenStart),
        (
            Request::Restart,
            Phase::Running {
                reachable: false, ..
            },
        ) => Refuse(Deny::Unreachable),
        (
            Request::Restart,
            Phase::Paused {
                by: PausedBy::Person,
            },
        ) => Run(Action::ResumeThenStopThenStart),
        (
            Request::Restart,
            Phase::Paused {
                by: PausedBy::FullDisk,
            },
        ) => Refuse(Deny::PausedByFullDisk),
        (Request::Restart, Phase::Stopping { .. }) => Run(Action::ThenStart),

        (Request::Pause | Request::Resume, Phase::Stopped { .. }) => Refuse(Deny::Stopped),
        (Request::Pause | Request::Resume, Phase::Starting { .. }) => Refuse(Deny::Starting),
        (
            Request::Pause | Request::Resume,
            Phase::Running {
                reachable: false, ..
            },
        ) => Refuse(Deny::Unreachable),
        (
            Request::Pause,
            Phase::Running {
                reachable: true, ..
            },
        ) => Run(Action::Pause),
        (
            Request::Resume,
            Phase::Running {
                reachable: true, ..
            },
        ) => AlreadyThere,
        (Request::Pause, Phase::Paused { .. }) => AlreadyThere,
        (Request::Resume, Phase::Paused { .. }) => Run(Action::Resume),
        (Request::Pause | Request::Resume, Phase::Stopping { .. }) => Refuse(Deny::Stopping),

        (Request::Set { live: true }, Phase::Starting { .. }) => Run(Action::SetAfterStart),
        (
            Request::Set { live: true },
            Phase::Stopped { .. }
            | Phase::Running { .. }
            | Phase::Paused { .. }
            | Phase::Stopping { .. },
        )
        | (Request::Set { live: false }, Phase::Stopped { .. }) => Run(Action::Set),
        (Request::Reset, Phase::Stopped { .. }) => Run(Action::Reset),
        (
            Request::Set { live: false } | Request::Reset,
            Phase::Starting { .. } | Phase::Running { .. } | Phase::Paused { .. },
        ) => Refuse(Deny::Running),
        (Request::Set { live: false } | Request::Reset, Phase::Stopping { .. }) => {
            Refuse(Deny::Stopping)
        }

        (Request::Undelete, _) => AlreadyThere,

        (Request::Delete { purge: false, .. }, Phase::Stopped { .. }) => Run(Action::Trash),
        (Request::Delete { purge: true, .. }, Phase::Stopped { .. }) => Run(Action::Purge),
        (
            Request::Delete { force: false, .. },
            Phase::Starting { .. }
            | Phase::Running { .. }
            | Phase::Paused { .. }
            | Phase::Stopping { .. },
        ) => Refuse(Deny::NeedsForce),
        (
            Request::Delete { force: true, purge },
            Phase::Starting { .. }
            | Phase::Running { .. }
            | Phase::Paused { .. }
            | Phase::Stopping { .. },
        ) => Run(if purge {
            Action::KillThenPurge
        } else {
            Action::KillThenTrash
        }),
    }
}

fn decide_trashed(request: Request) -> Decision {
    match request {
        Request::Stop | Request::Kill | Request::Delete { purge: false, .. } => {
            Decision::AlreadyThere
        }
        Request::Delete { purge: true, .. } => Decision::Run(Action::Purge),
        Request::Undelete => Decision::Run(Action::Undelete),
        Request::Start
        | Request::Restart
        | Request::Pause
        | Request::Resume
        | Request::Set { .. }
        | Request::Reset => Decision::Deny(Deny::Trashed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::phase::{StartStep, StopReason};
    use proptest::prelude::*;

    fn phases() -> Vec<Phase> {
        let mut phases = vec![
            Phase::Stopped {
                why: StopReason::NeverStarted,
            },
            Phase::Stopped {
                why: StopReason::StartFailed {
                    step: StartStep::OpenFiles,
                    error: "full".into(),
                },
            },
            Phase::Starting {
                step: StartStep::LeasePort,
            },
            Phase::Paused {
                by: PausedBy::Person,
            },
            Phase::Paused {
                by: PausedBy::FullDisk,
            },
            Phase::Stopping {
                deadline: jiff::Timestamp::UNIX_EPOCH,
            },
        ];
        for ready in [false, true] {
            phases.extend([true, false].map(|reachable| Phase::Running { ready, reachable }));
        }
        phases
    }

    const fn delete(force: bool, purge: bool) -> Request {
        Request::Delete { force, purge }
    }

    const REQUESTS: [Request; 14] = [
        Request::Start,
        Request::Stop,
        Request::Kill,
        Request::Restart,
        Request::Pause,
        Request::Resume,
        Request::Set { live: false },
        Request::Set { live: true },
        Request::Reset,
        delete(false, false),
        delete(true, false),
        delete(false, true),
        delete(true, true),
        Request::Undelete,
    ];

    #[test]
    fn a_failed_vm_takes_every_verb_that_a_stopped_one_takes() {
        let [fresh, failed] = [&phases()[0], &phases()[1]].map(Clone::clone);
        for request in REQUESTS {
            assert_eq!(
                decide(Standing::Present(&fresh), request),
                decide(Standing::Present(&failed), request)
            );
        }
    }

    #[test]
    fn an_unreachable_vm_may_only_be_killed_and_be_given_or_denied_the_network() {
        let phase = Phase::Running {
            ready: true,
            reachable: false,
        };
        let allowed: Vec<_> = REQUESTS
            .into_iter()
            .filter(|&r| matches!(decide(Standing::Present(&phase), r), Decision::Run(_)))
            .collect();
        assert_eq!(
            allowed,
            [
                Request::Kill,
                Request::Set { live: true },
                delete(true, false),
                delete(true, true),
            ]
        );
    }

    #[test]
    fn a_live_vm_is_never_trashed_without_force() {
        for phase in phases().iter().filter(|p| p.is_live()) {
            for purge in [false, true] {
                let decision = decide(Standing::Present(phase), delete(false, purge));
                assert_eq!(decision, Decision::Deny(Deny::NeedsForce), "{phase:?}");
            }
        }
    }

    #[test]
    fn nothing_but_a_stopped_vm_is_started_reset_or_changed_at_its_roots() {
        for phase in phases().iter().filter(|p| p.is_live()) {
            for request in [Request::Set { live: false }, Request::Reset, Request::Start] {
                assert!(
                    !matches!(decide(Standing::Present(phase), request), Decision::Run(_)),
                    "{phase:?} {request:?}"
                );
            }
        }
    }

    #[test]
    fn kill_is_never_refused() {
        for phase in &phases() {
            assert!(
                !matches!(
                    decide(Standing::Present(phase), Request::Kill),
                    Decision::Deny(_)
                ),
                "{phase:?}"
            );
        }
        assert_eq!(
            decide(Standing::Trashed, Request::Kill),
            Decision::AlreadyThere
        );
    }

    #[test]
    fn what_is_in_the_trash_is_purged_only_when_that_is_said() {
        for force in [false, true] {
            let trashed = |purge| decide(Standing::Trashed, delete(force, purge));
            assert_eq!(trashed(false), Decision::AlreadyThere);
            assert_eq!(trashed(true), Decision::Run(Action::Purge));
        }
    }

    proptest! {
        /// What a verb leads to, asked for again, is no new work: stop after stop, start after start, …
        #[test]
        fn asking_twice_does_nothing_twice(index in 0usize..10, request in 0..REQUESTS.len()) {
            let request = REQUESTS[request];
            let settled = match request {
                Request::Start => Phase::Running { ready: false, reachable: true },
                Request::Stop | Request::Kill => Phase::Stopped { why: StopReason::Asked },
                Request::Pause => Phase::Paused { by: PausedBy::Person },
                Request::Resume => Phase::Running { ready: true, reachable: true },
                Request::Restart
                | Request::Set { .. }
                | Request::Reset
                | Request::Delete { .. }
                | Request::Undelete => return Ok(()),
            };
            if matches!(decide(Standing::Present(&phases()[index]), request), Decision::Run(_)) {
                prop_assert_eq!(decide(Standing::Present(&settled), request), Decision::AlreadyThere);
            }
        }
    }
}
