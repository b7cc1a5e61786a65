//! Waits for what the daemon does to its end, whoever waits: says at a terminal what takes so long, and on Ctrl-C what
//! goes on.

use crate::report::{Outcome, note};
use banger_api::error::ErrorCode;
use std::io::IsTerminal as _;
use std::time::Duration;

/// How long nothing is said.
const QUIET: Duration = Duration::from_secs(1);

/// What is waited for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wait<'a> {
    /// Said after a second, to follow "waiting for ".
    pub(crate) what: &'a str,
    /// Said on Ctrl-C, to follow "no longer waiting; ": what goes on, and how to look.
    pub(crate) goes_on: &'a str,
}

impl Wait<'_> {
    /// Waits for `work`; `None` on Ctrl-C.
    pub(crate) async fn of<T>(self, work: impl Future<Output = T>) -> Option<T> {
        let quiet = tokio::time::sleep(QUIET);
        let interrupted = tokio::signal::ctrl_c();
        tokio::pin!(work, quiet, interrupted);
        let mut silent = std::io::stderr().is_terminal();
        loop {
            tokio::select! {
                done = &mut work => return Some(done),
                _ = &mut interrupted => {
                    note(&format!("no longer waiting; {}", self.goes_on));
                    return None;
                }
                () = &mut quiet, if silent => {
                    silent = false;
                    note(&format!("waiting for {}", self.what));
                }
            }
        }
    }

    /// As [`Wait::of`], of a whole verb.
    pub(crate) async fn outcome(self, work: impl Future<Output = Outcome>) -> Outcome {
        self.of(work).await.unwrap_or_else(cancelled)
    }
}

/// How a verb ends that no longer waits.
pub(crate) fn cancelled() -> Outcome {
    Ok(ErrorCode::Cancelled.exit_code())
}
