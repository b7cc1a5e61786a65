//! The one place of this crate that starts programs.

use crate::failure::{Failure, Result};
use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// A command that runs `program`.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    #[expect(
        clippy::disallowed_methods,
        reason = "chores run cargo, apt and banger for as long as these take, with their output shown"
    )]
    Command::new(program)
}

/// `cargo`, the one that runs this.
pub(crate) fn cargo() -> Command {
    let mut cargo = command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // Set by `cargo run` for this crate; build scripts of others must not see it.
    for name in ["CARGO_MANIFEST_DIR", "CARGO_PKG_NAME", "CARGO_PKG_VERSION"] {
        cargo.env_remove(name);
    }
    cargo
}

/// Program and arguments as one line.
pub(crate) fn line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs it to its end with its output shown. Anything but success is a failure.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    eprintln!("+ {}", line(command));
    let status = command
        .status()
        .map_err(Failure::io(format!("cannot run `{}`", line(command))))?;
    if status.success() {
        Ok(())
    } else {
        Err(Failure::new(format!(
            "`{}` failed ({status})",
            line(command)
        )))
    }
}

/// What a command that ended wrote.
pub(crate) struct Captured {
    pub(crate) success: bool,
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs it to its end and gives what it wrote, whether it succeeded or not.
pub(crate) fn capture(command: &mut Command) -> Result<Captured> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(Failure::io(format!("cannot run `{}`", line(command))))?;
    Ok(Captured {
        success: output.status.success(),
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Runs it to its end with both of its outputs, in the order they were written, handed to `each` line by line.
/// Returns whether it succeeded.
pub(crate) fn follow(command: &mut Command, mut each: impl FnMut(&str)) -> Result<bool> {
    eprintln!("+ {}", line(command));
    let cannot = |command: &Command| Failure::io(format!("cannot run `{}`", line(command)));
    let (reader, writer) = std::io::pipe().map_err(cannot(command))?;
    let other = writer.try_clone().map_err(cannot(command))?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(other)
        .spawn()
        .map_err(cannot(command))?;
    // The command still holds write ends of the pipe; without this the end of the output would never come.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut reader = BufReader::new(reader);
    let mut bytes = Vec::new();
    while reader
        .read_until(b'\n', &mut bytes)
        .map_err(cannot(command))?
        > 0
    {
        each(String::from_utf8_lossy(&bytes).trim_end_matches('\n'));
        bytes.clear();
    }
    let status = child.wait().map_err(cannot(command))?;
    Ok(status.success())
}

/// Where `program` is: on PATH, or in the folders of administration programs, which ordinary users lack on theirs.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|candidate| {
            rustix::fs::access(candidate, rustix::fs::Access::EXEC_OK).is_ok()
                && candidate.is_file()
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_outputs_are_followed_in_order_and_the_end_is_seen() {
        let mut lines = Vec::new();
        let mut shell = command("sh");
        shell.args(["-c", "echo one; echo two >&2; echo three; exit 3"]);
        let success = follow(&mut shell, |line| lines.push(line.to_owned())).unwrap();
        assert!(!success);
        assert_eq!(lines, ["one", "two", "three"]);
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let failure = run(&mut command("/nonexistent/program")).unwrap_err();
        assert!(failure.to_string().contains("/nonexistent/program"));
        assert_eq!(find("no-program-has-this-name"), None);
        assert!(find("sh").is_some());
    }
}
