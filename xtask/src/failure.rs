//! Why a chore could not be done.

use std::fmt;

/// What chores return.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// A message for the person at the terminal, with its cause and what helps.
#[derive(Debug)]
pub(crate) struct Failure {
    message: String,
    cause: Option<String>,
    hint: Option<String>,
}

impl Failure {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            cause: None,
            hint: None,
        }
    }

    /// Adds what helps.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// For `map_err`: what was tried, and the system's answer.
    pub(crate) fn io(tried: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let message = tried.into();
        move |error| Self {
            message,
            cause: Some(error.to_string()),
            hint: None,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        if let Some(cause) = &self.cause {
            write!(f, "\n  caused by: {cause}")?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "\n  hint: {hint}")?;
        }
        Ok(())
    }
}
