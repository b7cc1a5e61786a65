//! How the daemon comes up and goes down.
//!
//! Up: folders, lock, log, what `startup` does, socket, readiness.
//! Down (SIGTERM, SIGINT, or asked): no new work, operations cancelled, socket gone. VMs run on.

use crate::log::{self, BoundedLog};
use crate::notify::{self, notify};
use crate::server::{self, App};
use crate::startup;
use crate::vm::files::make_folder;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::paths::{Paths, ProcessEnv};
use std::fs::File;
use std::io::{Seek, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};

/// How long the lock of the state folder may be held by what is left of another daemon.
const LOCK_LIMIT: Duration = Duration::from_secs(30);
/// How often it is tried by then.
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// Runs the daemon until it is told to go down.
pub fn main() -> ExitCode {
    // The daemon outlives the terminal that started it. It fails only for the leader of a group, which is fine.
    let _ = rustix::process::setsid();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let outcome = match runtime {
        Ok(runtime) => {
            let outcome = runtime.block_on(run());
            runtime.shutdown_timeout(Duration::from_secs(2));
            outcome
        }
        Err(error) => Err(ErrorBody::from_error(ErrorCode::Internal, &error)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(code = error.code.name(), error = error.message, causes = ?error.causes, "the daemon did not start");
            announce(&serde_json::json!({ "error": error }));
            ExitCode::from(error.code.exit_code())
        }
    }
}

/// One line on standard output, which is then closed: whoever started the daemon waits for it.
fn announce(line: &serde_json::Value) {
    // Nobody may be listening.
    let _ = writeln!(std::io::stdout(), "{line}");
    let _ = std::io::stdout().flush();
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&null);
        let _ = rustix::stdio::dup2_stdin(&null);
        let _ = rustix::stdio::dup2_stderr(&null);
    }
}

fn unfit(action: &str, path: &Path, error: &std::io::Error) -> ErrorBody {
    ErrorBody::new(
        ErrorCode::HostUnfit,
        format!("cannot {action} `{}`", path.display()),
    )
    .caused_by(error)
    .hint(
        "the folder must belong to you and be writable; XDG_STATE_HOME and its like choose another",
    )
}

async fn run() -> Result<(), ErrorBody> {
    let paths = Paths::from_env(&ProcessEnv).map_err(|error| {
        ErrorBody::from_error(ErrorCode::HostUnfit, &error)
            .hint("set HOME to the absolute path of your home folder")
    })?;
    for folder in [
        &paths.state,
        &paths.data,
        &paths.cache,
        &paths.runtime,
        &paths.vms(),
        &paths.images(),
        &paths.kernels(),
    ] {
        make_folder(folder).map_err(|error| unfit("make", folder, &error))?;
    }
    let lock = take_lock(&paths).await?;
    say_build(&lock, "");
    let log = BoundedLog::open(&paths.daemon_log())
        .map_err(|error| unfit("open", &paths.daemon_log(), &error))?;
    log::init(log);
    let app = startup::build(&paths).await?;
    let listener = listen(&paths.socket())?;
    let mut down = app.world.shutdown.subscribe();
    let world = Arc::clone(&app.world);
    tracing::info!(
        version = banger_api::version::VERSION,
        pid = std::process::id(),
        "serving"
    );
    let mut terminate = signal(SignalKind::terminate())
        .map_err(|error| ErrorBody::from_error(ErrorCode::Internal, &error))?;
    let mut interrupt = signal(SignalKind::interrupt())
        .map_err(|error| ErrorBody::from_error(ErrorCode::Internal, &error))?;
    tokio::spawn({
        let world = Arc::clone(&world);
        async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            world.shutdown.send_replace(true);
        }
    });
    say_build(&lock, &world.build);
    let watcher = tokio::spawn(keep_socket(paths.socket(), app.clone()));
    announce(&serde_json::json!({ "ready": true }));
    notify(notify::READY);
    let server = tokio::spawn(server::serve(listener, app.clone(), async move {
        // The sender lives as long as the world.
        let _ = down.wait_for(|down| *down).await;
    }));
    let mut down = world.shutdown.subscribe();
    let _ = down.wait_for(|down| *down).await;
    tracing::info!("going down");
    notify(notify::STOPPING);
    say_build(&lock, "");
    // Never let go of: it is free when the process is gone, which is what those who wait for it wait for.
    std::mem::forget(lock);
    watcher.abort();
    world.operations.cancel_all().await;
    // Requests under way get a moment to be answered; a stream that nobody reads must not keep the daemon alive.
    let _ = tokio::time::timeout(Duration::from_secs(2), server).await;
    if let Err(error) = std::fs::remove_file(paths.socket()) {
        tracing::debug!(%error, "the socket was gone already");
    }
    if let Err(error) = world.network.close().await {
        tracing::warn!(
            error = banger_host::error_chain(&error),
            "the network was not let go cleanly"
        );
    }
    world.store.checkpoint().await;
    tracing::info!("gone");
    Ok(())
}

