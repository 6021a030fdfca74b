//! `POST /v1/gc`: removes what nothing needs any more.

use axum::Json;
use axum::extract::{Request, State};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::request::Failure;
use super::routes::Api;
use super::types::Problem;
use crate::store::garbage::Garbage;

/// Body of `POST /v1/gc`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GcRequest {
    /// Images too that no instance and no revision names.
    #[serde(default)]
    pub images: bool,
    /// Only show what would be removed.
    #[serde(default)]
    pub dry_run: bool,
}

/// Answer to a [`GcRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GcAnswer {
    /// What was removed, or would be.
    pub garbage: Vec<Garbage>,
}

#[utoipa::path(
    post,
    path = "/v1/gc",
    request_body = GcRequest,
    responses(
        (status = 200, description = "What was removed, or would be", body = GcAnswer),
        (status = 400, description = "The request is invalid", body = Problem),
        (status = 404, description = "This host keeps no services", body = Problem),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
pub(super) async fn gc(
    State(api): State<Api>,
    request: Request,
) -> Result<Json<GcAnswer>, Failure> {
    let controller = api.controller()?;
    let GcRequest { images, dry_run } = api.json(request).await?;
    let garbage = controller.collect_garbage(images, dry_run).await?;
    Ok(Json(GcAnswer { garbage }))
}
