//! Takes the program out of a release archive, which is never unpacked.

use super::error::InstallError;
use super::source::ARCH;
use super::staged::{CopyError, copy};
use super::{Limits, staged};
use flate2::read::MultiGzDecoder;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::Path;
use std::sync::atomic::AtomicBool;

const ELF_HEADER: usize = 20;
const ELF_MAGIC: &[u8] = b"\x7fELF";
const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];

/// Copies the program in `file`, which is an archive or the program itself, to `to`. Gives the program's SHA-256.
pub(super) fn take_program(
    file: &mut File,
    subject: &str,
    to: &mut (impl Write + Seek + Read),
    to_path: &Path,
    limits: &Limits,
    cancel: &AtomicBool,
) -> Result<String, InstallError> {
    let bad = |source| InstallError::BadArchive {
        subject: subject.to_owned(),
        source,
    };
    file.rewind().map_err(bad)?;
    let mut magic = Vec::new();
    Read::by_ref(file)
        .take(4)
        .read_to_end(&mut magic)
        .map_err(bad)?;
    file.rewind().map_err(bad)?;
    let digest = if magic == ELF_MAGIC {
        copy(file, to, limits.program, cancel, |_| ())
            .map_err(|error| copy_error(error, subject, "", to_path, limits.program))?
    } else if magic.starts_with(GZIP_MAGIC) {
        from_archive(file, subject, to, to_path, limits, cancel)?
    } else {
        return Err(InstallError::UnknownKind {
            subject: subject.to_owned(),
        });
    };
    let written = |source| InstallError::Io {
        action: "read",
        path: to_path.to_owned(),
        source,
    };
    to.rewind().map_err(written)?;
    let mut header = Vec::new();
    to.take(ELF_HEADER as u64)
        .read_to_end(&mut header)
        .map_err(written)?;
    match wrong_program(&header) {
        None => Ok(digest),
        Some(found) => Err(InstallError::WrongProgram {
            subject: subject.to_owned(),
            found,
            arch: ARCH,
        }),
    }
}

fn from_archive(
    file: &mut File,
    subject: &str,
    to: &mut impl Write,
    to_path: &Path,
    limits: &Limits,
    cancel: &AtomicBool,
) -> Result<String, InstallError> {
    let bad = |source| InstallError::BadArchive {
        subject: subject.to_owned(),
        source,
    };
    let mut unpacked = Bounded {
        inner: MultiGzDecoder::new(io::BufReader::new(file)),
        left: limits.unpacked,
        cancel,
    };
    let mut digest = None;
    let mut archive = tar::Archive::new(&mut unpacked);
    // Raw, since otherwise long names are read into memory whatever their length.
    for entry in archive.entries().map_err(bad)?.raw(true) {
        let mut entry = entry.map_err(|error| bounded_error(error, subject, limits))?;
        if digest.is_some()
            || !entry.header().entry_type().is_file()
            || !is_program(&entry.path_bytes())
        {
            continue;
        }
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        if entry.size() > limits.program {
            return Err(InstallError::TooLarge {
                what: format!("{name}` in `{subject}"),
                limit: limits.program,
            });
        }
        let copied = copy(&mut entry, to, limits.program, cancel, |_| ());
        digest = Some(copied.map_err(|error| match error {
            CopyError::Read(error) => bounded_error(error, subject, limits),
            other => copy_error(other, subject, &name, to_path, limits.program),
        })?);
    }
    // To the end, where the checksum of gzip is.
    staged::copy(&mut unpacked, &mut io::sink(), u64::MAX, cancel, |_| ()).map_err(|error| {
        match error {
            CopyError::Read(error) => bounded_error(error, subject, limits),
            other => copy_error(other, subject, "", to_path, limits.unpacked),
        }
    })?;
    digest.ok_or_else(|| InstallError::NoProgram {
        subject: subject.to_owned(),
        arch: ARCH,
    })
}

fn copy_error(
    error: CopyError,
    subject: &str,
    entry: &str,
    to_path: &Path,
    limit: u64,
) -> InstallError {
    match error {
        CopyError::Cancelled => InstallError::Cancelled,
        CopyError::TooLarge => InstallError::TooLarge {
            what: if entry.is_empty() {
                subject.to_owned()
            } else {
                format!("{entry}` in `{subject}")
            },
            limit,
        },
        CopyError::Read(source) => InstallError::BadArchive {
            subject: subject.to_owned(),
            source,
        },
        CopyError::Write(source) => InstallError::io("write", to_path)(source),
    }
}

/// What [`Bounded`] says through an [`io::Error`].
#[derive(Debug, thiserror::Error)]
enum Bound {
    #[error("it was cancelled")]
    Cancelled,
    #[error("it unpacks to too much")]
    TooLarge,
}

