//! Operations: requests that can take over a second.

use crate::error::ErrorBody;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// How far an operation is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum OperationState {
    /// It runs.
    Running,
    /// It is done; `subject` is the id of what it made.
    Done {
        /// The id of the image, kernel or driver that it made.
        subject: String,
        /// Whether it was there already and nothing had to be made.
        unchanged: bool,
    },
    /// It failed or was cancelled; nothing half made is left.
    Failed {
        /// Why.
        error: ErrorBody,
    },
}

/// An operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Operation {
    /// Its id.
    pub id: Uuid,
    /// What it does: `image.build`, `kernel.import`, `driver.install`.
    pub kind: String,
    /// How far it is.
    pub status: OperationState,
    /// The latest progress.
    pub progress: Option<Progress>,
    /// When it began.
    #[schemars(with = "String")]
    pub started_at: Timestamp,
}

/// A step forward.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Progress {
    /// The stage, such as `packages` or `write image`.
    pub stage: String,
    /// What happens now.
    pub message: String,
    /// How much of the stage is done.
    pub done: Option<u64>,
    /// Of how much.
    pub total: Option<u64>,
}