/// The lock of the state folder. A daemon that died may have left it for a moment to a child that was about to become
/// another program, or has it itself until the disk has taken what it wrote; there is no event to wait for.
async fn take_lock(paths: &Paths) -> Result<File, ErrorBody> {
    let path = paths.daemon_lock();
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path);
    let file = file.map_err(|error| unfit("open", &path, &error))?;
    let deadline = Instant::now() + LOCK_LIMIT;
    while file.try_lock().is_err() {
        if Instant::now() >= deadline {
            return Err(ErrorBody::new(
                ErrorCode::DaemonUnreachable,
                "another daemon of this state folder is running",
            )
            .hint("`banger daemon status` shows it; `banger daemon restart` replaces it"));
        }
        tokio::time::sleep(LOCK_RETRY).await;
    }
    Ok(file)
}

/// Leaves word in the lock file which build serves, for clients that would else have to ask.
fn say_build(mut lock: &File, build: &str) {
    let said = lock
        .set_len(0)
        .and_then(|()| lock.rewind())
        .and_then(|()| lock.write_all(build.as_bytes()));
    if let Err(error) = said {
        // Clients ask then.
        tracing::debug!(%error, "the lock file does not name the build");
    }
}

/// Binds the socket; one that nobody serves is replaced, since the lock is ours.
fn listen(socket: &Path) -> Result<UnixListener, ErrorBody> {
    let failed = |error: &std::io::Error| unfit("listen on", socket, error);
    match std::fs::symlink_metadata(socket) {
        Ok(metadata) if metadata.file_type().is_socket() => {
            std::fs::remove_file(socket).map_err(|error| failed(&error))?;
        }
        Ok(_) => {
            let message = format!(
                "cannot listen on `{}`: something that is no socket is there",
                socket.display()
            );
            return Err(ErrorBody::new(ErrorCode::HostUnfit, message).hint("move it away"));
        }
        Err(_) => {}
    }
    let bound =
        banger_vmm::socket::listen(socket).and_then(|socket| UnixListener::from_std(socket.into()));
    bound.map_err(|error| failed(&error))
}

/// Makes the socket again when somebody removed it.
async fn keep_socket(socket: std::path::PathBuf, app: App) {
    let mut timer = tokio::time::interval(Duration::from_secs(5));
    loop {
        timer.tick().await;
        if socket.exists() {
            continue;
        }
        tracing::warn!(socket = %socket.display(), "the socket was removed: making it again");
        if let Some(folder) = socket.parent() {
            // If it cannot be made, listening says why.
            let _ = make_folder(folder);
        }
        match listen(&socket) {
            Ok(listener) => {
                let mut down = app.world.shutdown.subscribe();
                tokio::spawn(server::serve(listener, app.clone(), async move {
                    let _ = down.wait_for(|down| *down).await;
                }));
            }
            Err(error) => {
                tracing::warn!(error = error.message, "the socket could not be made again")
            }
        }
    }
}
