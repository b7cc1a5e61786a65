//! The one place of this crate that starts programs.

use crate::Result;
use crate::error::Error;
use std::ffi::OsStr;
use std::process::{Command, Stdio};

/// A command that runs `program`.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    #[expect(
        clippy::disallowed_methods,
        reason = "mmdebstrap and the emulated machine run for minutes with their output shown"
    )]
    Command::new(program)
}

/// For `map_err`: `program` could not be started.
pub(crate) fn cannot_start(program: &str) -> impl FnOnce(std::io::Error) -> Error {
    let program = program.to_owned();
    move |error| Error::Program {
        program,
        reason: error.to_string(),
    }
}

/// Runs a short command and gives what it wrote on standard output.
pub(crate) fn output_of(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(cannot_start(&program))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(Error::Program {
            program,
            reason: format!(
                "{}: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            ),
        })
    }
}
