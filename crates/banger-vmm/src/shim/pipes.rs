//! The FIFOs that a VMM writes its log and its metrics to.

use crate::console::RingWriter;
use crate::protocol::{Control, Ring};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// The shim's ends, held open for as long as the VM runs: what the VMM opens has a reader from the start, and what it
/// wrote last is still there after its end.
#[derive(Debug, Default)]
pub(super) struct Pipes {
    pub(super) log: Option<OwnedFd>,
    pub(super) metrics: Option<(OwnedFd, RingWriter)>,
}

impl Pipes {
    /// Makes the FIFOs that `control` names. Metrics go on to `metrics`.
    pub(super) fn make(control: &Control, metrics: &Ring) -> io::Result<Self> {
        let Control::Firecracker {
            log_pipe,
            metrics_pipe,
            ..
        } = control
        else {
            return Ok(Self::default());
        };
        Ok(Self {
            log: Some(make(log_pipe)?),
            metrics: Some((make(metrics_pipe)?, RingWriter::open(metrics.clone())?)),
        })
    }
}

fn make(path: &Path) -> io::Result<OwnedFd> {
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, path, FileType::Fifo, mode, 0)?;
    // A reader alone would be told of a hang-up again and again once its writer has closed.
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Removes the FIFOs, as far as they are there.
pub(super) fn remove(control: &Control) -> rustix::io::Result<()> {
    let Control::Firecracker {
        log_pipe,
        metrics_pipe,
        ..
    } = control
    else {
        return Ok(());
    };
    for path in [log_pipe, metrics_pipe] {
        match rustix::fs::unlink(path) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
