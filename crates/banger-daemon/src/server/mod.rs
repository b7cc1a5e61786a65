//! The HTTP server on the daemon's socket: one route an endpoint, built from the same trait as the client.

mod host_routes;
mod routes;
mod streams;

use crate::registry::Registry;
use crate::world::World;
use axum::body::Bytes;
use axum::extract::{ConnectInfo, Path, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, on};
use axum::serve::IncomingStream;
use axum::{Router, middleware};
use banger_api::endpoint::Endpoint;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::version::{BUILD_HEADER, IDEMPOTENCY_HEADER, VERSION, VERSION_HEADER};
use serde::de::DeserializeOwned;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::net::UnixListener;

/// The largest request body, in bytes.
const MAX_BODY: usize = 1 << 20;

/// What handlers work on.
#[derive(Debug, Clone)]
pub(crate) struct App {
    pub(crate) world: Arc<World>,
    pub(crate) registry: Arc<Registry>,
}

/// A decoded request.
pub(crate) struct Call<T> {
    pub(crate) app: App,
    pub(crate) parameters: HashMap<String, String>,
    pub(crate) request: T,
    pub(crate) idempotency_key: Option<String>,
}

impl<T> Call<T> {
    /// A path parameter; the router made sure that it is there.
    pub(crate) fn parameter(&self, name: &str) -> &str {
        self.parameters.get(name).map_or("", String::as_str)
    }
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Copy)]
struct Peer {
    uid: Option<u32>,
}

impl axum::extract::connect_info::Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self {
            uid: stream
                .io()
                .peer_cred()
                .ok()
                .map(|credentials| credentials.uid()),
        }
    }
}

/// Serves until `shutdown` resolves; connections that are open then may finish what they asked.
pub(crate) async fn serve(
    listener: UnixListener,
    app: App,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let identity = app.world.build.clone();
    let router = routes::router()
        .fallback(not_found)
        .layer(middleware::from_fn(move |request, next| {
            identify(identity.clone(), request, next)
        }))
        .layer(middleware::from_fn(check_peer))
        .layer(axum::extract::DefaultBodyLimit::max(MAX_BODY))
        .with_state(app);
    axum::serve(
        listener,
        router.into_make_service_with_connect_info::<Peer>(),
    )
    .with_graceful_shutdown(shutdown)
    .await
}

/// Only the daemon's own user may ask; the socket's mode says so, too.
async fn check_peer(
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
    next: Next,
) -> Response {
    if peer.uid == Some(rustix::process::geteuid().as_raw()) || peer.uid == Some(0) {
        return next.run(request).await;
    }
    let error = ErrorBody::new(
        ErrorCode::InvalidRequest,
        "this daemon belongs to another user",
    );
    reply_error(StatusCode::FORBIDDEN, &error)
}

async fn identify(build: String, request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(
        HeaderName::from_static(VERSION_HEADER),
        HeaderValue::from_static(VERSION),
    );
    if let Ok(build) = HeaderValue::from_str(&build) {
        headers.insert(HeaderName::from_static(BUILD_HEADER), build);
    }
    response
}

async fn not_found(uri: Uri) -> Response {
    let message = format!("there is no endpoint `{}`", uri.path().escape_debug());
    let error =
        ErrorBody::new(ErrorCode::NotFound, message).hint("`GET /v1/openapi.json` describes all");
    reply_error(StatusCode::NOT_FOUND, &error)
}

fn status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::InvalidRequest | ErrorCode::BadFile => StatusCode::BAD_REQUEST,
        ErrorCode::NotFound => StatusCode::NOT_FOUND,
        ErrorCode::Ambiguous
        | ErrorCode::NameTaken
        | ErrorCode::WrongPhase
        | ErrorCode::Unreachable
        | ErrorCode::InUse
        | ErrorCode::Conflict
        | ErrorCode::Cancelled => StatusCode::CONFLICT,
        ErrorCode::TimedOut => StatusCode::REQUEST_TIMEOUT,
        ErrorCode::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
        ErrorCode::ShuttingDown | ErrorCode::DaemonUnreachable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::HostUnfit
        | ErrorCode::NoDriver
        | ErrorCode::StartFailed
        | ErrorCode::NewerSchema
        | ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn reply_error(status: StatusCode, error: &ErrorBody) -> Response {
    reply_json(status, error)
}

