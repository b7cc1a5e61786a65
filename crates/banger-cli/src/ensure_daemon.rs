//! Starts the daemon when it is needed.
//!
//! A daemon that listens, and whose lock file names the very build that this program would start, is used at once. Else
//! the socket is probed; if nobody answers, the start-up lock is taken, the socket probed again, `bangerd` spawned and
//! its one line of readiness read. Where systemd starts the daemon with the host, it is asked to start it. A daemon of
//! another build than the `bangerd` that this program would start is stopped first, at most once a minute; its VMs run
//! on.

use crate::context::{Daemon, own_program};
use crate::report::{Failure, note, warn};
use crate::systemd;
use banger_api::client::{Client, ClientError, DaemonIdentity, is_absence};
use banger_api::daemon::{DaemonStatus, StopDaemon};
use banger_api::endpoint::{GetDaemon, Nothing, PostDaemonStop};
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::paths::{Env, Paths, ProcessEnv, find_program};
use banger_api::version::{VERSION, build_id};
use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

mod spawn;

/// How long a daemon may take to answer a probe.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// How long a command may go without an answer before the daemon is probed.
const QUIET_LIMIT: Duration = Duration::from_secs(5);
/// How long another program may hold the start-up lock: it may be waiting for a stale daemon and then for a new one.
const START_LOCK_LIMIT: Duration = Duration::from_secs(150);
/// How long a daemon may take to end after it was told to, its VMs aside.
const STOP_LIMIT: Duration = Duration::from_secs(90);
/// How long no daemon is replaced after one was.
const REPLACE_PAUSE: Duration = Duration::from_secs(60);

/// What may be done when no daemon of this build answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Start one; replace a stale one.
    Start,
    /// Fail; use a stale one.
    Never,
}

impl Mode {
    /// What the environment allows.
    pub(crate) fn from_env() -> Self {
        match ProcessEnv.var("BANGER_NO_AUTOSTART").as_deref() {
            None | Some("" | "0") => Self::Start,
            Some(_) => Self::Never,
        }
    }
}

/// What the socket says.
enum Probe {
    /// A daemon answers.
    Answers(Box<DaemonStatus>, DaemonIdentity),
    /// A daemon answers something that this program does not understand.
    Foreign(ClientError),
    /// Nobody listens.
    Absent(ClientError),
}

/// The daemon, started or replaced where needed.
///
/// # Errors
/// The runtime folder is not safe, or the daemon cannot be started or does not answer.
pub(crate) async fn ensure(paths: &Paths, mode: Mode) -> Result<Daemon, Failure> {
    prepare_runtime_dir(paths)?;
    let client = Client::new(paths.socket());
    if is_ours(paths) {
        return Ok(Daemon { client });
    }
    let first = probe(&client).await?;
    if let Some(daemon) = accept(first, &client, paths, mode)? {
        return Ok(daemon);
    }
    let _lock = take_start_lock(paths)?;
    match probe(&client).await? {
        Probe::Absent(_) => {}
        found => {
            if let Some(daemon) = accept(found, &client, paths, mode)? {
                return Ok(daemon);
            }
            note("the running daemon is of another build; it is replaced (VMs run on)");
            touch_stamp(paths);
            stop(&client, paths, StopDaemon::default(), STOP_LIMIT).await?;
        }
    }
    start(&client, paths).await
}

/// Stops the daemon if it runs, then starts it.
pub(crate) async fn restart(paths: &Paths) -> Result<Daemon, Failure> {
    prepare_runtime_dir(paths)?;
    let client = Client::new(paths.socket());
    let _lock = take_start_lock(paths)?;
    if !matches!(probe(&client).await?, Probe::Absent(_)) {
        stop(&client, paths, StopDaemon::default(), STOP_LIMIT).await?;
    }
    start(&client, paths).await
}

/// The status of a daemon that runs; `None` if none does. Starts nothing.
pub(crate) async fn status(paths: &Paths) -> Result<Option<DaemonStatus>, Failure> {
    match probe(&Client::new(paths.socket())).await? {
        Probe::Answers(status, _) => Ok(Some(*status)),
        Probe::Foreign(error) => Err(error.into()),
        Probe::Absent(_) => Ok(None),
    }
}

/// Tells a daemon to stop, and waits until it has ended. `false` if none ran.
pub(crate) async fn stop_if_running(
    paths: &Paths,
    request: StopDaemon,
    limit: Duration,
) -> Result<bool, Failure> {
    let client = Client::new(paths.socket());
    if matches!(probe(&client).await?, Probe::Absent(_)) {
        return Ok(false);
    }
    stop(&client, paths, request, limit).await?;
    Ok(true)
}

