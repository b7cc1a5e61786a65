//! The client of the API over the daemon's Unix socket. CLI and TUI know the daemon only through it.

use crate::endpoint::{Endpoint, encode, fill_path};
use crate::error::{ErrorBody, ErrorCode};
use crate::version::{BUILD_HEADER, IDEMPOTENCY_HEADER, VERSION_HEADER};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{HeaderMap, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use tokio::net::UnixStream;

/// The largest reply that is read as one JSON value, in bytes.
const MAX_REPLY_BYTES: usize = 256 << 20;

/// How often a question is asked while the daemon dies before it answers.
const TRIES: u32 = 3;

/// Why a call got no reply.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the socket.
    #[error("cannot connect to the daemon's socket `{}`", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// The conversation broke.
    #[error("the daemon broke off its reply to {request}")]
    Broken {
        /// Method and path.
        request: String,
        /// HTTP's error.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The reply cannot be understood.
    #[error("the daemon's reply to {request} cannot be read: {problem}")]
    Unreadable {
        /// Method and path.
        request: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The daemon refused or failed.
    #[error(transparent)]
    Refused(#[from] ErrorBody),
}

impl ClientError {
    fn broken(request: &str, source: hyper::Error) -> Self {
        Self::Broken {
            request: request.to_owned(),
            source: Box::new(source),
        }
    }

    /// The error as the CLI renders it.
    pub fn to_body(&self) -> ErrorBody {
        match self {
            Self::Refused(body) => body.clone(),
            Self::Connect { .. } | Self::Broken { .. } => {
                ErrorBody::from_error(ErrorCode::DaemonUnreachable, self)
                    .hint("`banger daemon logs` shows what the daemon said last")
            }
            Self::Unreadable { .. } => ErrorBody::from_error(ErrorCode::Internal, self)
                .hint("client and daemon may be of different versions: `banger daemon restart`"),
        }
    }
}

/// Which daemon replied.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DaemonIdentity {
    /// Its version.
    pub version: String,
    /// Its build.
    pub build: String,
}

impl DaemonIdentity {
    fn from_headers(headers: &HeaderMap) -> Self {
        let text = |name| {
            headers
                .get(name)
                .and_then(|value| value.to_str().ok())
                .unwrap_or_default()
                .to_owned()
        };
        Self {
            version: text(VERSION_HEADER),
            build: text(BUILD_HEADER),
        }
    }
}

/// Starts the daemon that nobody listens for, or says why it cannot be.
pub type Revive =
    dyn Fn() -> Pin<Box<dyn Future<Output = Result<(), ErrorBody>> + Send>> + Send + Sync;

/// A client. Each call makes a connection of its own.
#[derive(Clone)]
pub struct Client {
    socket: PathBuf,
    revive: Option<Arc<Revive>>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut client = formatter.debug_struct("Client");
        client.field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Client {
    /// A client of the daemon at `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            revive: None,
        }
    }

    /// A client that asks `revive` for a daemon when nobody listens, once for each try: the one that listened a moment
    /// ago may have died. What a daemon may have received and only asks is asked again; what changes something never
    /// is.
    #[must_use]
    pub fn reviving(mut self, revive: Arc<Revive>) -> Self {
        self.revive = Some(revive);
        self
    }

    /// The daemon's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Calls an endpoint that answers one JSON value.
    ///
    /// # Errors
    /// Nobody listens, the conversation breaks, or the daemon refuses.
    pub async fn call<E: Endpoint>(
        &self,
        parameters: &[(&str, &str)],
        request: &E::Request,
    ) -> Result<E::Reply, ClientError> {
        Ok(self
            .call_identified::<E>(parameters, request, None)
            .await?
            .0)
    }

    /// Calls an endpoint with an idempotency key, and tells which daemon answered.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn call_identified<E: Endpoint>(
        &self,
        parameters: &[(&str, &str)],
        request: &E::Request,
        idempotency_key: Option<&str>,
    ) -> Result<(E::Reply, DaemonIdentity), ClientError> {
        let (response, name) = self
            .send::<E>(parameters, request, idempotency_key, false)
            .await?;
        let identity = DaemonIdentity::from_headers(response.headers());
        let body = collect(response, &name).await?;
        Ok((parse(&body, &name)?, identity))
    }

    /// Calls an endpoint that answers a stream; read it with [`Lines`] or [`Chunks`].
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn stream<E: Endpoint>(
        &self,
        parameters: &[(&str, &str)],
        request: &E::Request,
    ) -> Result<Chunks, ClientError> {
        let (response, name) = self.send::<E>(parameters, request, None, false).await?;
        Ok(Chunks {
            body: response.into_body(),
            name,
        })
    }

    /// Calls an endpoint that answers one JSON value a line.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn lines<E: Endpoint>(
        &self,
        parameters: &[(&str, &str)],
        request: &E::Request,
    ) -> Result<Lines<E::Reply>, ClientError> {
        let chunks = self.stream::<E>(parameters, request).await?;
        Ok(Lines {
            chunks,
            buffer: Vec::new(),
            reply: std::marker::PhantomData,
        })
    }

    /// Calls an endpoint that upgrades to a two-way stream.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn upgrade<E: Endpoint>(
        &self,
        parameters: &[(&str, &str)],
        request: &E::Request,
    ) -> Result<TokioIo<hyper::upgrade::Upgraded>, ClientError> {
        let (response, name) = self.send::<E>(parameters, request, None, true).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            let problem = format!("status {} instead of an upgrade", response.status());
            return Err(ClientError::Unreadable {
                request: name,
                problem,
            });
        }
        let upgraded = hyper::upgrade::on(response).await;
        upgraded
            .map(TokioIo::new)
            .map_err(|source| ClientError::Broken {
                request: name,
                source: source.into(),
            })
    }

    async fn send<E: Endpoint>(
        &self,
        parameters: &[(&str, &str)],
        request: &E::Request,
        idempotency_key: Option<&str>,
        upgrade: bool,
    ) -> Result<(Response<Incoming>, String), ClientError> {
        let path = fill_path(E::PATH, parameters);
        let name = format!("{} {path}", E::METHOD);
        let unreadable = |problem: String| ClientError::Unreadable {
            request: name.clone(),
            problem,
        };
        let value = serde_json::to_value(request).map_err(|error| unreadable(error.to_string()))?;
        let (uri, body) = match E::METHOD {
            "GET" | "DELETE" => (format!("{path}{}", query(&value)), Bytes::new()),
            _ => (path, Bytes::from(value.to_string())),
        };
        let mut builder = Request::builder()
            .method(E::METHOD)
            .uri(uri)
            .header(header::HOST, "banger");
        if !body.is_empty() {
            builder = builder.header(header::CONTENT_TYPE, "application/json");
        }
        if let Some(key) = idempotency_key {
            builder = builder.header(IDEMPOTENCY_HEADER, key);
        }
        if upgrade {
            builder = builder
                .header(header::CONNECTION, "upgrade")
                .header(header::UPGRADE, "banger-stream");
        }
        let request = builder
            .body(Full::new(body))
            .map_err(|error| unreadable(error.to_string()))?;
        let response = self.exchange(request, &name).await?;
        if response.status().is_client_error() || response.status().is_server_error() {
            let status = response.status();
            let body = collect(response, &name).await?;
            return Err(match serde_json::from_slice::<ErrorBody>(&body) {
                Ok(error) => error.into(),
                Err(_) => ClientError::Unreadable {
                    request: name,
                    problem: format!("status {status}"),
                },
            });
        }
        Ok((response, name))
    }

    /// The reply's head. What only asks is sent again to a daemon's successor.
    async fn exchange(
        &self,
        request: Request<Full<Bytes>>,
        name: &str,
    ) -> Result<Response<Incoming>, ClientError> {
        let mut tries = match &self.revive {
            Some(_) if request.method() == hyper::Method::GET => TRIES,
            _ => 1,
        };
        loop {
            tries -= 1;
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(self.connect().await?))
                    .await
                    .map_err(|source| ClientError::broken(name, source))?;
            tokio::spawn(connection.with_upgrades());
            match sender.send_request(request.clone()).await {
                Err(_) if tries > 0 => {}
                replied => return replied.map_err(|source| ClientError::broken(name, source)),
            }
        }
    }

    async fn connect(&self) -> Result<UnixStream, ClientError> {
        let mut connected = connect(&self.socket).await;
        if let (Err(error), Some(revive)) = (&connected, &self.revive)
            && is_absence(error)
        {
            revive().await?;
            connected = connect(&self.socket).await;
        }
        connected.map_err(|source| ClientError::Connect {
            socket: self.socket.clone(),
            source,
        })
    }
}