fn reply_json(status: StatusCode, value: &impl serde::Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(mut bytes) => {
            bytes.push(b'\n');
            (status, [(header::CONTENT_TYPE, "application/json")], bytes).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Reads the request of `E`: the query for `GET` and `DELETE`, else the body, whatever its content type.
fn decode<T: DeserializeOwned + Default>(
    method: &str,
    uri: &Uri,
    body: &Bytes,
) -> Result<T, ErrorBody> {
    let invalid = |error: &(dyn std::error::Error + 'static)| {
        ErrorBody::new(ErrorCode::InvalidRequest, "the request cannot be read").caused_by(error)
    };
    if matches!(method, "GET" | "DELETE") {
        let query = axum::extract::Query::<T>::try_from_uri(uri);
        return query.map(|query| query.0).map_err(|error| invalid(&error));
    }
    if body.iter().all(u8::is_ascii_whitespace) {
        return Ok(T::default());
    }
    serde_json::from_slice(body).map_err(|error| invalid(&error))
}

/// Does `work` to its end, also if the client goes away: what it holds is held until then.
async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, ErrorBody>> + Send + 'static,
) -> Result<T, ErrorBody> {
    tokio::spawn(work)
        .await
        .unwrap_or_else(|error| Err(ErrorBody::from_error(ErrorCode::Internal, &error)))
}

fn method_filter(method: &str) -> MethodFilter {
    match method {
        "POST" => MethodFilter::POST,
        "PATCH" => MethodFilter::PATCH,
        "DELETE" => MethodFilter::DELETE,
        _ => MethodFilter::GET,
    }
}

/// Adds the route of an endpoint that answers one JSON value.
fn json_route<E, F>(router: Router<App>, handler: fn(Call<E::Request>) -> F) -> Router<App>
where
    E: Endpoint,
    F: Future<Output = Result<E::Reply, ErrorBody>> + Send + 'static,
{
    raw_route::<E, _>(router, move |call, _| {
        let answer = handler(call);
        async move { Ok(reply_json(StatusCode::OK, &answer.await?)) }
    })
}

/// Adds the route of an endpoint that makes its response itself.
fn raw_route<E, F>(
    router: Router<App>,
    handler: impl Fn(Call<E::Request>, Option<hyper::upgrade::OnUpgrade>) -> F
    + Clone
    + Send
    + Sync
    + 'static,
) -> Router<App>
where
    E: Endpoint,
    F: Future<Output = Result<Response, ErrorBody>> + Send + 'static,
{
    let serve = move |State(app): State<App>,
                      Path(parameters): Path<HashMap<String, String>>,
                      headers: HeaderMap,
                      mut request: Request| {
        let handler = handler.clone();
        async move {
            let upgrade = request
                .extensions_mut()
                .remove::<hyper::upgrade::OnUpgrade>();
            let uri = request.uri().clone();
            let body = match axum::body::to_bytes(request.into_body(), MAX_BODY).await {
                Ok(body) => body,
                Err(error) => {
                    let error = ErrorBody::new(
                        ErrorCode::InvalidRequest,
                        "the request's body cannot be read",
                    )
                    .caused_by(&error);
                    return reply_error(StatusCode::PAYLOAD_TOO_LARGE, &error);
                }
            };
            let key = headers
                .get(IDEMPOTENCY_HEADER)
                .and_then(|key| key.to_str().ok())
                .map(str::to_owned);
            let answer = match decode::<E::Request>(E::METHOD, &uri, &body) {
                Ok(request) => {
                    handler(
                        Call {
                            app,
                            parameters,
                            request,
                            idempotency_key: key,
                        },
                        upgrade,
                    )
                    .await
                }
                Err(error) => Err(error),
            };
            answer.unwrap_or_else(|error| reply_error(status(error.code), &error))
        }
    };
    router.route(E::PATH, on(method_filter(E::METHOD), serve))
}
