//! Asks before what cannot be undone.

use crate::report::{Failure, note};
use banger_api::error::ErrorCode;
use std::io::IsTerminal as _;

/// The option that answers the question beforehand.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub(crate) struct ConfirmArgs {
    /// Do not ask; without a terminal nothing is asked
    #[arg(long, short = 'y')]
    yes: bool,
}

impl ConfirmArgs {
    /// Asks the person at the terminal. A script has nobody to ask, and is taken at its word.
    ///
    /// # Errors
    /// The answer is anything but yes.
    pub(crate) fn ask(self, question: &str) -> Result<(), Failure> {
        if self.yes || !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
            return Ok(());
        }
        note(&format!("{question} Type `yes` to go on:"));
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer).map_err(|error| {
            Failure::new(ErrorCode::Internal, "cannot read the answer").caused_by(&error)
        })?;
        judge(&answer)
    }
}

fn judge(answer: &str) -> Result<(), Failure> {
    if ["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str()) {
        return Ok(());
    }
    Err(
        Failure::new(ErrorCode::Cancelled, "that was no yes: nothing was changed")
            .hint("`--yes` goes on without the question"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_yes_is_a_yes() {
        for yes in ["y\n", "yes\n", " YES \r\n"] {
            assert_eq!(judge(yes), Ok(()), "{yes:?}");
        }
        for no in ["", "\n", "n\n", "ye\n", "yes please\n"] {
            assert_eq!(judge(no).unwrap_err().exit_code(), 130, "{no:?}");
        }
    }
}
