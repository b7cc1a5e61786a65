//! Whether VMs come back with the host and are shut down cleanly before it goes down: what `doctor` says of the user
//! unit.

use banger_api::daemon::{Check, Verdict};
use banger_api::paths::{Env as _, ProcessEnv};
use banger_api::unit::{self, DAEMON_UNIT, DaemonUnit};
use banger_host::exec::Run;

const SUBJECT: &str = "host boot";

/// What there is to know of the user unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Facts {
    systemd: bool,
    installed: bool,
    enabled: bool,
    /// This daemon was started by the unit.
    ours: bool,
    /// The user's systemd runs from the host's boot to its end; not known if it cannot be asked.
    linger: Option<bool>,
}

/// Looks, and says what helps.
pub(crate) fn check() -> Check {
    let systemd = unit::is_booted();
    let unit = systemd.then(|| DaemonUnit::find(&ProcessEnv)).flatten();
    let enabled = unit.as_ref().is_some_and(|unit| unit.enabled);
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    judge(Facts {
        systemd,
        installed: unit.is_some(),
        enabled,
        ours: is_in_unit(&groups),
        linger: if enabled { linger() } else { None },
    })
}

/// Whether `/proc/<pid>/cgroup` tells of the daemon's unit.
fn is_in_unit(groups: &str) -> bool {
    groups
        .lines()
        .any(|line| line.split('/').any(|part| part == DAEMON_UNIT))
}

/// Whether logind keeps this user's systemd without a session; it knows no user who has neither.
fn linger() -> Option<bool> {
    let uid = ProcessEnv.uid().to_string();
    let asked = Run::new("loginctl")
        .args(["show-user", &uid, "--property=Linger", "--value"])
        .run();
    match asked {
        Ok(output) => Some(output.stdout.trim_ascii() == b"yes"),
        Err(error) => {
            tracing::debug!(error = banger_host::error_chain(&error), "linger");
            None
        }
    }
}

fn judge(facts: Facts) -> Check {
    let note = |message: &str, hint: Option<&str>| Check {
        subject: SUBJECT.to_owned(),
        verdict: Verdict::Note,
        message: message.to_owned(),
        hint: hint.map(str::to_owned),
    };
    match facts {
        Facts { systemd: false, .. } => note(
            "systemd does not run here: VMs with autostart come back when the daemon first starts, and a shutdown ends VMs without asking them",
            Some("run `banger daemon start` when this machine boots, `banger daemon stop --vms` before it goes down"),
        ),
        Facts { installed: false, .. } => note(
            "the unit `bangerd.service` is not installed: VMs do not come back with the host, and a shutdown ends them without asking them",
            Some("`make install` puts it where systemd finds it, `banger daemon enable` turns it on"),
        ),
        Facts { enabled: false, .. } => note(
            "`bangerd.service` is not enabled: VMs do not come back with the host, and a shutdown ends them without asking them",
            Some("`banger daemon enable`"),
        ),
        Facts { linger: Some(false), .. } => note(
            "`bangerd.service` is enabled, but linger is off: VMs are stopped when you log out, and come back only when you log in",
            Some("`loginctl enable-linger` keeps them from the host's boot to its shutdown"),
        ),
        Facts { linger: None, .. } => note(
            "`bangerd.service` is enabled, but logind does not say whether linger is on: without it, a logout stops VMs",
            Some("`loginctl enable-linger`"),
        ),
        Facts { ours: false, .. } => note(
            "`bangerd.service` is enabled, but this daemon was started without it: a shutdown may end VMs without asking them",
            Some("`banger daemon restart` gives the daemon to systemd; a VM that runs goes over when it is next started"),
        ),
        Facts { linger: Some(true), .. } => Check {
            subject: SUBJECT.to_owned(),
            verdict: Verdict::Good,
            message: "VMs with autostart start with the host, and all are shut down cleanly before it goes down".to_owned(),
            hint: None,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Facts = Facts {
        systemd: true,
        installed: true,
        enabled: true,
        ours: true,
        linger: Some(true),
    };

    #[test]
    fn every_shortcoming_names_what_helps() {
        assert_eq!(judge(ALL).verdict, Verdict::Good);
        let cases = [
            (
                Facts {
                    systemd: false,
                    installed: false,
                    ..ALL
                },
                "daemon stop --vms",
            ),
            (
                Facts {
                    installed: false,
                    enabled: false,
                    ..ALL
                },
                "make install",
            ),
            (
                Facts {
                    enabled: false,
                    ..ALL
                },
                "banger daemon enable",
            ),
            (
                Facts {
                    linger: Some(false),
                    ..ALL
                },
                "loginctl enable-linger",
            ),
            (
                Facts {
                    linger: None,
                    ..ALL
                },
                "loginctl enable-linger",
            ),
            (Facts { ours: false, ..ALL }, "banger daemon restart"),
        ];
        for (facts, helps) in cases {
            let check = judge(facts);
            assert_eq!(check.verdict, Verdict::Note);
            assert!(check.hint.unwrap().contains(helps), "{facts:?}");
        }
    }

    #[test]
    fn a_daemon_of_the_unit_is_told_from_one_of_a_session() {
        assert!(is_in_unit(
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/bangerd.service\n"
        ));
        assert!(!is_in_unit(
            "0::/user.slice/user-1000.slice/session-3.scope\n"
        ));
        assert!(!is_in_unit(""));
    }
}