/// Judges what answered: a daemon to use, `None` if one has to be started (or this one replaced), or a failure.
fn accept(
    found: Probe,
    client: &Client,
    paths: &Paths,
    mode: Mode,
) -> Result<Option<Daemon>, Failure> {
    match found {
        Probe::Answers(_, identity) => {
            let replace = mode == Mode::Start
                && bangerd().is_ok_and(|program| {
                    let ours = DaemonIdentity {
                        version: VERSION.to_owned(),
                        build: build_id(&program).unwrap_or_default(),
                    };
                    is_stale(&identity, &ours) && !replaced_lately(paths)
                });
            Ok((!replace).then(|| Daemon {
                client: client.clone(),
            }))
        }
        Probe::Foreign(error) if mode == Mode::Never || replaced_lately(paths) => Err(error.into()),
        Probe::Absent(error) if mode == Mode::Never => Err(Failure::from(error).hint(
            "BANGER_NO_AUTOSTART is set; `banger daemon start` starts the daemon all the same",
        )),
        Probe::Foreign(_) | Probe::Absent(_) => Ok(None),
    }
}

/// Whether the running daemon gives way to ours: another build, and not of a newer version, whose database ours
/// could not read.
fn is_stale(running: &DaemonIdentity, ours: &DaemonIdentity) -> bool {
    let numbers = |version: &str| -> Vec<u64> {
        version
            .split(['.', '-', '+'])
            .map_while(|part| part.parse().ok())
            .collect()
    };
    !ours.build.is_empty()
        && running.build != ours.build
        && numbers(&running.version) <= numbers(&ours.version)
}

/// Whether a daemon listens that is the build that this program would start. It says so in its lock file, which spares
/// every command a question; one that hangs is noticed by [`silence`].
fn is_ours(paths: &Paths) -> bool {
    let build = std::fs::read_to_string(paths.daemon_lock()).unwrap_or_default();
    !build.is_empty()
        && bangerd().is_ok_and(|program| build_id(&program).is_ok_and(|ours| ours == build))
        && std::os::unix::net::UnixStream::connect(paths.socket()).is_ok()
}

/// Ends, with what is wrong, if the daemon does not answer at all. A command is worked on for as long as it takes, but
/// a daemon always answers a probe.
pub(crate) async fn silence(client: &Client) -> Failure {
    loop {
        tokio::time::sleep(QUIET_LIMIT).await;
        if let Err(failure) = probe(client).await {
            return failure;
        }
    }
}

async fn probe(client: &Client) -> Result<Probe, Failure> {
    check_socket(client.socket())?;
    let call = client.call_identified::<GetDaemon>(&[], &Nothing {}, None);
    let Ok(answer) = tokio::time::timeout(ANSWER_LIMIT, call).await else {
        let message = format!(
            "the daemon at `{}` did not answer within {} s",
            client.socket().display(),
            ANSWER_LIMIT.as_secs()
        );
        return Err(Failure::new(ErrorCode::DaemonUnreachable, message)
            .hint("`banger daemon logs` shows what the daemon said last"));
    };
    match answer {
        Ok((status, identity)) => Ok(Probe::Answers(Box::new(status), identity)),
        Err(ClientError::Connect { socket, source }) if is_absence(&source) => {
            Ok(Probe::Absent(ClientError::Connect { socket, source }))
        }
        // It went down between accepting and answering: as good as absent, the daemon's own lock keeps order.
        Err(error @ ClientError::Broken { .. }) => Ok(Probe::Absent(error)),
        Err(error @ ClientError::Unreadable { .. }) => Ok(Probe::Foreign(error)),
        Err(ClientError::Refused(body)) if body.code == ErrorCode::ShuttingDown => {
            Ok(Probe::Absent(ClientError::Refused(body)))
        }
        Err(error) => Err(error.into()),
    }
}

/// Refuses what is in the socket's place and is none: connecting would only say that the connection was refused.
fn check_socket(socket: &Path) -> Result<(), Failure> {
    let Ok(metadata) = std::fs::symlink_metadata(socket) else {
        return Ok(());
    };
    let kind = metadata.file_type();
    if kind.is_socket() {
        return Ok(());
    }
    let what = if kind.is_dir() {
        "a directory"
    } else {
        "no socket"
    };
    let message = format!(
        "the path of the daemon's socket, `{}`, is {what}",
        socket.display()
    );
    Err(Failure::new(ErrorCode::DaemonUnreachable, message)
        .hint("move it away and repeat the command"))
}

