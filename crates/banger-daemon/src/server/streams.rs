//! The handlers of the endpoints that stream: events, operations, logs and connections.

use super::Call;
use super::routes::operation_id;
use crate::network::network_error;
use crate::vm::files::VmFiles;
use axum::body::{Body, Bytes};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use banger_api::endpoint::Nothing;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::event::{Event, FollowEvents};
use banger_api::operation::OperationState;
use banger_api::vm::{ConnectVm, LogSource, ReadLog};
use banger_core::phase::Phase;
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Lines or chunks that may wait for a slow client.
const QUEUE: usize = 64;
/// How often a followed log is looked at.
const FOLLOW: Duration = Duration::from_millis(100);
/// How long a connection to a guest is tried.
const CONNECT_MS: u32 = 15_000;

type Sender = mpsc::Sender<Result<Bytes, Infallible>>;

fn stream(content: &'static str) -> (Sender, Response) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let body = Body::from_stream(ReceiverStream::new(receiver));
    (
        sender,
        ([(header::CONTENT_TYPE, content)], body).into_response(),
    )
}

async fn send_line(sender: &Sender, value: &impl serde::Serialize) -> bool {
    let Ok(mut line) = serde_json::to_vec(value) else {
        return false;
    };
    line.push(b'\n');
    sender.send(Ok(line.into())).await.is_ok()
}

pub(super) async fn events(call: Call<FollowEvents>) -> Result<Response, ErrorBody> {
    let world = call.app.world;
    let (sender, response) = stream("application/jsonl");
    let (events, mut receiver) = world.hub.follow(call.request.after.as_ref());
    tokio::spawn(async move {
        let mut last = 0;
        for event in events {
            last = event.cursor.sequence;
            if !send_line(&sender, &*event).await {
                return;
            }
        }
        let mut shutdown = world.shutdown.subscribe();
        loop {
            let event: Arc<Event> = tokio::select! {
                event = receiver.recv() => match event {
                    Ok(event) if event.cursor.sequence <= last => continue,
                    Ok(event) => event,
                    // Too slow: the client resumes after its cursor, or is told to list again.
                    Err(RecvError::Lagged(_) | RecvError::Closed) => return,
                },
                _ = shutdown.wait_for(|down| *down) => return,
                () = sender.closed() => return,
            };
            if !send_line(&sender, &*event).await {
                return;
            }
        }
    });
    Ok(response)
}

pub(super) async fn follow_operation(call: Call<Nothing>) -> Result<Response, ErrorBody> {
    let id = operation_id(&call)?;
    let state = call.app.world.operations.follow(id);
    let mut state = state.ok_or_else(|| {
        ErrorBody::new(ErrorCode::NotFound, format!("there is no operation `{id}`"))
    })?;
    let (sender, response) = stream("application/jsonl");
    tokio::spawn(async move {
        loop {
            let now = state.borrow_and_update().clone();
            let ended = now.status != OperationState::Running;
            if !send_line(&sender, &now).await || ended || state.changed().await.is_err() {
                return;
            }
        }
    });
    Ok(response)
}

pub(super) async fn logs(call: Call<ReadLog>) -> Result<Response, ErrorBody> {
    let handle = call.app.registry.find(call.parameter("vm"))?;
    let files = VmFiles::of(&call.app.world.paths, handle.id);
    let ReadLog { source, follow } = call.request;
    let path = match source {
        LogSource::Console => files.console(),
        LogSource::Vmm => files.vmm_log(),
    };
    let (sender, response) = stream("application/octet-stream");
    let view = handle.view.clone();
    tokio::spawn(async move {
        let mut tail = Tail::new(path);
        loop {
            // Judged before reading, so that what a VM says last is not missed.
            let over = !follow || matches!(view.borrow().phase, Phase::Stopped { .. });
            let (back, chunks) = match tokio::task::spawn_blocking(move || {
                let chunks = tail.read();
                (tail, chunks)
            })
            .await
            {
                Ok(read) => read,
                Err(_) => return,
            };
            tail = back;
            for chunk in chunks {
                if sender.send(Ok(chunk)).await.is_err() {
                    return;
                }
            }
            if over {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(FOLLOW) => {}
                () = sender.closed() => return,
            }
        }
    });
    Ok(response)
}

