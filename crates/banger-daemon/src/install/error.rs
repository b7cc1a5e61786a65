//! What can go wrong while Firecracker is installed.

use banger_api::error::{ErrorBody, ErrorCode};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why Firecracker was not installed.
#[derive(Debug, thiserror::Error)]
pub(super) enum InstallError {
    #[error("the installation of Firecracker was cancelled")]
    Cancelled,
    #[error("cannot {action} `{path}`")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot read `{path}`")]
    From {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("`{path}` is not a regular file")]
    NotFile { path: PathBuf },
    #[error("cannot set up downloads")]
    Client(#[source] reqwest::Error),
    #[error("cannot download `{url}`")]
    Download {
        url: String,
        #[source]
        source: reqwest::Error,
    },
    #[error("cannot download `{url}`: the server answered {status}")]
    Status {
        url: String,
        status: reqwest::StatusCode,
    },
    #[error("cannot download `{url}`: nothing came for {} s", .limit.as_secs_f32())]
    Stalled { url: String, limit: Duration },
    #[error("`{what}` is larger than {limit} bytes")]
    TooLarge { what: String, limit: u64 },
    #[error("the checksum file `{name}` has no SHA-256 of `{subject}`")]
    BadChecksumFile { name: String, subject: String },
    #[error(
        "`{subject}` has another checksum than expected: SHA-256 {expected} was expected, {found} was found"
    )]
    Digest {
        subject: String,
        expected: String,
        found: String,
    },
    #[error("`{subject}` is neither a gzip-compressed archive nor an ELF program")]
    UnknownKind { subject: String },
    #[error("the archive `{subject}` is damaged")]
    BadArchive {
        subject: String,
        #[source]
        source: io::Error,
    },
    #[error("the archive `{subject}` holds no `release-v*/firecracker-v*-{arch}`")]
    NoProgram { subject: String, arch: &'static str },
    #[error(
        "the program in `{subject}` cannot run here: it is {found}, and an {arch} program is needed"
    )]
    WrongProgram {
        subject: String,
        found: String,
        arch: &'static str,
    },
    #[error("the program in `{subject}` cannot be asked for its version")]
    Unasked {
        subject: String,
        #[source]
        source: banger_host::exec::ExecError,
    },
    #[error(
        "the program in `{subject}` is not Firecracker: its `--version` names no Firecracker version"
    )]
    NotFirecracker { subject: String },
    #[error("the program in `{subject}` is not installed: {why}")]
    Refused { subject: String, why: String },
    #[error("the program in `{subject}` is Firecracker {found}, but {expected} was asked for")]
    OtherVersion {
        subject: String,
        expected: String,
        found: String,
    },
    #[error("a part of the installation broke down")]
    Broken(#[source] tokio::task::JoinError),
}

impl InstallError {
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    fn code(&self) -> ErrorCode {
        match self {
            Self::Cancelled => ErrorCode::Cancelled,
            Self::Io { source, .. }
                if matches!(
                    source.kind(),
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                ) =>
            {
                ErrorCode::NoSpace
            }
            Self::Io { .. } | Self::Broken(_) => ErrorCode::Internal,
            Self::Client(_) => ErrorCode::HostUnfit,
            _ => ErrorCode::BadFile,
        }
    }

    fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::Download { .. } | Self::Stalled { .. } => {
                "check the network and the proxy (`https_proxy` as the daemon was started with), or give a file: `banger driver install --from FILE`"
            }
            Self::Status { url, .. } if url.ends_with(super::CHECKSUM_SUFFIX) => {
                "there is no checksum file beside the archive: give the checksum with `--sha256`"
            }
            Self::Status { .. } => {
                "give another version with `--version`, another `--url`, or a file with `--from`"
            }
            Self::BadChecksumFile { .. } => "give the checksum with `--sha256`",
            Self::Digest { .. } => {
                "nothing was installed; get the archive again from a source that you trust"
            }
            Self::UnknownKind { .. } | Self::BadArchive { .. } | Self::NoProgram { .. } => {
                "what is needed is a release archive of Firecracker (.tgz) or its `firecracker` program"
            }
            Self::Client(_) => {
                "install the certificates of the web: `sudo apt-get install ca-certificates`"
            }
            _ => return None,
        })
    }
}

impl From<InstallError> for ErrorBody {
    fn from(error: InstallError) -> Self {
        let body = Self::from_error(error.code(), &error);
        match error.hint() {
            Some(hint) => body.hint(hint),
            None => body,
        }
    }
}
