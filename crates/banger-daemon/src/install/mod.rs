//! Installs Firecracker from a release archive or a program.
//!
//! The archive is staged beside the program's place, compared with its checksum, and read as a stream; the program in
//! it is staged, checked, asked for its version, and then renamed into place. Whatever ends this early leaves what was
//! installed before as it was.

mod archive;
mod download;
mod error;
mod source;
mod staged;
#[cfg(test)]
mod tests;

use crate::operations::{Made, Reporter};
use crate::world::World;
use banger_api::daemon::InstallDriver;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::operation::{Operation, Progress};
use banger_host::exec::{ExecError, Run};
use banger_vmm::firecracker::version::{judge, parse};
use banger_vmm::version::{Verdict, Version};
use download::Downloader;
use error::InstallError;
use source::{Place, Source, find_sha256};
use staged::{CopyError, Staged};
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Mutex;

const PROGRAM: &str = "firecracker";
/// What the name of a release's checksum file has more than that of its archive.
const CHECKSUM_SUFFIX: &str = ".sha256.txt";
const MAX_CHECKSUM_FILE_BYTES: u64 = 16 * 1024;
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a cancel is looked for while nothing comes: operations are cancelled by a flag.
const CANCEL_PERIOD: Duration = Duration::from_millis(50);
const BUSY_PERIOD: Duration = Duration::from_millis(5);
const BUSY_ATTEMPTS: u32 = 200;

/// One installation at a time, so that what lies staged at its start is nobody's.
static INSTALLING: Mutex<()> = Mutex::const_new(());

/// The most that is waited for and taken.
#[derive(Debug, Clone)]
struct Limits {
    connect: Duration,
    /// How long nothing may come.
    stall: Duration,
    /// Bytes of an archive.
    archive: u64,
    /// Bytes of the program.
    program: u64,
    /// Bytes of all that is in an archive.
    unpacked: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(15),
            stall: Duration::from_secs(30),
            archive: 256 << 20,
            program: 128 << 20,
            unpacked: 2 << 30,
        }
    }
}

/// Starts the installation.
pub(crate) fn start(world: &Arc<World>, request: InstallDriver) -> Result<Operation, ErrorBody> {
    let source = Source::new(request)?;
    let folder = world.paths.drivers();
    let guard = INSTALLING.try_lock().map_err(|_| {
        ErrorBody::new(
            ErrorCode::Conflict,
            "Firecracker is being installed by another operation",
        )
        .hint("wait for its end")
    })?;
    Ok(world
        .operations
        .start("driver.install", |reporter| async move {
            let _guard = guard;
            let limits = Limits::default();
            Ok(install(folder, source, limits, reporter, ask_version).await?)
        }))
}

/// Asks a program for its version.
type Ask = fn(&Path) -> Result<Option<Version>, ExecError>;

fn ask_version(program: &Path) -> Result<Option<Version>, ExecError> {
    let mut attempts = 0;
    loop {
        let output = Run::new(program)
            .arg("--version")
            .timeout(VERSION_TIMEOUT)
            .run();
        match output {
            // A process that another thread is just starting holds our closed descriptor until its exec. Nothing tells
            // when it has let go.
            Err(ExecError::Io { source, .. })
                if source.kind() == std::io::ErrorKind::ExecutableFileBusy
                    && attempts < BUSY_ATTEMPTS =>
            {
                attempts += 1;
                std::thread::sleep(BUSY_PERIOD);
            }
            output => return Ok(parse(&String::from_utf8_lossy(&output?.stdout))),
        }
    }
}

async fn install(
    folder: PathBuf,
    source: Source,
    limits: Limits,
    reporter: Reporter,
    ask: Ask,
) -> Result<Made, InstallError> {
    std::fs::create_dir_all(&folder).map_err(InstallError::io("make", &folder))?;
    staged::sweep(&folder)?;
    let (archive, file) = Staged::make(&folder)?;
    let (found, expected) = match &source.place {
        Place::Url(url) => {
            let for_download = file
                .try_clone()
                .map_err(InstallError::io("open", &archive.path))?;
            let downloader = Downloader::new(url, source.sha256.is_some(), &limits)?;
            let work = async {
                // First, since it is short and may not be there.
                let expected = match &source.sha256 {
                    Some(sha256) => sha256.clone(),
                    None => downloader.checksum(url).await?,
                };
                let tell = |done, total| {
                    tell(
                        &reporter,
                        "download",
                        format!("downloading {}", source.subject()),
                        Some(done),
                        total,
                    );
                };
                let found = downloader
                    .archive(url, for_download, &archive.path, tell)
                    .await?;
                Ok((found, Some(expected)))
            };
            unless_cancelled(&reporter.cancel, work).await?
        }
        Place::File(path) => {
            let (path, given, limits, reporter) = (
                path.clone(),
                source.sha256.clone(),
                limits.clone(),
                reporter.clone(),
            );
            let to_path = archive.path.clone();
            let mut to = file
                .try_clone()
                .map_err(InstallError::io("open", &archive.path))?;
            blocking(move || take_file(&path, given, &mut to, &to_path, &limits, &reporter)).await?
        }
    };
    let note = match expected {
        Some(expected) if expected != found => {
            return Err(InstallError::Digest {
                subject: source.subject(),
                expected,
                found,
            });
        }
        Some(_) => "",
        None => "; it was compared with no checksum, since none was given and none lies beside it",
    };
    blocking(move || {
        let subject = source.subject();
        tell(
            &reporter,
            "unpack",
            format!("taking the program out of {subject}"),
            None,
            None,
        );
        let mut file = file;
        let (program, mut to) = Staged::make(&folder)?;
        let digest = archive::take_program(
            &mut file,
            &subject,
            &mut to,
            &program.path,
            &limits,
            &reporter.cancel,
        )?;
        program.finish(to)?;
        drop((file, archive));
        tell(
            &reporter,
            "check",
            "asking the program for its version".to_owned(),
            None,
            None,
        );
        let version = check_version(&program.path, &subject, source.version, ask)?;
        let target = folder.join(PROGRAM);
        if reporter.cancel.load(Ordering::Relaxed) {
            return Err(InstallError::Cancelled);
        }
        let unchanged = staged::sha256_of(&target, &reporter.cancel) == Some(digest);
        program.publish(&target)?;
        tell(
            &reporter,
            "done",
            format!("Firecracker {version} is installed{note}"),
            None,
            None,
        );
        Ok(Made {
            subject: PROGRAM.to_owned(),
            unchanged,
        })
    })
    .await
}

