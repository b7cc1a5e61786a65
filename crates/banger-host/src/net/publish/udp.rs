//! Datagrams: each sender has a socket of its own to the guest while it talks.

use super::Figures;
use crate::exec::timespec;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::io::{self, PipeReader};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The most senders at a time; one more takes the place of the one that has been silent longest.
const MAX_SENDERS: usize = 256;
/// A sender that neither said nor heard anything for so long is forgotten.
const SILENCE: Duration = Duration::from_secs(60);
/// The most that one side is listened to before the other has its turn.
const TURN: usize = 64;
const MAX_DATAGRAM_BYTES: usize = 65536;

pub(super) struct Forwarder {
    outside: UdpSocket,
    guest: SocketAddrV4,
    figures: Arc<Figures>,
    senders: Vec<Sender>,
    buffer: Vec<u8>,
}

struct Sender {
    address: SocketAddr,
    to_guest: UdpSocket,
    last_word: Instant,
    refused: bool,
}

impl Forwarder {
    pub(super) fn new(outside: UdpSocket, guest: SocketAddrV4, figures: Arc<Figures>) -> Self {
        Self {
            outside,
            guest,
            figures,
            senders: Vec::new(),
            buffer: vec![0; MAX_DATAGRAM_BYTES],
        }
    }

    /// Works until the other end of `stopped` is closed.
    pub(super) fn run(mut self, stopped: &PipeReader) {
        while let Ok((outside, senders)) = self.wait(stopped) {
            for (number, ready) in senders.into_iter().enumerate() {
                if ready {
                    self.answer(number);
                }
            }
            let now = Instant::now();
            self.senders
                .retain(|one| !one.refused && now < one.last_word + SILENCE);
            if outside {
                self.ask();
            }
            self.figures.now(self.senders.len());
        }
    }

    /// Waits for something to do: whether it comes from outside, and which senders the guest answers.
    fn wait(&self, stopped: &PipeReader) -> io::Result<(bool, Vec<bool>)> {
        let mut fds = vec![
            PollFd::new(stopped, PollFlags::IN),
            PollFd::new(&self.outside, PollFlags::IN),
        ];
        let sockets = self.senders.iter();
        fds.extend(sockets.map(|one| PollFd::new(&one.to_guest, PollFlags::IN)));
        let oldest = self.senders.iter().map(|one| one.last_word).min();
        let limit =
            oldest.map(|last| timespec((last + SILENCE).saturating_duration_since(Instant::now())));
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        if ready.next() == Some(true) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok((ready.next() == Some(true), ready.collect()))
    }

    /// Passes on to the guest.
    fn ask(&mut self) {
        for _ in 0..TURN {
            let Ok((length, from)) = self.outside.recv_from(&mut self.buffer) else {
                // Nothing more, or an error about an earlier answer, which is its sender's own matter.
                return;
            };
            let now = Instant::now();
            let known = self.senders.iter().position(|one| one.address == from);
            let number = match known.map_or_else(|| self.welcome(from, now), Ok) {
                Ok(number) => number,
                Err(_) => {
                    self.figures.failed();
                    continue;
                }
            };
            let sender = &mut self.senders[number];
            sender.last_word = now;
            // As everywhere with UDP: what finds no room is lost.
            let _ = sender.to_guest.send(&self.buffer[..length]);
        }
    }

    fn welcome(&mut self, address: SocketAddr, now: Instant) -> io::Result<usize> {
        let to_guest = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        to_guest.set_nonblocking(true)?;
        to_guest.connect(self.guest)?;
        if self.senders.len() >= MAX_SENDERS {
            let oldest = self.senders.iter().enumerate();
            if let Some((number, _)) = oldest.min_by_key(|(_, one)| one.last_word) {
                self.senders.swap_remove(number);
            }
        }
        self.senders.push(Sender {
            address,
            to_guest,
            last_word: now,
            refused: false,
        });
        self.figures.began(self.senders.len());
        Ok(self.senders.len() - 1)
    }

    /// Passes the guest's words on to a sender.
    fn answer(&mut self, number: usize) {
        let sender = &mut self.senders[number];
        for _ in 0..TURN {
            match sender.to_guest.recv(&mut self.buffer) {
                Ok(length) => {
                    sender.last_word = Instant::now();
                    let _ = self.outside.send_to(&self.buffer[..length], sender.address);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Nobody listens in the guest.
                Err(_) => {
                    sender.refused = true;
                    self.figures.failed();
                    return;
                }
            }
        }
    }
}