/// Makes the runtime folder, and refuses one that others could change.
fn prepare_runtime_dir(paths: &Paths) -> Result<(), Failure> {
    let folder = &paths.runtime;
    let unfit = |message: String| Failure::new(ErrorCode::HostUnfit, message);
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|error| {
            unfit(format!(
                "cannot make the runtime folder `{}`",
                folder.display()
            ))
            .caused_by(&error)
            .hint("point XDG_RUNTIME_DIR to a folder of your own, or unset it")
        })?;
    let metadata = std::fs::symlink_metadata(folder).map_err(|error| {
        unfit(format!(
            "cannot look at the runtime folder `{}`",
            folder.display()
        ))
        .caused_by(&error)
    })?;
    let uid = ProcessEnv.uid();
    if !metadata.is_dir() {
        return Err(unfit(format!(
            "the runtime folder `{}` is no folder",
            folder.display()
        ))
        .hint("move it away and repeat the command"));
    }
    if metadata.uid() != uid {
        let message = format!(
            "the runtime folder `{}` belongs to uid {}, not to you (uid {uid})",
            folder.display(),
            metadata.uid()
        );
        return Err(
            unfit(message).hint("point XDG_RUNTIME_DIR to a folder of your own, or unset it")
        );
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(unfit(format!(
            "others may write to the runtime folder `{}`",
            folder.display()
        ))
        .hint(format!("chmod 700 {}", folder.display())));
    }
    Ok(())
}

/// Waits until nobody else starts or replaces the daemon. The lock goes with the file.
fn take_start_lock(paths: &Paths) -> Result<File, Failure> {
    lock_within(&paths.start_lock(), START_LOCK_LIMIT)?.ok_or_else(|| {
        let message = format!(
            "another program has been starting the daemon for {} s (it holds `{}`)",
            START_LOCK_LIMIT.as_secs(),
            paths.start_lock().display()
        );
        Failure::new(ErrorCode::DaemonUnreachable, message)
            .hint("`banger daemon logs` shows what the daemon said last")
    })
}

/// Takes the lock on `path` once it is free; `None` if it is not within `limit`.
fn lock_within(path: &Path, limit: Duration) -> Result<Option<File>, Failure> {
    let failed = |error: std::io::Error| {
        Failure::new(
            ErrorCode::DaemonUnreachable,
            format!("cannot lock `{}`", path.display()),
        )
        .caused_by(&error)
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    if file.try_lock().is_ok() {
        return Ok(Some(file));
    }
    // `flock` has no time limit of its own: a thread waits, and is left behind if the limit passes.
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let locked = file.lock().map(|()| file);
        let _ = sender.send(locked);
    });
    match receiver.recv_timeout(limit) {
        Ok(locked) => locked.map(Some).map_err(failed),
        Err(_) => Ok(None),
    }
}

/// Tells the daemon to stop, and waits until its lock is free.
async fn stop(
    client: &Client,
    paths: &Paths,
    request: StopDaemon,
    limit: Duration,
) -> Result<(), Failure> {
    match client.call::<PostDaemonStop>(&[], &request).await {
        Ok(Nothing {}) => {}
        // It is going or gone already.
        Err(ClientError::Connect { .. } | ClientError::Broken { .. }) => {}
        Err(ClientError::Refused(body)) if body.code == ErrorCode::ShuttingDown => {}
        Err(error) => return Err(error.into()),
    }
    let lock = paths.daemon_lock();
    if !lock.exists() || lock_within(&lock, limit)?.is_some() {
        return Ok(());
    }
    let message = format!(
        "the daemon has not ended within {} s of being told to stop",
        limit.as_secs()
    );
    Err(Failure::new(ErrorCode::DaemonUnreachable, message).hint(
        "`banger daemon logs` shows what it is doing; VMs are not touched by ending it with `kill`",
    ))
}

/// Starts the daemon and asks it for its status. The caller holds the start-up lock.
async fn start(client: &Client, paths: &Paths) -> Result<Daemon, Failure> {
    let program = bangerd()?;
    let started = systemd::starts(paths, &program).then(systemd::start);
    match started {
        Some(Ok(())) => {}
        Some(Err(failure)) => {
            // The daemon itself says best why it does not start, if that is what went wrong.
            spawn::spawn(&program)?;
            warn(
                &failure.0.message,
                &["the daemon was started without systemd".to_owned()],
            );
        }
        None => spawn::spawn(&program)?,
    }
    match probe(client).await? {
        Probe::Answers(status, _) => {
            for notice in &status.notices {
                note(&format!("notice: {notice}"));
            }
            Ok(Daemon {
                client: client.clone(),
            })
        }
        Probe::Foreign(error) => Err(error.into()),
        Probe::Absent(error) => Err(Failure::new(
            ErrorCode::DaemonUnreachable,
            format!(
                "the daemon said it was ready but does not listen on `{}`",
                paths.socket().display()
            ),
        )
        .caused_by(&error)),
    }
}

