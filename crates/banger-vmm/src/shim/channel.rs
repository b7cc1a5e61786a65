//! Bytes in and out of sockets that do not block, bounded on both sides.

use rustix::io::Errno;
use rustix::net::SendFlags;
use std::os::fd::AsFd;

/// What a read gave.
pub(super) enum Input {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now.
    Empty,
    /// The other side is gone.
    End,
}

pub(super) fn read(from: impl AsFd, buffer: &mut [u8]) -> Input {
    match rustix::io::read(from, &mut *buffer) {
        Ok(0) => Input::End,
        Ok(length) => Input::Bytes(length),
        Err(Errno::AGAIN | Errno::INTR) => Input::Empty,
        Err(_) => Input::End,
    }
}

/// Takes a stream apart into lines of a bounded length.
pub(super) struct Lines {
    line: Vec<u8>,
    max: usize,
    too_long: bool,
}

/// A line that was longer than allowed and is dropped.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLong;

impl Lines {
    /// Lines of at most `max` bytes, newline included.
    pub(super) fn new(max: usize) -> Self {
        Self {
            line: Vec::new(),
            max,
            too_long: false,
        }
    }

    /// The lines that end in `bytes`, without their newline.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Vec<Result<Vec<u8>, TooLong>> {
        let mut lines = Vec::new();
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            if self.line.len() + piece.len() > self.max {
                self.too_long = true;
                self.line.clear();
            }
            if !self.too_long {
                self.line.extend_from_slice(piece);
            }
            if piece.ends_with(b"\n") {
                let mut line = std::mem::take(&mut self.line);
                line.pop();
                lines.push(if std::mem::take(&mut self.too_long) {
                    Err(TooLong)
                } else {
                    Ok(line)
                });
            }
        }
        lines
    }

    /// Forgets a line that was begun.
    pub(super) fn clear(&mut self) {
        self.line.clear();
        self.too_long = false;
    }
}

/// What is still to be sent.
pub(super) struct Outbox {
    bytes: Vec<u8>,
    max: usize,
}

/// The other side does not read, or is gone.
#[derive(Debug)]
pub(super) struct Unsendable;

impl Outbox {
    pub(super) fn new(max: usize) -> Self {
        Self {
            bytes: Vec::new(),
            max,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Queues `bytes` and sends what can be sent now.
    pub(super) fn send(&mut self, to: impl AsFd, bytes: &[u8]) -> Result<(), Unsendable> {
        self.flush(&to)?;
        if self.bytes.len() + bytes.len() > self.max {
            return Err(Unsendable);
        }
        self.bytes.extend_from_slice(bytes);
        self.flush(to)
    }

    /// Sends what can be sent now.
    pub(super) fn flush(&mut self, to: impl AsFd) -> Result<(), Unsendable> {
        while !self.bytes.is_empty() {
            match rustix::net::send(&to, &self.bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => drop(self.bytes.drain(..sent)),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(_) => return Err(Unsendable),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole_however_they_are_cut() {
        let text = b"one\ntwo\n\nthree\n";
        for cut in 0..text.len() {
            let mut lines = Lines::new(16);
            let mut all = lines.push(&text[..cut]);
            all.extend(lines.push(&text[cut..]));
            let all: Vec<_> = all.into_iter().map(Result::unwrap).collect();
            assert_eq!(all, [&b"one"[..], b"two", b"", b"three"], "{cut}");
        }
    }

    #[test]
    fn a_line_that_is_too_long_is_dropped_whole_and_memory_stays_bounded() {
        let mut lines = Lines::new(8);
        for _ in 0..1000 {
            assert_eq!(lines.push(&[b'x'; 100]), []);
            assert!(lines.line.len() <= 8);
        }
        assert_eq!(lines.push(b"x\nok\n"), [Err(TooLong), Ok(b"ok".to_vec())]);
        assert_eq!(lines.push(b"1234567\n"), [Ok(b"1234567".to_vec())]);
        assert_eq!(lines.push(b"12345678\n"), [Err(TooLong)]);
    }
}
