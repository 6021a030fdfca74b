//! The paths of guest agents.

use axum::Json;
use axum::extract::{Request, State};
use http_body_util::BodyExt as _;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use vmbus::agent_package::MAX_PACKAGE;

use super::request::{Failure, Named};
use super::routes::Api;
use super::services::{internal, parse, user};
use super::types::{Problem, RefusalKind};
use crate::blocking::blocking;
use crate::controller::ControllerError;
use crate::controller::agents::AgentState;
use crate::digest::Digest;
use crate::store::agents::{AgentFailure, PublishedAgent};
use crate::supervisor::agents::RunningAgent;

/// Paths below the version.
pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::default()
        .routes(routes!(list))
        .routes(routes!(show, publish, withdraw))
        .routes(routes!(upload))
}

/// Answer to `GET /v1/agents`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Agents {
    /// Every guest agent that was published, the newest publication first.
    pub agents: Vec<AgentInfo>,
    /// The guest agent of each guest that has said what it runs.
    pub guests: Vec<GuestAgent>,
}

/// A guest agent that was published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AgentInfo {
    /// The publication.
    #[serde(flatten)]
    pub published: PublishedAgent,
    /// Whether it is offered to guests now.
    pub offered: bool,
    /// Guests that run it.
    pub guests: usize,
    /// Guests in which it failed, which never take it again.
    pub failures: Vec<AgentFailure>,
}

/// What a guest runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestAgent {
    /// The deployment.
    pub deployment: String,
    /// The instance.
    pub instance: String,
    /// Its guest agent.
    pub agent: RunningAgent,
}

/// Body of `PUT /v1/agents/DIGEST`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PublishRequest {
    /// The file `.minisig` of the package.
    pub signature: String,
    /// Guests take it though it is not newer than what they run.
    #[serde(default)]
    pub allow_downgrade: bool,
}

/// Answer to `PUT /v1/agents/DIGEST/package`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AgentPackage {
    /// SHA-256 of the package.
    pub package: Digest,
}

async fn known(api: &Api) -> Result<Agents, Failure> {
    let AgentState {
        published,
        offered,
        failures,
    } = api.controller()?.agents().await?;
    let deployments = api.host().deployments();
    let instances = deployments.iter().flat_map(|it| it.instances());
    let guests = instances.filter_map(|instance| {
        Some(GuestAgent {
            deployment: instance.spec().deployment().to_owned(),
            instance: instance.spec().name().to_owned(),
            agent: instance.status().agent?,
        })
    });
    let guests: Vec<_> = guests.collect();
    let agents = published.into_iter().map(|published| {
        let package = published.package;
        let runs = guests.iter().filter(|it| it.agent.package == Some(package));
        let failures = failures.iter().filter(|it| it.package == package);
        AgentInfo {
            offered: offered == Some(package),
            guests: runs.count(),
            failures: failures.cloned().collect(),
            published,
        }
    });
    Ok(Agents {
        agents: agents.collect(),
        guests,
    })
}

async fn one(api: &Api, package: Digest) -> Result<Json<AgentInfo>, Failure> {
    let mut agents = known(api).await?.agents.into_iter();
    let found = agents.find(|it| it.published.package == package);
    found.map(Json).ok_or_else(|| {
        let text = format!(
            "guest agent {} was not published on this host",
            package.hex()
        );
        Failure::new(RefusalKind::NotFound, text)
    })
}

#[utoipa::path(
    get,
    path = "/agents",
    responses(
        (status = 200, description = "Every guest agent", body = Agents),
        (status = 404, description = "This host keeps no services", body = Problem),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
async fn list(State(api): State<Api>) -> Result<Json<Agents>, Failure> {
    Ok(Json(known(&api).await?))
}

#[utoipa::path(
    get,
    path = "/agents/{digest}",
    params(("digest" = Digest, Path, description = "SHA-256 of the package")),
    responses(
        (status = 200, description = "The guest agent", body = AgentInfo),
        (status = 400, description = "The request is invalid", body = Problem),
        (status = 404, description = "No such guest agent on this host", body = Problem),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
async fn show(
    State(api): State<Api>,
    Named(digest): Named<String>,
) -> Result<Json<AgentInfo>, Failure> {
    one(&api, parse(&digest)?).await
}

/// Checks a package that was uploaded, and offers it to all guests.
#[utoipa::path(
    put,
    path = "/agents/{digest}",
    params(("digest" = Digest, Path, description = "SHA-256 of the package")),
    request_body = PublishRequest,
    responses(
        (status = 200, description = "It is offered", body = AgentInfo),
        (status = 400, description = "The request is invalid, or the package is refused", body = Problem),
        (status = 404, description = "No such package on this host", body = Problem),
        (status = 409, description = "It is older than what is offered, or no key is trusted", body = Problem),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
async fn publish(
    State(api): State<Api>,
    Named(digest): Named<String>,
    request: Request,
) -> Result<Json<AgentInfo>, Failure> {
    let package = parse(&digest)?;
    let controller = api.controller()?.clone();
    let user = user(&request);
    let PublishRequest {
        signature,
        allow_downgrade,
    } = api.json(request).await?;
    controller
        .publish_agent(package, signature, allow_downgrade, user)
        .await?;
    one(&api, package).await
}

/// Stops offering a guest agent. Guests that run it do so on.
#[utoipa::path(
    delete,
    path = "/agents/{digest}",
    params(("digest" = Digest, Path, description = "SHA-256 of the package")),
    responses(
        (status = 200, description = "It is not offered", body = AgentInfo),
        (status = 400, description = "The request is invalid", body = Problem),
        (status = 404, description = "No such guest agent on this host", body = Problem),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
async fn withdraw(
    State(api): State<Api>,
    Named(digest): Named<String>,
) -> Result<Json<AgentInfo>, Failure> {
    let package = parse(&digest)?;
    api.controller()?.withdraw_agent(package).await?;
    one(&api, package).await
}

/// Takes a package in as it arrives. It is kept when it is published.
#[utoipa::path(
    put,
    path = "/agents/{digest}/package",
    params(("digest" = Digest, Path, description = "SHA-256 of the package")),
    request_body(content = String, content_type = "application/octet-stream"),
    responses(
        (status = 200, description = "The package is durable", body = AgentPackage),
        (status = 400, description = "The request is invalid", body = Problem),
        (status = 404, description = "This host keeps no services", body = Problem),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
async fn upload(
    State(api): State<Api>,
    Named(digest): Named<String>,
    request: Request,
) -> Result<Json<AgentPackage>, Failure> {
    let package = parse(&digest)?;
    let files = api.controller()?.agent_packages().clone();
    let mut body = request.into_body();
    let mut partial = blocking(move || files.begin()).await.map_err(internal)??;
    let mut length = 0;
    while let Some(frame) = api.in_time(body.frame()).await? {
        let frame = frame.map_err(|error| Failure::new(RefusalKind::Invalid, error.to_string()))?;
        let Ok(bytes) = frame.into_data() else {
            continue;
        };
        length += bytes.len() as u64;
        if length > MAX_PACKAGE {
            let text = format!("a guest-agent package has at most {MAX_PACKAGE} bytes");
            return Err(Failure::new(RefusalKind::Invalid, text));
        }
        let written = blocking(move || partial.write(&bytes).map(|()| partial));
        partial = written.await.map_err(internal)??;
    }
    let finished = blocking(move || partial.finish(&package)).await;
    finished.map_err(internal)?.map_err(ControllerError::from)?;
    Ok(Json(AgentPackage { package }))
}
