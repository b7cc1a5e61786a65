//! Runs a command in the test host; `banger-testhost` does the work.

use crate::command::{capture, cargo};
use crate::dist::{self, Profile};
use crate::failure::{Failure, Result};
use crate::layout::{root, target};
use crate::packages::{self, Purpose};
use serde_json::Value;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

const SUITE_SOURCE: &str = "crates/banger-testhost/tests/suite.rs";

pub(crate) fn testhost(args: &[&str]) -> Result<ExitCode> {
    packages::ensure(Purpose::Run)?;
    dist::dist(Profile::Debug)?;
    // In place of this process, so that whoever ends it ends the machine.
    let error = command(args)?.exec();
    Err(Failure::io("cannot run the test host")(error))
}

/// The command that runs `args` in the test host, for which everything is built.
pub(crate) fn command(args: &[&str]) -> Result<Command> {
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
    if let Some(suite) = suite()? {
        command.arg("--suite").arg(suite);
    }
    command.arg("--").args(args);
    Ok(command)
}

/// Whether there are tests for the inside of the test host.
pub(crate) fn has_suite() -> bool {
    root().join(SUITE_SOURCE).exists()
}

/// The program of these tests, which only cargo can name.
fn suite() -> Result<Option<String>> {
    if !has_suite() {
        return Ok(None);
    }
    let built = capture(cargo().current_dir(root()).args([
        "test",
        "--workspace",
        "--locked",
        "--no-run",
        "--message-format=json",
    ]))?;
    let program = built.stdout.lines().find_map(suite_program);
    match program {
        Some(program) => Ok(Some(program)),
        None => Err(Failure::new("the test host's suite was not built")),
    }
}

/// The program of the suite, if this message of cargo tells of it.
fn suite_program(message: &str) -> Option<String> {
    let message: Value = serde_json::from_str(message).ok()?;
    let source = message["target"]["src_path"].as_str()?;
    let program = message["executable"].as_str()?;
    (source.ends_with(SUITE_SOURCE) && message["profile"]["test"] == true)
        .then(|| program.to_owned())
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
        assert_eq!(
            suite_program(&message(SUITE_SOURCE)).as_deref(),
            Some("/t/suite-1")
        );
        assert_eq!(suite_program(&message("src/lib.rs")), None);
        assert_eq!(suite_program("Finished"), None);
    }
}