fn bounded_error(error: io::Error, subject: &str, limits: &Limits) -> InstallError {
    // tar wraps some errors in its own.
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(cause) = next {
        let inner = cause
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref)
            .map(|inner| inner as &(dyn std::error::Error + 'static));
        match cause
            .downcast_ref::<Bound>()
            .or_else(|| inner.and_then(|inner| inner.downcast_ref::<Bound>()))
        {
            Some(Bound::Cancelled) => return InstallError::Cancelled,
            Some(Bound::TooLarge) => {
                return InstallError::TooLarge {
                    what: format!("the unpacked {subject}"),
                    limit: limits.unpacked,
                };
            }
            None => next = inner.or_else(|| cause.source()),
        }
    }
    InstallError::BadArchive {
        subject: subject.to_owned(),
        source: error,
    }
}

/// A reader that ends in an error after so many bytes, or when it is cancelled.
struct Bounded<'a, R> {
    inner: R,
    left: u64,
    cancel: &'a AtomicBool,
}

impl<R: Read> Read for Bounded<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancel.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(io::Error::other(Bound::Cancelled));
        }
        let read = self.inner.read(buffer)?;
        match self.left.checked_sub(read as u64) {
            Some(left) => self.left = left,
            None => return Err(io::Error::other(Bound::TooLarge)),
        }
        Ok(read)
    }
}

/// Whether a path in an archive is `release-v*/firecracker-v*-<arch>`.
fn is_program(path: &[u8]) -> bool {
    let path = path.strip_prefix(b"./").unwrap_or(path);
    let mut parts = path.split(|&byte| byte == b'/');
    let (Some(folder), Some(name), None) = (parts.next(), parts.next(), parts.next()) else {
        return false;
    };
    folder.starts_with(b"release-v")
        && name
            .strip_prefix(b"firecracker-v")
            .is_some_and(|rest| rest.ends_with(format!("-{ARCH}").as_bytes()))
}

/// What a file that begins so is, if it is no program of this machine.
fn wrong_program(header: &[u8]) -> Option<String> {
    let Some(header) = header
        .first_chunk::<ELF_HEADER>()
        .filter(|h| h.starts_with(ELF_MAGIC))
    else {
        return Some("no ELF program".to_owned());
    };
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let (class, order, kind, machine) = (header[4], header[5], half(16), half(18));
    let ours = match ARCH {
        "x86_64" => 62,
        "aarch64" => 183,
        _ => {
            return Some(format!(
                "for a machine that Firecracker does not run on, {ARCH}"
            ));
        }
    };
    if (class, order) != (2, 1) {
        return Some("no 64-bit little-endian ELF program".to_owned());
    }
    if machine != ours {
        return Some(match machine {
            62 => "an x86_64 program".to_owned(),
            183 => "an aarch64 program".to_owned(),
            other => format!("an ELF program for machine {other}"),
        });
    }
    // Executable, or position-independent executable.
    (!matches!(kind, 2 | 3)).then(|| "an ELF file that is no program".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_program_itself_is_the_program() {
        let program = |path: String| is_program(path.as_bytes());
        assert!(program(format!(
            "release-v1.16.1-{ARCH}/firecracker-v1.16.1-{ARCH}"
        )));
        assert!(program(format!(
            "./release-v1.16.1-{ARCH}/firecracker-v1.16.1-{ARCH}"
        )));
        for other in [
            format!("release-v1.16.1-{ARCH}/firecracker-v1.16.1-{ARCH}.debug"),
            format!("release-v1.16.1-{ARCH}/jailer-v1.16.1-{ARCH}"),
            format!("release-v1.16.1-{ARCH}/x/firecracker-v1.16.1-{ARCH}"),
            format!("../release-v1/firecracker-v1.16.1-{ARCH}"),
            format!("firecracker-v1.16.1-{ARCH}"),
            "release-v1.16.1/firecracker-v1.16.1-riscv64".to_owned(),
        ] {
            assert!(!program(other.clone()), "{other}");
        }
    }

    #[test]
    fn an_elf_file_is_judged_by_its_header() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let mut header = own[..ELF_HEADER].to_vec();
        assert_eq!(wrong_program(&header), None);
        header[18] = 8;
        assert!(wrong_program(&header).unwrap().contains("machine 8"));
        header[4] = 1;
        assert!(wrong_program(&header).unwrap().contains("64-bit"));
        assert!(wrong_program(b"\x7fELF").unwrap().contains("no ELF"));
        assert!(wrong_program(b"#!/bin/sh\necho hello world\n").is_some());
    }
}
