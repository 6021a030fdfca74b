//! What every request passes before its handler and after it: an id, an audit line, a line of
//! the log.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::IntoResponse as _;
use http_body_util::BodyExt as _;
use serde_json::Value;
use vmbus::text::chain;

use super::listener::Client;
use super::request::Failure;
use super::types::RefusalKind;
use crate::blocking::blocking;
use crate::store::audit::{AuditLog, Audited};
use crate::store::deployment::random_id;

/// Header with the id of a request: of the client's choice, else one of the host's.
pub(super) const REQUEST_ID: &str = "x-request-id";

/// Longest id that a client may choose: more than a UUID has.
const MAX_ID: usize = 64;

/// Most bytes of a problem. Longer bodies are no problems.
const MAX_PROBLEM: u64 = 64 * 1024;

/// What every request passes. A clone is the same.
#[derive(Debug, Clone, Default)]
pub struct Guard {
    /// None where nothing is kept that a mutation could change for long.
    audit: Option<Arc<Mutex<AuditLog>>>,
}

impl Guard {
    /// Audits mutations in `audit`.
    pub fn audited(audit: AuditLog) -> Self {
        Self {
            audit: Some(Arc::new(Mutex::new(audit))),
        }
    }

    /// Writes a line of the audit log, which is on disk when this returns.
    async fn append(
        &self,
        audited: &Audited,
        status: Option<StatusCode>,
        reserved: bool,
    ) -> Result<(), Failure> {
        let Some(audit) = self.audit.clone() else {
            return Ok(());
        };
        let audited = audited.clone();
        let status = status.map(|status| status.as_u16());
        let written = blocking(move || {
            let mut audit = audit.lock().unwrap_or_else(PoisonError::into_inner);
            audit.append(&audited, status, reserved)
        });
        let written = written
            .await
            .unwrap_or_else(|error| Err(std::io::Error::other(error)));
        written.map_err(|error| {
            let kind = match error.kind() {
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                    RefusalKind::NoSpace
                }
                _ => RefusalKind::Internal,
            };
            let text = format!("the audit log cannot be written: {}", chain(&error));
            Failure::new(kind, text)
        })
    }
}

/// Whether requests with this method change nothing.
fn reads(method: &Method) -> bool {
    [Method::GET, Method::HEAD, Method::OPTIONS].contains(method)
}

/// What the guard answers in place of a handler, by the method in lower case.
pub(super) fn answers(method: &str) -> &'static [(&'static str, &'static str)] {
    match method {
        "get" | "head" | "options" => &[],
        _ => &[
            ("500", "An error of the host"),
            ("507", "The disk of the audit log is full"),
        ],
    }
}

/// `router` behind `guard`.
pub(super) fn guarded(router: Router, guard: Guard) -> Router {
    router.layer(from_fn_with_state(guard, pass))
}

/// The middleware of all paths.
async fn pass(State(guard): State<Guard>, request: Request, next: Next) -> Response<Body> {
    let started = Instant::now();
    let id = request_id(request.headers());
    let client = request.extensions().get::<Client>();
    let audited = Audited {
        request: id.clone(),
        who: client.map_or_else(|| "page".to_owned(), Client::who),
        method: request.method().to_string(),
        path: request.uri().path().to_owned(),
    };
    let read = reads(request.method());
    // A full disk must not prevent what makes space.
    let reserved = request.method() == Method::DELETE;
    let response = if read {
        next.run(request).await
    } else {
        match guard.append(&audited, None, reserved).await {
            Ok(()) => {
                let response = next.run(request).await;
                // The mutation is done and its first line is on disk.
                match guard.append(&audited, Some(response.status()), true).await {
                    Ok(()) => response,
                    Err(failure) => failure.into_response(),
                }
            }
            Err(failure) => failure.into_response(),
        }
    };
    let status = response.status().as_u16();
    let took_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    let Audited {
        request: id,
        who,
        method,
        path,
    } = &audited;
    if read {
        tracing::debug!(request = %id, %who, %method, %path, status, took_ms, "answered");
    } else {
        tracing::info!(request = %id, %who, %method, %path, status, took_ms, "answered");
    }
    let mut response = with_id(response, id).await;
    if let Ok(id) = HeaderValue::from_str(id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// The id that the client chose, if it is one that can stand in a line of a log.
fn request_id(headers: &HeaderMap) -> String {
    let chosen = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok());
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    chosen
        .filter(|id| (1..=MAX_ID).contains(&id.len()) && id.bytes().all(plain))
        .map_or_else(|| random_id().unwrap_or_default(), str::to_owned)
}

/// Puts the id into the body of a problem.
async fn with_id(response: Response<Body>, id: &str) -> Response<Body> {
    let status = response.status();
    let json = response.headers().get(header::CONTENT_TYPE);
    let json = json.is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
    if !json || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    let limited = http_body_util::Limited::new(body, MAX_PROBLEM as usize).collect();
    let Ok(bytes) = limited.await.map(|body| body.to_bytes()) else {
        return (StatusCode::INTERNAL_SERVER_ERROR, "").into_response();
    };
    let mut text = bytes.to_vec();
    if let Ok(Value::Object(mut problem)) = serde_json::from_slice(&bytes)
        && problem.contains_key("kind")
    {
        problem.insert("request".to_owned(), id.into());
        text = Value::Object(problem).to_string().into_bytes();
    }
    parts.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(parts, Body::from(text))
}
