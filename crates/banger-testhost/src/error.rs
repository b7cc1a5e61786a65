//! Why the test host could not run.

use std::path::{Path, PathBuf};

/// Why the test host could not be made or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed.
    #[error("cannot {action} `{}`", .path.display())]
    Io {
        /// What was tried, such as `read`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A program could not be started, or failed.
    #[error("`{program}` failed: {reason}")]
    Program {
        /// The program.
        program: String,
        /// How it ended, or why it did not start.
        reason: String,
    },
    /// The machine is none that the test host can be made on.
    #[error("the test host can be made on Debian only: {reason}")]
    NotDebian {
        /// What is missing.
        reason: String,
    },
    /// The tree that mmdebstrap made lacks something.
    #[error("the test host's root has no {what}")]
    Incomplete {
        /// What is missing.
        what: String,
    },
    /// The ext4 writer refused.
    #[error("cannot write the ext4 image `{}`", .path.display())]
    Ext4 {
        /// The image.
        path: PathBuf,
        /// Its reason.
        #[source]
        source: mkext4::Error,
    },
    /// An image or kernel for the tests could not be made.
    #[error("cannot make the tests' {what}")]
    Fixture {
        /// `image` or `kernel`.
        what: &'static str,
        /// The reason.
        #[source]
        source: banger_image::BuildError,
    },
    /// The machine ended before the command did.
    #[error("the test host ended without an exit code; the end of its console:\n{console}")]
    NoStatus {
        /// The end of what its kernel printed, escaped.
        console: String,
    },
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    pub(crate) fn ext4(path: &Path) -> impl FnOnce(mkext4::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Ext4 { path, source }
    }

    pub(crate) fn incomplete(what: impl Into<String>) -> Self {
        Self::Incomplete { what: what.into() }
    }

    /// The whole chain on one line each.
    pub fn report(&self) -> String {
        let mut text = format!("error: {self}");
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text.push_str(&format!("\n  caused by: {cause}"));
            source = cause.source();
        }
        text
    }
}
