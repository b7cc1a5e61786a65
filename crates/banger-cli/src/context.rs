//! What a command works with: where files live, and the daemon behind its socket.

use crate::ensure_daemon;
use crate::report::{Failure, Outcome};
use banger_api::client::Client;
use banger_api::daemon::DaemonStatus;
use banger_api::endpoint::{GetDaemon, Nothing};
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::paths::{Paths, ProcessEnv};
use std::path::PathBuf;
use std::sync::Arc;

/// Where files live for this process.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    pub(crate) paths: Paths,
}

/// A daemon that answers.
#[derive(Debug, Clone)]
pub(crate) struct Daemon {
    pub(crate) client: Client,
}

impl Daemon {
    /// What it says of itself.
    pub(crate) async fn status(&self) -> Result<DaemonStatus, Failure> {
        Ok(self.client.call::<GetDaemon>(&[], &Nothing {}).await?)
    }
}

impl Context {
    /// Reads the environment.
    pub(crate) fn from_env() -> Result<Self, Failure> {
        let paths = Paths::from_env(&ProcessEnv).map_err(|error| {
            Failure(ErrorBody::from_error(ErrorCode::HostUnfit, &error))
                .hint("set HOME to your home folder")
        })?;
        Ok(Self { paths })
    }

    /// A client of the daemon, whether it runs or not.
    pub(crate) fn client(&self) -> Client {
        Client::new(self.paths.socket())
    }

    /// The daemon; it is started, or replaced if it is stale, where needed. One that dies between two requests of a
    /// command is started again.
    pub(crate) async fn daemon(&self) -> Result<Daemon, Failure> {
        self.daemon_as(ensure_daemon::Mode::from_env()).await
    }

    /// As [`Context::daemon`], whatever the environment says of starting it.
    pub(crate) async fn daemon_as(&self, mode: ensure_daemon::Mode) -> Result<Daemon, Failure> {
        let mut daemon = ensure_daemon::ensure(&self.paths, mode).await?;
        if mode == ensure_daemon::Mode::Start {
            let paths = self.paths.clone();
            daemon.client = daemon.client.reviving(Arc::new(move || {
                let paths = paths.clone();
                Box::pin(async move {
                    let ensured = ensure_daemon::ensure(&paths, mode).await;
                    ensured.map(drop).map_err(|failure| failure.0)
                })
            }));
        }
        Ok(daemon)
    }
}

/// Runs a command that needs the daemon.
pub(crate) fn with_daemon<F>(command: impl FnOnce(Context, Daemon) -> F) -> Outcome
where
    F: Future<Output = Outcome>,
{
    let context = Context::from_env()?;
    block_on(async {
        let daemon = context.daemon().await?;
        let client = context.client();
        tokio::select! {
            outcome = command(context, daemon) => outcome,
            failure = ensure_daemon::silence(&client) => Err(failure),
        }
    })
}

/// Runs a future on this thread. Only verbs that talk to the daemon pay for a runtime.
pub(crate) fn block_on<F: Future<Output = Outcome>>(future: F) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| {
            Failure::new(ErrorCode::Internal, "cannot start the event loop").caused_by(&error)
        })?;
    let outcome = runtime.block_on(future);
    // A blocked read of stdin must not hold up the end.
    runtime.shutdown_background();
    outcome
}

/// This program's own file, also after an update has replaced it.
pub(crate) fn own_program() -> Result<PathBuf, Failure> {
    let program = std::env::current_exe().map_err(|error| {
        Failure::new(ErrorCode::Internal, "cannot find the path of this program").caused_by(&error)
    })?;
    let text = program.to_string_lossy();
    match text.strip_suffix(" (deleted)") {
        Some(path) => Ok(PathBuf::from(path)),
        None => Ok(program),
    }
}
