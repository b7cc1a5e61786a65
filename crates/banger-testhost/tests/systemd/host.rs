//! The machine, as its root sees it.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Where banger is installed below.
pub(crate) const PREFIX: &str = "/usr/local";
/// The socket of the root helper.
pub(crate) const HELPER_SOCKET: &str = "/run/banger-helper.sock";
/// How long anything may take on an emulated machine that is not alone on its processor.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);
/// Between two looks at what tells of no change.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

pub(crate) fn command(program: &str) -> Command {
    #[expect(
        clippy::disallowed_methods,
        reason = "a test runs the programs as a person would"
    )]
    let mut command = Command::new(program);
    command.stdin(Stdio::null());
    command
}

/// Runs a shell's line as root. Gives its standard output, whether it succeeded or not.
pub(crate) fn try_root(line: &str) -> Result<String, Output> {
    let output = command("timeout").args(["180", "sh", "-c", line]).output();
    let output = output.unwrap();
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(output)
    }
}

/// As [`try_root`], of what must succeed.
#[track_caller]
pub(crate) fn root(line: &str) -> String {
    try_root(line).unwrap_or_else(|output| panic!("`{line}` failed: {output:?}\n{}", journal()))
}

/// Waits until `look` finds something.
#[track_caller]
pub(crate) fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "never: {what}\n{}", journal());
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// The end of what this boot's services wrote.
pub(crate) fn journal() -> String {
    let output = command("journalctl")
        .args(["--boot", "--no-pager", "--lines=60"])
        .output();
    String::from_utf8_lossy(&output.unwrap().stdout).into_owned()
}

/// What systemd says of one of its own units, as `active`.
pub(crate) fn state(unit: &str) -> String {
    let said = try_root(&format!(
        "systemctl show --property=ActiveState --value {unit}"
    ));
    said.unwrap().trim().to_owned()
}

/// Installs banger as `make install` does, if it is not installed.
pub(crate) fn install() {
    assert!(
        Path::new("/mnt/suite").exists(),
        "this test runs inside the test host: `cargo xtask test`"
    );
    if !Path::new(PREFIX).join("bin/banger").exists() {
        xtask("install");
    }
}

/// Runs `xtask install` or `xtask uninstall`, with the programs that came along. Gives what it said.
#[track_caller]
pub(crate) fn xtask(verb: &str) -> String {
    // It looks for its sources where it was built, and for programs in the build folder.
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
    let checkout = checkout.unwrap().display();
    root(&format!(
        "mkdir -p $(dirname {checkout}) /var/tmp/built && ln -sfn /mnt/checkout {checkout} && \
         ln -sfn /mnt/bin /var/tmp/built/dist"
    ));
    root(&format!(
        "CARGO_TARGET_DIR=/var/tmp/built /mnt/xtask {verb} {PREFIX} 2>&1"
    ))
}

/// Has the machine rebooted once these tests are through: `reboot` in order, `reset` as by its button.
pub(crate) fn and_then(what: &str) {
    std::fs::write("/run/testhost/next", what).unwrap();
}
