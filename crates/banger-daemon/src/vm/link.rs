//! The daemon's end of a shim's socket.

use banger_vmm::client;
use banger_vmm::protocol::{Command, Event, Exit, FromShim, Status, Verb};
use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};

/// How long a shim may take to say its status.
const FIRST_STATUS: Duration = Duration::from_secs(10);
/// How long a shim may take to answer a command.
const REPLY: Duration = Duration::from_secs(10);
/// The longest line believed of a shim.
const MAX_LINE: u64 = 256 * 1024;

/// What a shim tells.
#[derive(Debug)]
pub(super) enum LinkEvent {
    Status(Status),
    Exited(Exit),
    GuestWarning(String),
    /// The shim is gone, or talks nonsense.
    Closed,
}

/// A connection to a shim.
#[derive(Debug)]
pub(super) struct Link {
    commands: mpsc::Sender<(Verb, oneshot::Sender<Result<(), String>>)>,
    pub(super) events: mpsc::Receiver<LinkEvent>,
}

impl Link {
    /// Connects to the shim at `socket` and reads its first status.
    pub(super) async fn connect(socket: &Path) -> io::Result<(Self, Status)> {
        let socket = socket.to_owned();
        let stream = tokio::task::spawn_blocking(move || client::connect(&socket))
            .await
            .map_err(io::Error::other)??;
        stream.set_nonblocking(true)?;
        let (reader, writer) = UnixStream::from_std(stream)?.into_split();
        let mut lines = BufReader::new(reader);
        let status = tokio::time::timeout(FIRST_STATUS, async {
            loop {
                match read(&mut lines).await? {
                    Some(FromShim::Status(status)) => return io::Result::Ok(status),
                    Some(_) => {}
                    None => return Err(io::ErrorKind::UnexpectedEof.into()),
                }
            }
        })
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        let (commands, inbox) = mpsc::channel(16);
        let (sender, events) = mpsc::channel(64);
        tokio::spawn(run(lines, writer, inbox, sender));
        Ok((Self { commands, events }, status))
    }

    /// A way to send commands that outlives a borrow of the link.
    pub(super) fn commander(&self) -> Commander {
        Commander(self.commands.clone())
    }
}

/// Sends commands to a shim.
#[derive(Debug, Clone)]
pub(super) struct Commander(mpsc::Sender<(Verb, oneshot::Sender<Result<(), String>>)>);

impl Commander {
    /// Sends `verb` and waits for the shim's answer; the error is what it said, or that it is gone.
    pub(super) async fn send(&self, verb: Verb) -> Result<(), String> {
        let gone = || "the shim is gone".to_owned();
        let (reply, answer) = oneshot::channel();
        self.0.send((verb, reply)).await.map_err(|_| gone())?;
        match tokio::time::timeout(REPLY, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(gone()),
            Err(_) => Err(format!(
                "the shim did not answer within {} s",
                REPLY.as_secs()
            )),
        }
    }
}

async fn read(lines: &mut BufReader<OwnedReadHalf>) -> io::Result<Option<FromShim>> {
    use tokio::io::AsyncReadExt;
    let mut line = Vec::new();
    lines.take(MAX_LINE).read_until(b'\n', &mut line).await?;
    if line.last() != Some(&b'\n') {
        return Ok(None);
    }
    serde_json::from_slice(&line)
        .map(Some)
        .map_err(io::Error::other)
}

/// Reads whole lines in a task of its own, since reading a line cannot be broken off and taken up again.
async fn run(
    mut lines: BufReader<OwnedReadHalf>,
    mut writer: OwnedWriteHalf,
    mut inbox: mpsc::Receiver<(Verb, oneshot::Sender<Result<(), String>>)>,
    events: mpsc::Sender<LinkEvent>,
) {
    let (line_sender, mut line_receiver) = mpsc::channel(64);
    let reader = tokio::spawn(async move {
        while let Ok(Some(line)) = read(&mut lines).await {
            if line_sender.send(line).await.is_err() {
                return;
            }
        }
    });
    let mut waiting: HashMap<u64, oneshot::Sender<Result<(), String>>> = HashMap::new();
    let mut next = 0u64;
    loop {
        tokio::select! {
            command = inbox.recv() => {
                let Some((verb, reply)) = command else { break };
                next += 1;
                waiting.insert(next, reply);
                let Ok(mut line) = serde_json::to_vec(&Command { id: next, verb }) else { break };
                line.push(b'\n');
                if writer.write_all(&line).await.is_err() {
                    break;
                }
            }
            line = line_receiver.recv() => {
                let event = match line {
                    Some(FromShim::Reply(reply)) => {
                        if let Some(waiter) = waiting.remove(&reply.id) {
                            // The caller may have stopped waiting.
                            let _ = waiter.send(reply.error.map_or(Ok(()), Err));
                        }
                        continue;
                    }
                    Some(FromShim::Status(status)) => LinkEvent::Status(status),
                    Some(FromShim::Event(Event::Changed)) => continue,
                    Some(FromShim::Event(Event::Exited { exit })) => LinkEvent::Exited(exit),
                    Some(FromShim::Event(Event::GuestWarning { text })) => LinkEvent::GuestWarning(text),
                    None => break,
                };
                if events.send(event).await.is_err() {
                    break;
                }
            }
        }
    }
    reader.abort();
    // The actor may be gone.
    let _ = events.send(LinkEvent::Closed).await;
}
