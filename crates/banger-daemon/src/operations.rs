//! Operations: requests that take long, with progress and a way to cancel them.

use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::operation::{Operation, OperationState, Progress};
use jiff::Timestamp;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;
use uuid::Uuid;

/// How many operations are remembered.
const KEPT: usize = 64;

/// What an operation made.
#[derive(Debug, Clone)]
pub(crate) struct Made {
    pub(crate) subject: String,
    pub(crate) unchanged: bool,
}

#[derive(Debug, Clone)]
struct Entry {
    id: Uuid,
    state: watch::Receiver<Operation>,
    cancel: Arc<AtomicBool>,
}

/// All operations, the latest last.
#[derive(Debug, Default)]
pub(crate) struct Operations {
    entries: Mutex<VecDeque<Entry>>,
}

/// What a running operation reports to.
#[derive(Debug, Clone)]
pub(crate) struct Reporter {
    state: Arc<watch::Sender<Operation>>,
    /// Is set when the operation is to end.
    pub(crate) cancel: Arc<AtomicBool>,
}

impl Reporter {
    /// Tells everyone who follows how far it is.
    pub(crate) fn progress(&self, progress: Progress) {
        self.state
            .send_modify(|operation| operation.progress = Some(progress));
    }
}

impl Operations {
    /// Starts an operation on a thread of its own.
    pub(crate) fn start<F>(&self, kind: &str, work: impl FnOnce(Reporter) -> F) -> Operation
    where
        F: Future<Output = Result<Made, ErrorBody>> + Send + 'static,
    {
        let operation = Operation {
            id: Uuid::now_v7(),
            kind: kind.to_owned(),
            status: OperationState::Running,
            progress: None,
            started_at: Timestamp::now(),
        };
        let (sender, receiver) = watch::channel(operation.clone());
        let reporter = Reporter {
            state: Arc::new(sender),
            cancel: Arc::default(),
        };
        let entry = Entry {
            id: operation.id,
            state: receiver,
            cancel: Arc::clone(&reporter.cancel),
        };
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() >= KEPT
            && let Some(finished) = entries
                .iter()
                .position(|e| e.state.borrow().status != OperationState::Running)
        {
            entries.remove(finished);
        }
        entries.push_back(entry);
        drop(entries);
        let state = Arc::clone(&reporter.state);
        let work = work(reporter);
        tokio::spawn(async move {
            // A panic in the work must not leave the operation running for ever.
            let outcome = tokio::spawn(work)
                .await
                .unwrap_or_else(|error| Err(ErrorBody::from_error(ErrorCode::Internal, &error)));
            state.send_modify(|operation| {
                operation.status = match outcome {
                    Ok(Made { subject, unchanged }) => OperationState::Done { subject, unchanged },
                    Err(error) => OperationState::Failed { error },
                };
            });
        });
        operation
    }

    /// All operations, the latest last.
    pub(crate) fn list(&self) -> Vec<Operation> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries
            .iter()
            .map(|entry| entry.state.borrow().clone())
            .collect()
    }

    fn find(&self, id: Uuid) -> Option<Entry> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.iter().find(|entry| entry.id == id).cloned()
    }

    /// Follows an operation.
    pub(crate) fn follow(&self, id: Uuid) -> Option<watch::Receiver<Operation>> {
        self.find(id).map(|entry| entry.state)
    }

    /// Asks an operation to end, and waits until it has.
    pub(crate) async fn cancel(&self, id: Uuid) -> Option<Operation> {
        let mut entry = self.find(id)?;
        entry.cancel.store(true, Ordering::Relaxed);
        // The sender stays until the operation has ended.
        let _ = entry
            .state
            .wait_for(|operation| operation.status != OperationState::Running)
            .await;
        let operation = entry.state.borrow().clone();
        Some(operation)
    }

    /// Asks all operations to end, and waits until they have.
    pub(crate) async fn cancel_all(&self) {
        for operation in self.list() {
            self.cancel(operation.id).await;
        }
    }
}
