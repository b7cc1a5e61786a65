//! Errors as a person sees them: `error:`, `caused by:`, `hint:`. The only renderer of errors.

use crate::escape;
use anstyle::{AnsiColor, Style};
use banger_api::client::ClientError;
use banger_api::error::{ErrorBody, ErrorCode};
use std::fmt::Write as _;
use std::io::Write as _;

/// Why a command did not succeed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure(pub(crate) ErrorBody);

/// What a command ends with: its exit code, or why it did not succeed.
pub(crate) type Outcome = Result<u8, Failure>;

impl From<ErrorBody> for Failure {
    fn from(body: ErrorBody) -> Self {
        Self(body)
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self(error.to_body())
    }
}

impl Failure {
    /// An error without causes and hints.
    pub(crate) fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self(ErrorBody::new(code, message))
    }

    /// Adds a hint.
    #[must_use]
    pub(crate) fn hint(self, hint: impl Into<String>) -> Self {
        Self(self.0.hint(hint))
    }

    /// Adds `error` and its sources as causes.
    #[must_use]
    pub(crate) fn caused_by(self, error: &(dyn std::error::Error + 'static)) -> Self {
        Self(self.0.caused_by(error))
    }

    /// The code that the process ends with.
    pub(crate) fn exit_code(&self) -> u8 {
        self.0.code.exit_code()
    }
}

/// The error as text with colours; `anstream` takes them out where they are not wanted. Messages may repeat what a
/// VMM or guest said, so they are escaped.
pub(crate) fn render(body: &ErrorBody) -> String {
    let mut text = String::new();
    line(&mut text, "error", AnsiColor::Red, &body.message);
    reasons(&mut text, body);
    text
}

/// Why, and what helps.
fn reasons(text: &mut String, body: &ErrorBody) {
    for cause in &body.causes {
        line(text, "caused by", AnsiColor::Red, cause);
    }
    for hint in &body.hints {
        line(text, "hint", AnsiColor::Cyan, hint);
    }
}

fn line(text: &mut String, label: &str, color: AnsiColor, message: &str) {
    let style = Style::new().bold().fg_color(Some(color.into()));
    let message = escape::text(message);
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{style}{label}:{style:#} {}", message.trim_end());
}

/// Tells of something that works otherwise than it was asked for, and what helps, on stderr.
pub(crate) fn warn(message: &str, hints: &[String]) {
    let mut text = String::new();
    line(&mut text, "warning", AnsiColor::Yellow, message);
    for hint in hints {
        line(&mut text, "hint", AnsiColor::Cyan, hint);
    }
    let _ = anstream::stderr().write_all(text.as_bytes());
}

/// Tells what stays as it was, why, and what helps, on stderr.
pub(crate) fn left(body: &ErrorBody) {
    let _ = anstream::stderr().write_all(render_left(body).as_bytes());
}

fn render_left(body: &ErrorBody) -> String {
    let mut text = String::new();
    line(
        &mut text,
        "warning",
        AnsiColor::Yellow,
        &format!("left: {}", body.message),
    );
    reasons(&mut text, body);
    text
}

/// Prints the error to stderr. There is nowhere left to report a failure of that.
pub(crate) fn print(body: &ErrorBody) {
    let _ = anstream::stderr().write_all(render(body).as_bytes());
}

/// Tells something that is not the result, on stderr.
pub(crate) fn note(text: &str) {
    let _ = writeln!(anstream::stderr(), "{}", escape::text(text));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(body: &ErrorBody) -> String {
        anstream::adapter::strip_str(&render(body)).to_string()
    }

    #[test]
    fn an_error_names_what_failed_then_why_then_what_to_do() {
        let mut body = ErrorBody::new(ErrorCode::NoDriver, "cannot start vm `calm-otter`")
            .hint("apt install qemu-system-x86");
        body.causes = vec!["no VMM was found".to_owned()];
        assert_eq!(
            plain(&body),
            "error: cannot start vm `calm-otter`\ncaused by: no VMM was found\nhint: apt install qemu-system-x86\n"
        );
    }

    #[test]
    fn what_is_left_says_why_and_what_to_do() {
        let mut body = ErrorBody::new(ErrorCode::HostUnfit, "snapshot BANGER-0 of otter")
            .hint("end who has it open");
        body.causes = vec!["it is busy".to_owned()];
        assert_eq!(
            anstream::adapter::strip_str(&render_left(&body)).to_string(),
            "warning: left: snapshot BANGER-0 of otter\ncaused by: it is busy\nhint: end who has it open\n"
        );
    }

    #[test]
    fn a_message_cannot_send_control_sequences_to_the_terminal() {
        let body = ErrorBody::new(ErrorCode::StartFailed, "the VMM said \u{1b}]0;owned\u{7}");
        assert_eq!(plain(&body), "error: the VMM said \\x1b]0;owned\\x07\n");
    }
}