fn tell(reporter: &Reporter, stage: &str, message: String, done: Option<u64>, total: Option<u64>) {
    reporter.progress(Progress {
        stage: stage.to_owned(),
        message,
        done,
        total,
    });
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, InstallError> + Send + 'static,
) -> Result<T, InstallError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(InstallError::Broken)?
}

async fn unless_cancelled<T>(
    cancel: &AtomicBool,
    work: impl Future<Output = Result<T, InstallError>>,
) -> Result<T, InstallError> {
    let cancelled = async {
        let mut interval = tokio::time::interval(CANCEL_PERIOD);
        while !cancel.load(Ordering::Relaxed) {
            interval.tick().await;
        }
    };
    tokio::select! {
        done = work => done,
        () = cancelled => Err(InstallError::Cancelled),
    }
}

/// Copies a person's file, so that what was compared is what is installed. Gives the SHA-256 that it has, and the one
/// that it should have.
fn take_file(
    path: &Path,
    given: Option<String>,
    to: &mut File,
    to_path: &Path,
    limits: &Limits,
    reporter: &Reporter,
) -> Result<(String, Option<String>), InstallError> {
    let failed = |source| InstallError::From {
        path: path.to_owned(),
        source,
    };
    let mut file = open_regular(path)?;
    let expected = match given {
        Some(sha256) => Some(sha256),
        None => checksum_beside(path)?,
    };
    let total = file.metadata().map_err(failed)?.len();
    let told = |done| {
        tell(
            reporter,
            "read",
            format!("reading {}", path.display()),
            Some(done),
            Some(total),
        );
    };
    let found =
        staged::copy(&mut file, to, limits.archive, &reporter.cancel, told).map_err(|error| {
            match error {
                CopyError::Cancelled => InstallError::Cancelled,
                CopyError::TooLarge => InstallError::TooLarge {
                    what: path.display().to_string(),
                    limit: limits.archive,
                },
                CopyError::Read(source) => failed(source),
                CopyError::Write(source) => InstallError::io("write", to_path)(source),
            }
        })?;
    Ok((found, expected))
}

/// Opens a file; what could make us wait, such as a pipe, is an error.
fn open_regular(path: &Path) -> Result<File, InstallError> {
    let failed = |source| InstallError::From {
        path: path.to_owned(),
        source,
    };
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open(path)
        .map_err(failed)?;
    if file.metadata().map_err(failed)?.is_file() {
        Ok(file)
    } else {
        Err(InstallError::NotFile {
            path: path.to_owned(),
        })
    }
}

/// The SHA-256 in a checksum file beside `path`, if there is one.
fn checksum_beside(path: &Path) -> Result<Option<String>, InstallError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(CHECKSUM_SUFFIX);
    let beside = PathBuf::from(beside);
    let file = match open_regular(&beside) {
        Err(InstallError::From { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Ok(None);
        }
        file => file?,
    };
    let mut bytes = Vec::new();
    file.take(MAX_CHECKSUM_FILE_BYTES)
        .read_to_end(&mut bytes)
        .map_err(|source| InstallError::From {
            path: beside.clone(),
            source,
        })?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    match find_sha256(&String::from_utf8_lossy(&bytes), &name) {
        Some(sha256) => Ok(Some(sha256)),
        None => Err(InstallError::BadChecksumFile {
            name: beside.display().to_string(),
            subject: name.into_owned(),
        }),
    }
}

fn check_version(
    program: &Path,
    subject: &str,
    expected: Option<Version>,
    ask: Ask,
) -> Result<Version, InstallError> {
    let subject = subject.to_owned();
    let version = match ask(program) {
        Ok(Some(version)) => version,
        Ok(None) => return Err(InstallError::NotFirecracker { subject }),
        Err(source) => return Err(InstallError::Unasked { subject, source }),
    };
    if let Verdict::Refused(why) = judge(version) {
        return Err(InstallError::Refused { subject, why });
    }
    match expected {
        Some(expected) if expected != version => Err(InstallError::OtherVersion {
            subject,
            expected: expected.to_string(),
            found: version.to_string(),
        }),
        _ => Ok(version),
    }
}