/// Whether a connection failed because nobody listens.
pub fn is_absence(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused
    )
}

/// Connects through `/proc/self/fd`, since a socket's path may be longer than an address can hold.
async fn connect(socket: &Path) -> std::io::Result<UnixStream> {
    use std::os::fd::AsRawFd;
    let (Some(folder), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    if socket.as_os_str().len() < 100 {
        return connect_at(socket.to_owned()).await;
    }
    let folder = std::fs::File::open(folder)?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name);
    connect_at(short).await
}

/// Where more wait for the daemon than the kernel has room for, a socket that does not block is turned away, and one
/// that blocks waits its turn.
async fn connect_at(path: PathBuf) -> std::io::Result<UnixStream> {
    match UnixStream::connect(&path).await {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
            let connect = move || std::os::unix::net::UnixStream::connect(path);
            let stream = tokio::task::spawn_blocking(connect)
                .await
                .map_err(std::io::Error::other)??;
            stream.set_nonblocking(true)?;
            UnixStream::from_std(stream)
        }
        connected => connected,
    }
}

/// The members of an object as `?name=value&…`; `null` is left out.
fn query(value: &serde_json::Value) -> String {
    let serde_json::Value::Object(members) = value else {
        return String::new();
    };
    let pairs: Vec<String> = members
        .iter()
        .filter_map(|(name, value)| {
            let text = match value {
                serde_json::Value::Null => return None,
                serde_json::Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            Some(format!("{}={}", encode(name), encode(&text)))
        })
        .collect();
    if pairs.is_empty() {
        String::new()
    } else {
        format!("?{}", pairs.join("&"))
    }
}

async fn collect(response: Response<Incoming>, name: &str) -> Result<Bytes, ClientError> {
    let body = http_body_util::Limited::new(response.into_body(), MAX_REPLY_BYTES);
    let collected = body.collect().await;
    collected
        .map(|body| body.to_bytes())
        .map_err(|source| ClientError::Broken {
            request: name.to_owned(),
            source,
        })
}

fn parse<T: DeserializeOwned>(body: &[u8], name: &str) -> Result<T, ClientError> {
    serde_json::from_slice(body).map_err(|error| ClientError::Unreadable {
        request: name.to_owned(),
        problem: error.to_string(),
    })
}

/// A stream of bytes.
#[derive(Debug)]
pub struct Chunks {
    body: Incoming,
    name: String,
}

impl Chunks {
    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// The conversation broke.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
                Some(Err(source)) => {
                    return Err(ClientError::Broken {
                        request: self.name.clone(),
                        source: Box::new(source),
                    });
                }
            }
        }
    }
}

