//! Follows an operation to its end, showing its progress on stderr, and cancels it on Ctrl-C.

use crate::escape;
use crate::report::{Failure, note};
use banger_api::client::Client;
use banger_api::endpoint::{DeleteOperation, GetOperationFollow, Nothing};
use banger_api::error::ErrorCode;
use banger_api::operation::{Operation, OperationState, Progress};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal as _;
use std::time::Duration;

/// What an operation made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Made {
    /// Its id.
    pub(crate) subject: String,
    /// It was there already.
    pub(crate) unchanged: bool,
}

/// Follows `operation` until it is done.
///
/// # Errors
/// It failed or was cancelled, or the daemon went away.
pub(crate) async fn follow(client: &Client, operation: Operation) -> Result<Made, Failure> {
    let id = operation.id.to_string();
    let mut display = Display::new();
    if let Some(end) = ended(operation, &mut display) {
        return end;
    }
    let mut lines = client
        .lines::<GetOperationFollow>(&[("operation", &id)], &Nothing {})
        .await?;
    let mut cancelling = false;
    loop {
        let next = tokio::select! {
            next = lines.next() => next?,
            // The first one cancels; the next one no longer waits for it.
            _ = tokio::signal::ctrl_c() => {
                if cancelling {
                    display.clear();
                    note("no longer waiting; the daemon goes on cancelling");
                    std::process::exit(i32::from(ErrorCode::Cancelled.exit_code()));
                }
                cancelling = true;
                display.say("cancelling; press Ctrl-C again to leave at once");
                client.call::<DeleteOperation>(&[("operation", &id)], &Nothing {}).await?;
                continue;
            }
        };
        let Some(operation) = next else {
            display.clear();
            return Err(Failure::new(
                ErrorCode::DaemonUnreachable,
                "the daemon ended before the operation did",
            )
            .hint("repeat the command: what was downloaded is not downloaded again"));
        };
        if let Some(end) = ended(operation, &mut display) {
            return end;
        }
    }
}

/// Shows how far the operation is; its result once it has ended.
fn ended(operation: Operation, display: &mut Display) -> Option<Result<Made, Failure>> {
    if let Some(progress) = &operation.progress {
        display.show(progress);
    }
    match operation.status {
        OperationState::Running => None,
        OperationState::Done { subject, unchanged } => {
            display.clear();
            Some(Ok(Made { subject, unchanged }))
        }
        OperationState::Failed { error } => {
            display.clear();
            Some(Err(error.into()))
        }
    }
}

/// A moving line on a terminal; plain lines elsewhere, none of them twice.
struct Display {
    bar: Option<ProgressBar>,
    last: String,
}

impl Display {
    fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::no_length();
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self {
            bar,
            last: String::new(),
        }
    }

    fn show(&mut self, progress: &Progress) {
        let text = text(progress);
        let Some(bar) = &self.bar else {
            if text != self.last {
                note(&text);
                self.last = text;
            }
            return;
        };
        let template = if progress.total.is_some() {
            "{spinner} [{bar:24}] {percent:>3}% {wide_msg}"
        } else {
            "{spinner} {wide_msg}"
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        if let Some(total) = progress.total {
            bar.set_length(total);
        }
        bar.set_position(progress.done.unwrap_or(0));
        bar.set_message(text);
    }

    fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| note(text)),
            None => note(text),
        }
    }

    fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn text(progress: &Progress) -> String {
    let stage = escape::line(&progress.stage);
    if progress.message.is_empty() {
        stage
    } else {
        format!("{stage}: {}", escape::line(&progress.message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_cannot_send_control_sequences_to_the_terminal() {
        let progress = Progress {
            stage: "packages".to_owned(),
            message: "unpacking \u{1b}[2J".to_owned(),
            done: None,
            total: None,
        };
        assert_eq!(text(&progress), "packages: unpacking \\x1b[2J");
    }
}
