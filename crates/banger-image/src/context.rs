//! What every build gets from its caller: where to cache, when to stop, whom to tell.

use crate::error::BuildError;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A step forward of a build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The stage, a stable word such as `download` or `write`.
    pub stage: &'static str,
    /// What is being done, one line of at most [`MAX_MESSAGE`] characters without control characters.
    pub message: String,
    /// Bytes or entries done, where the stage can be measured.
    pub done: Option<u64>,
    /// What `done` grows towards, where that is known.
    pub total: Option<u64>,
}

/// The longest [`Progress::message`], in characters.
pub const MAX_MESSAGE: usize = 200;

/// What a build gets from its caller.
pub struct Context {
    /// Where packages and templates are kept; always safe to delete.
    pub cache_dir: PathBuf,
    /// Set to stop the build: it ends with [`BuildError::Cancelled`].
    pub cancel: Arc<AtomicBool>,
    /// Called with every step forward, from the building thread and from threads that read a program's output.
    pub progress: Box<dyn Fn(Progress) + Send + Sync>,
    /// More arguments for every apt program, such as `-o`, `Dir::State::lists=…`; usually empty.
    pub apt_options: Vec<String>,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context")
            .field("cache_dir", &self.cache_dir)
            .field("cancel", &self.cancel)
            .field("apt_options", &self.apt_options)
            .finish_non_exhaustive()
    }
}

impl Context {
    /// A context that caches in `cache_dir`, cannot be cancelled and tells nobody.
    pub fn quiet(cache_dir: impl Into<PathBuf>) -> Self {
        Self {
            cache_dir: cache_dir.into(),
            cancel: Arc::default(),
            progress: Box::new(|_| {}),
            apt_options: Vec::new(),
        }
    }

    /// Fails with [`BuildError::Cancelled`] once the build is to stop.
    pub fn check(&self) -> Result<(), BuildError> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(BuildError::Cancelled);
        }
        Ok(())
    }

    pub(crate) fn tell(&self, stage: &'static str, message: &str) {
        self.tell_amount(stage, message, None, None);
    }

    pub(crate) fn tell_amount(
        &self,
        stage: &'static str,
        message: &str,
        done: Option<u64>,
        total: Option<u64>,
    ) {
        let message = message
            .chars()
            .filter(|c| !c.is_control())
            .take(MAX_MESSAGE)
            .collect();
        (self.progress)(Progress {
            stage,
            message,
            done,
            total,
        });
    }
}
