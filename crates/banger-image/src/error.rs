//! Why a build failed, and what to do about it.

use std::path::{Path, PathBuf};

/// Why an image, a kernel bundle or a template could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The caller asked to stop.
    #[error("the build was cancelled")]
    Cancelled,
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
    /// A program that the build needs is not installed.
    #[error("the program `{program}` is not installed")]
    ProgramMissing {
        /// The program.
        program: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// A program could not be started or watched.
    #[error("cannot run `{program}`")]
    ProgramStart {
        /// The program.
        program: &'static str,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A program ended with a failure.
    #[error("`{program}` failed ({status}): {stderr}")]
    ProgramFailed {
        /// The program.
        program: &'static str,
        /// How it ended.
        status: String,
        /// The end of what it said, escaped and bounded.
        stderr: String,
    },
    /// A program did not end in time and was killed.
    #[error("`{program}` did not finish within {seconds} s")]
    TimedOut {
        /// The program.
        program: &'static str,
        /// Its time limit.
        seconds: u64,
    },
    /// The user has no range of subordinate ids, which building as an ordinary user needs.
    #[error("user `{user}` has no range in `{file}`")]
    NoSubordinateIds {
        /// The user.
        user: String,
        /// `/etc/subuid` or `/etc/subgid`.
        file: &'static str,
    },
    /// apt has no lists of packages.
    #[error("apt has no package lists on this machine")]
    NoAptLists,
    /// The host has no apt source that an image could be made from.
    #[error("no Debian or Ubuntu source for suite `{suite}` in the host's apt configuration")]
    NoSources {
        /// The suite that was looked for.
        suite: String,
    },
    /// apt knows no such package.
    #[error("apt knows no package `{package}`")]
    PackageUnknown {
        /// The package.
        package: String,
    },
    /// The host's distribution is not one that this build knows.
    #[error("cannot tell the distribution of this host: {reason}")]
    UnknownHost {
        /// What is missing.
        reason: String,
    },
    /// A list of packages holds a line that is no package name.
    #[error("line {line} of `{}` is not a package name", .path.display())]
    PackageList {
        /// The list.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// A file is not a kernel for x86-64.
    #[error("`{}` is not an x86-64 Linux kernel: {found}", .path.display())]
    NotKernel {
        /// The file.
        path: PathBuf,
        /// What was found instead.
        found: String,
    },
    /// An archive or compressed file cannot be read, or holds what it must not.
    #[error("`{subject}` cannot be used: {reason}")]
    BadArchive {
        /// The archive.
        subject: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Modules were given without saying for which release.
    #[error("cannot tell the kernel release: {reason}")]
    NoRelease {
        /// Where it was looked for.
        reason: String,
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
    /// A finished filesystem did not pass its check.
    #[error("the filesystem in `{}` is not clean: {output}", .path.display())]
    NotClean {
        /// The image.
        path: PathBuf,
        /// The end of what `e2fsck` said.
        output: String,
    },
    /// A file holds no ext4 filesystem.
    #[error("`{}` holds no ext4 filesystem", .path.display())]
    NotExt4 {
        /// The file.
        path: PathBuf,
    },
    /// A manifest cannot be read or written as JSON.
    #[error("`{}` is not a valid manifest", .path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// The reason.
        #[source]
        source: serde_json::Error,
    },
}

impl BuildError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    pub(crate) fn archive(subject: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self::BadArchive {
            subject: subject.into(),
            reason: reason.to_string(),
        }
    }

    /// Whether the disk was full.
    pub fn is_disk_full(&self) -> bool {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        let full = |error: &std::io::Error| matches!(error.kind(), StorageFull | QuotaExceeded);
        match self {
            Self::Io { source, .. } | Self::ProgramStart { source, .. } => full(source),
            Self::Ext4 {
                source: mkext4::Error::Io(source),
                ..
            } => full(source),
            Self::ProgramFailed { stderr, .. } => stderr.contains("No space left on device"),
            _ => false,
        }
    }

    /// What a person can do about it.
    pub fn hint(&self) -> Option<String> {
        if self.is_disk_full() {
            return Some("the disk is full: free some space and try again".to_owned());
        }
        match self {
            Self::ProgramMissing { package, .. } => Some(format!("sudo apt-get install {package}")),
            Self::NoSubordinateIds { user, .. } => Some(format!(
                "sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
            )),
            Self::NoAptLists | Self::PackageUnknown { .. } => {
                Some("sudo apt-get update".to_owned())
            }
            Self::NoSources { .. } => {
                Some("see /etc/apt/sources.list and /etc/apt/sources.list.d".to_owned())
            }
            Self::NotKernel { .. } => Some(
                "give a vmlinux or bzImage, such as /boot/vmlinuz-*, or a linux-image .deb"
                    .to_owned(),
            ),
            Self::PackageList { .. } => {
                Some("write one package name a line; text after # is a comment".to_owned())
            }
            Self::ProgramFailed { stderr, .. }
                if stderr.contains("Could not resolve")
                    || stderr.contains("Temporary failure resolving") =>
            {
                Some(
                    "the package mirror cannot be reached: check this machine's network".to_owned(),
                )
            }
            Self::ProgramFailed { stderr, .. } if stderr.contains("404  Not Found") => {
                Some("the package lists are stale: sudo apt-get update".to_owned())
            }
            _ => None,
        }
    }
}