/// Reads a ring of two files in order, over its rotations.
#[derive(Debug)]
struct Tail {
    path: PathBuf,
    current: Option<File>,
    begun: bool,
}

impl Tail {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            current: None,
            begun: false,
        }
    }

    fn older(&self) -> PathBuf {
        let mut name = self.path.as_os_str().to_owned();
        name.push(".1");
        PathBuf::from(name)
    }

    /// What is new since the last call.
    fn read(&mut self) -> Vec<Bytes> {
        let mut chunks = Vec::new();
        if !self.begun {
            self.begun = true;
            if let Ok(mut older) = File::open(self.older()) {
                drain(&mut older, &mut chunks);
            }
        }
        if let Some(current) = &mut self.current {
            drain(current, &mut chunks);
            if is_same(current, &self.path) {
                return chunks;
            }
        }
        // The ring has turned (or this is the first look): go on with the newer file.
        if let Ok(mut next) = File::open(&self.path) {
            if next.seek(SeekFrom::Start(0)).is_ok() {
                drain(&mut next, &mut chunks);
            }
            self.current = Some(next);
        }
        chunks
    }
}

fn is_same(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

fn drain(file: &mut File, chunks: &mut Vec<Bytes>) {
    let mut bytes = Vec::new();
    // The file is bounded; what cannot be read is left out.
    if file.read_to_end(&mut bytes).is_ok() && !bytes.is_empty() {
        chunks.push(bytes.into());
    }
}

/// Connects the client with a TCP port of the guest.
pub(super) async fn connect(
    call: Call<ConnectVm>,
    upgrade: Option<hyper::upgrade::OnUpgrade>,
) -> Result<Response, ErrorBody> {
    let handle = call.app.registry.find(call.parameter("vm"))?;
    let view = handle.latest();
    let name = &view.record.name;
    if !matches!(view.phase, Phase::Running { .. }) {
        let message = format!("cannot connect to VM `{name}`: it is {}", view.phase.name());
        return Err(ErrorBody::new(ErrorCode::WrongPhase, message)
            .hint(format!("`banger vm start {name}`")));
    }
    let Some(upgrade) = upgrade else {
        return Err(ErrorBody::new(
            ErrorCode::InvalidRequest,
            "this endpoint needs an HTTP upgrade",
        ));
    };
    let socket = call
        .app
        .world
        .network
        .connect(view.record.address, call.request.port, CONNECT_MS)
        .await;
    let socket = socket.map_err(|error| network_error(&error))?;
    let stream = std::net::TcpStream::from(socket);
    let adopted = stream
        .set_nonblocking(true)
        .and_then(|()| TcpStream::from_std(stream));
    let mut guest = adopted.map_err(|error| ErrorBody::from_error(ErrorCode::Internal, &error))?;
    tokio::spawn(async move {
        match upgrade.await {
            Ok(upgraded) => {
                // Either side may break off; that is the end of it.
                let _ =
                    tokio::io::copy_bidirectional(&mut TokioIo::new(upgraded), &mut guest).await;
            }
            Err(error) => tracing::debug!(%error, "a client did not take up its upgrade"),
        }
    });
    let headers = [
        (header::CONNECTION, "upgrade"),
        (header::UPGRADE, "banger-stream"),
    ];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(chunks: Vec<Bytes>) -> String {
        chunks
            .iter()
            .map(|chunk| String::from_utf8_lossy(chunk).into_owned())
            .collect()
    }

    #[test]
    fn a_followed_log_has_no_gap_when_the_ring_turns() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        std::fs::write(folder.path().join("console.log.1"), "one ").unwrap();
        std::fs::write(&path, "two ").unwrap();
        let mut tail = Tail::new(path.clone());
        assert_eq!(text(tail.read()), "one two ");
        assert_eq!(text(tail.read()), "");
        let mut file = std::fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap();
        std::io::Write::write_all(&mut file, b"three ").unwrap();
        std::fs::rename(&path, folder.path().join("console.log.1")).unwrap();
        std::fs::write(&path, "four").unwrap();
        assert_eq!(text(tail.read()), "three four");
    }
}
