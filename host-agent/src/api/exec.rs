//! `POST …/exec`: a program in a guest, whose frames go over an upgraded connection.

use axum::extract::{Request, State};
use axum::http::header::{CONNECTION, UPGRADE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use vmbus::message::ExecRequest;
use vmbus::stream::{join, send};

use super::listener::Client;
use super::request::{Failure, Named};
use super::routes::Api;
use super::types::{EXEC_PROTOCOL, Problem, RefusalKind};
use crate::guest_stream::GuestStream;

/// Bytes that are copied at once.
const BUFFER: usize = 64 * 1024;

/// Starts the program and answers 101; the frames of `host-agent-exec` follow.
#[utoipa::path(
    post,
    path = "/exec",
    params(("deployment" = String, Path), ("instance" = String, Path)),
    request_body = ExecRequest,
    responses(
        (status = 101, description = "Frames of host-agent-exec follow, in both directions"),
        (status = 400, description = "The request is invalid, or has no header upgrade: host-agent-exec", body = Problem),
        (status = 404, description = "No such instance on this host", body = Problem),
        (status = 503, description = "The guest cannot be reached, or too many clients", body = Problem),
    ),
)]
pub(super) async fn exec(
    State(api): State<Api>,
    Named((deployment, instance)): Named<(String, String)>,
    mut request: Request,
) -> Result<Response, Failure> {
    let instance = api.instance(&deployment, &instance)?;
    let offered = request.headers().get(UPGRADE).map(HeaderValue::as_bytes);
    if offered != Some(EXEC_PROTOCOL.as_bytes()) {
        let text = format!("exec needs an upgrade of the connection to {EXEC_PROTOCOL}");
        return Err(Failure::new(RefusalKind::Invalid, text));
    }
    let upgrade = hyper::upgrade::on(&mut request);
    let client = request.extensions().get::<Client>().cloned();
    let exec: ExecRequest = api.json(request).await?;
    let unreachable = |text: String| Failure::new(RefusalKind::Unreachable, text);
    let mut guest = instance.exec().await.map_err(unreachable)?;
    let sent = send(&mut guest, &exec).await;
    sent.map_err(|error| unreachable(vmbus::text::chain(&error)))?;
    tokio::spawn(async move {
        // The session keeps the place of its connection, and an error ends only it.
        let _client = client;
        session(upgrade, guest).await;
    });
    let headers = [(UPGRADE, EXEC_PROTOCOL), (CONNECTION, "upgrade")];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

async fn session(upgrade: OnUpgrade, guest: GuestStream) {
    let Ok(upgraded) = upgrade.await else { return };
    let client = tokio::io::split(TokioIo::new(upgraded));
    join(client, tokio::io::split(guest), BUFFER).await;
}