/// A stream of JSON values, one a line.
#[derive(Debug)]
pub struct Lines<T> {
    chunks: Chunks,
    buffer: Vec<u8>,
    reply: std::marker::PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Lines<T> {
    /// The next value; `None` at the end.
    ///
    /// # Errors
    /// The conversation broke, or a line is not what was promised.
    pub async fn next(&mut self) -> Result<Option<T>, ClientError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if line.len() > 1 {
                    return parse(&line, &self.chunks.name).map(Some);
                }
                continue;
            }
            match self.chunks.next().await? {
                Some(data) => self.buffer.extend_from_slice(&data),
                None => return Ok(None),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_leaves_out_what_is_not_said() {
        let value = serde_json::json!({"force": true, "after": null, "name": "a&b=c", "n": 3});
        assert_eq!(
            query(&value),
            "?after=&force=true&n=3&name=a%26b%3Dc".replace("after=&", "")
        );
        assert_eq!(query(&serde_json::json!({})), "");
    }

    #[test]
    fn a_daemon_that_died_is_started_once_and_asked_then_and_why_it_cannot_be_is_the_error() {
        use crate::daemon::StopDaemon;
        use crate::endpoint::{Nothing, PostDaemonStop};
        use std::sync::atomic::{AtomicUsize, Ordering};
        use tokio::io::{AsyncReadExt, AsyncWriteExt};

        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        // What the dead one left: nobody listens on it.
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        let starts = Arc::new(AtomicUsize::new(0));
        let (counted, place) = (Arc::clone(&starts), socket.clone());
        let client = Client::new(&socket).reviving(Arc::new(move || {
            let (first, place) = (counted.fetch_add(1, Ordering::Relaxed) == 0, place.clone());
            Box::pin(async move {
                if !first {
                    return Err(ErrorBody::new(ErrorCode::HostUnfit, "no second one"));
                }
                std::fs::remove_file(&place).unwrap();
                let listener = tokio::net::UnixListener::bind(&place).unwrap();
                tokio::spawn(async move {
                    let (mut stream, _) = listener.accept().await.unwrap();
                    let mut asked = [0; 1024];
                    assert!(stream.read(&mut asked).await.unwrap() > 0);
                    let reply = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
                    stream.write_all(reply).await.unwrap();
                });
                Ok(())
            })
        }));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let request = StopDaemon::default();
        let ask = || client.call::<PostDaemonStop>(&[], &request);
        runtime.block_on(async {
            let Nothing {} = ask().await.unwrap();
            assert_eq!(starts.load(Ordering::Relaxed), 1);
            let why = ask().await.unwrap_err().to_body();
            assert_eq!(why.message, "no second one");
        });
    }
}
