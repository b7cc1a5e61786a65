//! Saying that a test did not run.

use std::fmt::Display;
use std::io::Write;

/// The variable that names the file which skips are appended to, so that a runner can list them at the end.
pub const SKIP_LOG: &str = "BANGER_SKIP_LOG";

/// Says that `test` did not run, and why: as a line `SKIPPED: <test>: <why>` on stderr, and in the file that
/// `BANGER_SKIP_LOG` names. The test returns after this.
pub fn skip(test: &str, why: impl Display) {
    let line = line(test, &why.to_string());
    eprint!("{line}");
    if let Some(path) = std::env::var_os(SKIP_LOG) {
        // One write of one line, so that tests that end at the same time do not mix theirs.
        let written = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .and_then(|mut log| log.write_all(line.as_bytes()));
        if let Err(error) = written {
            eprintln!("cannot note the skip in `{}`: {error}", path.display());
        }
    }
}

fn line(test: &str, why: &str) -> String {
    format!("SKIPPED: {test}: {}\n", why.replace('\n', " "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skip_is_one_line_whatever_the_reason() {
        assert_eq!(
            line("boots_a_guest", "no QEMU\nat all"),
            "SKIPPED: boots_a_guest: no QEMU at all\n"
        );
    }
}
