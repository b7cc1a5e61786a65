//! A client of a shim: blocking, for one who has a thread to spare, or to make a connection for another runtime.

use crate::protocol::{Command, FromShim, Status, Verb};
use crate::socket;
use rustix::net::SocketFlags;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Connects to the shim's socket at `shim_socket`, whatever the path's length. The stream blocks.
pub fn connect(shim_socket: &Path) -> io::Result<UnixStream> {
    socket::connect(shim_socket, SocketFlags::empty()).map(UnixStream::from)
}

/// A connection to a shim.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    line: Vec<u8>,
    next_id: u64,
    /// What came while a reply was waited for.
    passed: std::collections::VecDeque<FromShim>,
}

impl Client {
    /// Connects, and reads the status that a shim begins with, at most for `limit`.
    pub fn connect(shim_socket: &Path, limit: Duration) -> io::Result<(Self, Status)> {
        let mut client = Self {
            stream: BufReader::new(connect(shim_socket)?),
            line: Vec::new(),
            next_id: 1,
            passed: Default::default(),
        };
        match client.next(Instant::now() + limit)? {
            Some(FromShim::Status(status)) => Ok((client, status)),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// The next line that is no answer to a request; `None` at the end. Waits until `deadline`.
    pub fn next(&mut self, deadline: Instant) -> io::Result<Option<FromShim>> {
        match self.passed.pop_front() {
            Some(line) => Ok(Some(line)),
            None => self.read(deadline),
        }
    }

    /// Asks, and waits for the reply until `deadline`. The inner error is the shim's.
    pub fn request(&mut self, verb: Verb, deadline: Instant) -> io::Result<Result<(), String>> {
        let id = self.next_id;
        self.next_id += 1;
        let mut line = serde_json::to_vec(&Command { id, verb })?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line)?;
        loop {
            match self.read(deadline)? {
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(FromShim::Reply(reply)) if reply.id == id => {
                    return Ok(reply.error.map_or(Ok(()), Err));
                }
                Some(other) => self.passed.push_back(other),
            }
        }
    }

    fn read(&mut self, deadline: Instant) -> io::Result<Option<FromShim>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.get_ref().set_read_timeout(Some(left))?;
            match self.stream.read_until(b'\n', &mut self.line) {
                Ok(_) if self.line.ends_with(b"\n") => {
                    let line = serde_json::from_slice(&self.line);
                    self.line.clear();
                    return Ok(Some(line?));
                }
                Ok(_) => return Ok(None),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(error),
            }
        }
    }
}