/// The `bangerd` that this program would start.
pub(crate) fn bangerd() -> Result<PathBuf, Failure> {
    let program = own_program()?;
    find_program(&ProcessEnv, &program, "bangerd").ok_or_else(|| {
        let folder = program.parent().unwrap_or(Path::new("/")).display().to_string();
        Failure(ErrorBody::new(ErrorCode::DaemonUnreachable, "cannot find the program `bangerd`")).hint(format!(
            "it is looked for in the folder that BANGER_LIBEXEC names, in `{folder}`, and in `libexec/banger` and `lib/banger` beside that"
        ))
    })
}

fn stamp(paths: &Paths) -> PathBuf {
    paths.runtime.join("replaced")
}

fn replaced_lately(paths: &Paths) -> bool {
    let age = std::fs::metadata(stamp(paths))
        .and_then(|metadata| metadata.modified())
        .map(|at| SystemTime::now().duration_since(at));
    // A stamp from the future is a clock that was set back: no reason to wait.
    matches!(age, Ok(Ok(age)) if age < REPLACE_PAUSE)
}

/// Notes that a daemon was replaced just now. Without the note it may be replaced again, which does no harm.
fn touch_stamp(paths: &Paths) {
    let _ = std::fs::write(stamp(paths), "");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(version: &str, build: &str) -> DaemonIdentity {
        DaemonIdentity {
            version: version.to_owned(),
            build: build.to_owned(),
        }
    }

    fn paths(folder: &Path) -> Paths {
        Paths {
            config: folder.join("config"),
            state: folder.join("state"),
            data: folder.join("data"),
            cache: folder.join("cache"),
            runtime: folder.join("run"),
        }
    }

    #[test]
    fn another_build_is_stale_unless_its_version_is_newer() {
        let ours = identity("0.2.0", "b");
        assert!(!is_stale(&identity("0.2.0", "b"), &ours));
        assert!(is_stale(&identity("0.2.0", "a"), &ours));
        assert!(is_stale(&identity("0.1.9", "a"), &ours));
        assert!(!is_stale(&identity("0.10.0", "a"), &ours));
        assert!(!is_stale(&identity("0.2.0", "a"), &identity("0.2.0", "")));
    }

    #[test]
    fn a_daemon_is_not_replaced_twice_within_a_minute() {
        let folder = tempfile::tempdir().unwrap();
        let paths = paths(folder.path());
        std::fs::create_dir(&paths.runtime).unwrap();
        assert!(!replaced_lately(&paths));
        touch_stamp(&paths);
        assert!(replaced_lately(&paths));
        let file = File::open(stamp(&paths)).unwrap();
        file.set_modified(SystemTime::now() - REPLACE_PAUSE)
            .unwrap();
        assert!(!replaced_lately(&paths));
    }

    #[test]
    fn the_runtime_folder_is_private_and_one_that_is_not_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let paths = paths(folder.path());
        prepare_runtime_dir(&paths).unwrap();
        assert_eq!(
            std::fs::metadata(&paths.runtime).unwrap().mode() & 0o777,
            0o700
        );
        std::fs::set_permissions(&paths.runtime, std::fs::Permissions::from_mode(0o770)).unwrap();
        let failure = prepare_runtime_dir(&paths).unwrap_err();
        assert_eq!(failure.exit_code(), 7);
        assert!(failure.0.hints[0].starts_with("chmod 700"), "{failure:?}");
    }

    #[test]
    fn a_directory_in_place_of_the_socket_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("bangerd.sock");
        assert!(check_socket(&socket).is_ok());
        std::fs::create_dir(&socket).unwrap();
        let failure = check_socket(&socket).unwrap_err();
        assert_eq!(failure.exit_code(), 3);
        assert!(failure.0.message.contains("is a directory"), "{failure:?}");
    }

    #[test]
    fn a_lock_that_stays_taken_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let held = lock_within(&path, Duration::from_secs(5)).unwrap().unwrap();
        assert!(
            lock_within(&path, Duration::from_millis(20))
                .unwrap()
                .is_none()
        );
        drop(held);
        // The thread that was given up may have it for a moment.
        assert!(
            lock_within(&path, Duration::from_secs(5))
                .unwrap()
                .is_some()
        );
    }
}
