//! What banger asks systemd: to start the daemon with the host, and whether the host goes down.

use crate::ensure_daemon::bangerd;
use crate::report::{Failure, warn};
use banger_api::error::ErrorCode;
use banger_api::paths::{Env as _, Paths, ProcessEnv};
use banger_api::unit::{self, DAEMON_UNIT, DaemonUnit};
use banger_core::name::VmName;
use banger_core::phase::GoingDown;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// What the manager says of itself while it stops everything.
const STOPPING: &str = "stopping";

/// Whether this user's systemd is the one to start the daemon: it was asked to by [`enable`], and its daemon is the
/// one that is wanted, with the same program and the same folders.
pub(crate) fn starts(paths: &Paths, bangerd: &Path) -> bool {
    unit::is_booted()
        && unit::paths(&ProcessEnv).is_ok_and(|managed| managed == *paths)
        && DaemonUnit::find(&ProcessEnv).is_some_and(|unit| unit.enabled && unit.starts(bangerd))
}

/// Tells when nothing starts the daemon with the host, so that a VM with autostart does not come back by itself.
pub(crate) fn warn_of_no_autostart(paths: &Paths, name: &VmName) {
    if bangerd().is_ok_and(|program| starts(paths, &program)) {
        return;
    }
    let hint = if unit::is_booted() {
        "`banger daemon enable` has your systemd start it"
    } else {
        "have whatever starts programs here run `banger daemon start` at boot"
    };
    warn(
        &format!(
            "nothing starts the daemon with this host, so `{name}` does not come back with it"
        ),
        &[hint.to_owned()],
    );
}

/// Starts the daemon, and returns when it is ready.
pub(crate) fn start() -> Result<(), Failure> {
    user(&["start", DAEMON_UNIT])
}

/// Has the daemon started with this user's systemd from now on.
pub(crate) fn enable() -> Result<(), Failure> {
    user(&["enable", DAEMON_UNIT])
}

/// Takes [`enable`] back.
pub(crate) fn disable() -> Result<(), Failure> {
    user(&["disable", DAEMON_UNIT])
}

/// Has this user's systemd run from the host's boot to its shutdown, and not just while the user is logged in.
pub(crate) fn linger() -> Result<(), Failure> {
    let uid = ProcessEnv.uid().to_string();
    run("loginctl", &["enable-linger", &uid])?;
    if uid == "0" {
        // An ordinary user is logged in, so theirs runs already; root may have come by `sudo`.
        run("systemctl", &["start", "user@0.service"])?;
    }
    Ok(())
}

/// What goes down, if something does: the host, or this user's systemd alone, as it does after a logout.
pub(crate) fn what_goes_down() -> Option<GoingDown> {
    let state = |args: &[&str]| {
        // Anything but `running` is told by the exit code, too.
        let output = command("systemctl", args).ok()?;
        String::from_utf8(output.stdout).ok()
    };
    going_down(
        state(&["is-system-running"]).as_deref(),
        state(&["--user", "is-system-running"]).as_deref(),
    )
}

fn going_down(host: Option<&str>, user: Option<&str>) -> Option<GoingDown> {
    let stops = |state: Option<&str>| state.is_some_and(|state| state.trim() == STOPPING);
    if stops(host) {
        Some(GoingDown::Host)
    } else {
        stops(user).then_some(GoingDown::User)
    }
}

fn user(args: &[&str]) -> Result<(), Failure> {
    run("systemctl", &[&["--user"], args].concat())
}

fn run(program: &str, args: &[&str]) -> Result<(), Failure> {
    let words = format!("{program} {}", args.join(" "));
    let output = command(program, args).map_err(|error| {
        Failure::new(ErrorCode::HostUnfit, format!("cannot run `{words}`"))
            .caused_by(&error)
            .hint(
                "this needs systemd; without it, `banger daemon start` starts the daemon by itself",
            )
    })?;
    if output.status.success() {
        return Ok(());
    }
    let mut failure = Failure::new(
        ErrorCode::HostUnfit,
        format!("`{words}` failed ({})", output.status),
    );
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    failure.0.causes.extend(
        said.lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .map(str::to_owned),
    );
    Err(failure.hint("run it by hand; `systemctl --user status bangerd` tells how the unit is"))
}

fn command(program: &str, args: &[&str]) -> std::io::Result<Output> {
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place where the command line talks to systemd"
    )]
    Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        // That of the user's systemd, whatever this shell has.
        .env("XDG_RUNTIME_DIR", format!("/run/user/{}", ProcessEnv.uid()))
        .stdin(Stdio::null())
        .output()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shutdown_of_the_host_is_told_from_a_logout_and_from_neither() {
        let stopping = Some("stopping\n");
        assert_eq!(going_down(stopping, stopping), Some(GoingDown::Host));
        assert_eq!(
            going_down(Some("degraded\n"), stopping),
            Some(GoingDown::User)
        );
        assert_eq!(going_down(None, stopping), Some(GoingDown::User));
        assert_eq!(going_down(Some("running\n"), Some("running\n")), None);
        assert_eq!(going_down(None, None), None);
    }
}
