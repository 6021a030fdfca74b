//! The paths that change a service that exists.

use axum::Json;
use axum::extract::{Request, State};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::request::{Failure, Named};
use super::routes::Api;
use super::services::user;
use super::types::Problem;
use crate::controller::ControllerError;
use crate::controller::plan::UpdatePlan;
use crate::digest::Digest;
use crate::store::rollouts::{RolloutPolicy, Target};
use crate::store::services::Operation;

/// Answer to a request that changes a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ChangeAnswer {
    /// What was begun; none if the service is as asked already.
    pub operation: Option<Operation>,
}

/// Paths below the version.
pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::default()
        .routes(routes!(stop))
        .routes(routes!(start))
        .routes(routes!(update))
        .routes(routes!(rollback))
        .routes(routes!(resume))
}

/// Ends the guests of a service. Its disks and logs stay.
#[utoipa::path(
    post,
    path = "/services/{name}/stop",
    params(("name" = String, Path, description = "Name of the service")),
    responses(
        (status = 200, description = "The operation", body = ChangeAnswer),
        (status = 400, description = "The request is invalid", body = Problem),
        (status = 404, description = "No such service on this host", body = Problem),
        (status = 409, description = "The service is being deleted", body = Problem),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
async fn stop(
    State(api): State<Api>,
    Named(name): Named<String>,
    request: Request,
) -> Result<Json<ChangeAnswer>, Failure> {
    let operation = api.controller()?.stop(&name, user(&request)).await?;
    Ok(Json(ChangeAnswer { operation }))
}

/// Starts the guests of a service that was stopped.
#[utoipa::path(
    post,
    path = "/services/{name}/start",
    params(("name" = String, Path, description = "Name of the service")),
    responses(
        (status = 200, description = "The operation", body = ChangeAnswer),
        (status = 400, description = "The request is invalid", body = Problem),
        (status = 404, description = "No such service on this host", body = Problem),
        (status = 409, description = "The service is being deleted", body = Problem),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients, or the host cannot run guests", body = Problem),
    ),
)]
async fn start(
    State(api): State<Api>,
    Named(name): Named<String>,
    request: Request,
) -> Result<Json<ChangeAnswer>, Failure> {
    let operation = api.controller()?.start_again(&name, user(&request)).await?;
    Ok(Json(ChangeAnswer { operation }))
}

/// Body of `POST /v1/services/{name}/update`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct UpdateRequest {
    /// SHA-256 of a package that was uploaded; else that of the service.
    pub package: Option<Digest>,
    /// Text of the configuration; else that of the service.
    pub configuration: Option<String>,
    /// How the rollout goes.
    pub policy: RolloutPolicy,
    /// Only check and plan.
    pub dry_run: bool,
}

/// Answer to an [`UpdateRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UpdateAnswer {
    /// What the update does.
    pub update: UpdatePlan,
    /// What was begun; none of a dry run, or if the service is as wanted already.
    pub operation: Option<Operation>,
}

/// Body of `POST /v1/services/{name}/rollback`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RollbackRequest {
    /// The revision; else the one before.
    pub to: Option<u64>,
    /// How the rollout goes.
    pub policy: RolloutPolicy,
}

/// Takes a service to a new revision, one upgrade domain after the other.
#[utoipa::path(
    post,
    path = "/services/{name}/update",
    params(("name" = String, Path, description = "Name of the service")),
    request_body = UpdateRequest,
    responses(
        (status = 200, description = "What happens to each role", body = UpdateAnswer),
        (status = 400, description = "The request is invalid", body = Problem),
        (status = 404, description = "No such service or package on this host", body = Problem),
        (status = 409, description = "The service cannot be changed so", body = Problem),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients, or the host cannot run guests", body = Problem),
    ),
)]
async fn update(
    State(api): State<Api>,
    Named(name): Named<String>,
    request: Request,
) -> Result<Json<UpdateAnswer>, Failure> {
    let controller = api.controller()?;
    let user = user(&request);
    let asked: UpdateRequest = api.json(request).await?;
    let mut wanted = controller.wanted(&name).await?;
    if let Some(package) = asked.package {
        wanted.package = package;
    }
    if let Some(configuration) = asked.configuration {
        wanted.configuration = configuration;
    }
    controller.load(&wanted).await?;
    let update = controller.plan_update(&name, &wanted).await?;
    let update = update.ok_or_else(|| ControllerError::NoService(name.clone()))?;
    let operation = if asked.dry_run {
        None
    } else {
        let target = Target::New(wanted);
        controller.update(&name, target, asked.policy, user).await?
    };
    Ok(Json(UpdateAnswer { update, operation }))
}

/// Takes a service to an earlier revision.
#[utoipa::path(
    post,
    path = "/services/{name}/rollback",
    params(("name" = String, Path, description = "Name of the service")),
    request_body = RollbackRequest,
    responses(
        (status = 200, description = "The operation", body = ChangeAnswer),
        (status = 400, description = "The request is invalid", body = Problem),
        (status = 404, description = "No such service or revision on this host", body = Problem),
        (status = 409, description = "The service cannot be changed so", body = Problem),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients, or the host cannot run guests", body = Problem),
    ),
)]
async fn rollback(
    State(api): State<Api>,
    Named(name): Named<String>,
    request: Request,
) -> Result<Json<ChangeAnswer>, Failure> {
    let user = user(&request);
    let RollbackRequest { to, policy } = api.json(request).await?;
    let target = Target::Earlier(to);
    let operation = api
        .controller()?
        .update(&name, target, policy, user)
        .await?;
    Ok(Json(ChangeAnswer { operation }))
}

/// Goes on with a rollout that is paused or halted.
#[utoipa::path(
    post,
    path = "/services/{name}/resume",
    params(("name" = String, Path, description = "Name of the service")),
    responses(
        (status = 200, description = "The operation", body = ChangeAnswer),
        (status = 400, description = "The request is invalid", body = Problem),
        (status = 404, description = "No such service on this host", body = Problem),
        (status = 409, description = "No rollout waits", body = Problem),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
async fn resume(
    State(api): State<Api>,
    Named(name): Named<String>,
    request: Request,
) -> Result<Json<ChangeAnswer>, Failure> {
    let operation = api.controller()?.resume(&name, user(&request)).await?;
    Ok(Json(ChangeAnswer { operation }))
}
