//! Runs a command in the test host; `banger-testhost` does the work.

use crate::command::{capture, cargo};
use crate::dist::{self, Profile};
use crate::failure::{Failure, Result};
use crate::install;
use crate::layout::{root, target};
use crate::packages::{self, Purpose};
use serde_json::Value;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

/// The first process of a test host, with the tests that are for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Init {
    Shell,
    Systemd,
}

/// The daemon's own tests, some of which need devices and filesystems that few machines have.
const DAEMON_SOURCE: &str = "crates/banger-daemon/src/lib.rs";
/// Their name in `/mnt`.
pub(crate) const DAEMON_TESTS: &str = "daemon-tests";

impl Init {
    fn suite_source(self) -> &'static str {
        match self {
            Self::Shell => "crates/banger-testhost/tests/suite.rs",
            Self::Systemd => "crates/banger-testhost/tests/systemd.rs",
        }
    }
}

pub(crate) fn testhost(init: Init, args: &[&str]) -> Result<ExitCode> {
    packages::ensure(Purpose::Run)?;
    dist::dist(Profile::Debug)?;
    // In place of this process, so that whoever ends it ends the machine.
    let error = command(init, args)?.exec();
    Err(Failure::io("cannot run the test host")(error))
}

/// The command that runs `args` in the test host, for which everything is built.
pub(crate) fn command(init: Init, args: &[&str]) -> Result<Command> {
    let program = target().join("debug/testhost");
    if !program.exists() {
        return Err(Failure::new(format!(
            "`{}` is not built",
            program.display()
        )));
    }
    let mut command = crate::command::command(program);
    command
        .arg("--cache")
        .arg(target().join("testhost"))
        .arg("--programs")
        .arg(Profile::Debug.folder())
        .arg("--fixtures")
        .arg(target().join("fixtures"));
    let built = built()?;
    let source = init.suite_source();
    if root().join(source).exists() {
        command.arg("--suite").arg(find(&built, source)?);
    }
    if init == Init::Shell {
        command
            .arg("--add")
            .arg(find(&built, DAEMON_SOURCE)?)
            .arg(DAEMON_TESTS);
        command
            .arg("--add")
            .arg(target().join("debug/fake-vmm"))
            .arg("fake-vmm");
    }
    if init == Init::Systemd {
        command.arg("--systemd");
        // What an installation is made of, beside the programs.
        command
            .arg("--add")
            .arg(target().join("debug/xtask"))
            .arg("xtask");
        for path in install::sources() {
            command
                .arg("--add")
                .arg(root().join(&path))
                .arg(Path::new("checkout").join(&path));
        }
    }
    command.arg("--").args(args);
    Ok(command)
}

/// What cargo tells of all test programs, which only it can name.
fn built() -> Result<String> {
    let built = capture(cargo().current_dir(root()).args([
        "test",
        "--workspace",
        "--locked",
        "--no-run",
        "--message-format=json",
    ]))?;
    Ok(built.stdout)
}

/// The program of the tests in `source`.
fn find(built: &str, source: &str) -> Result<String> {
    built
        .lines()
        .find_map(|message| test_program(message, source))
        .ok_or_else(|| Failure::new(format!("`{source}` was not built")))
}

/// The program of the tests in `wanted`, if this message of cargo tells of it.
fn test_program(message: &str, wanted: &str) -> Option<String> {
    let message: Value = serde_json::from_str(message).ok()?;
    let source = message["target"]["src_path"].as_str()?;
    let program = message["executable"].as_str()?;
    (source.ends_with(wanted) && message["profile"]["test"] == true).then(|| program.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_suite_is_found_among_cargos_messages() {
        let message = |source: &str| {
            serde_json::json!({
                "reason": "compiler-artifact",
                "target": { "src_path": format!("/checkout/{source}") },
                "profile": { "test": true },
                "executable": "/t/suite-1",
            })
            .to_string()
        };
        let source = Init::Shell.suite_source();
        assert_eq!(
            test_program(&message(Init::Shell.suite_source()), source).as_deref(),
            Some("/t/suite-1")
        );
        assert_eq!(test_program(&message("src/lib.rs"), source), None);
        assert_eq!(test_program("Finished", source), None);
    }
}
