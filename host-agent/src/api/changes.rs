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
