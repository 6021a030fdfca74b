//! The paths of one instance: its state, and its changes by an operator.

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use vmbus::text::chain;

use super::request::{Failure, Named};
use super::routes::{Api, instance_info};
use super::types::{InstanceInfo, Problem, RefusalKind};
use crate::supervisor::instance::{Accepted, Change, ChangeError};

/// A change of an instance by an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum InstanceChange {
    /// Reboot the guest on its disks.
    Restart,
    /// Stop the role and start it again.
    Recycle,
    /// Reboot with a new OS disk.
    Reimage,
    /// Reboot with new disks.
    Rebuild,
}

impl InstanceChange {
    /// Its name in a path.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Restart => "restart",
            Self::Recycle => "recycle",
            Self::Reimage => "reimage",
            Self::Rebuild => "rebuild",
        }
    }
}

impl From<InstanceChange> for Change {
    fn from(change: InstanceChange) -> Self {
        match change {
            InstanceChange::Restart => Self::Restart,
            InstanceChange::Recycle => Self::Recycle,
            InstanceChange::Reimage => Self::Reimage,
            InstanceChange::Rebuild => Self::Rebuild,
        }
    }
}

/// Paths below that of an instance.
pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::default()
        .routes(routes!(show))
        .routes(routes!(change))
}

#[utoipa::path(
    get,
    path = "",
    params(("deployment" = String, Path), ("instance" = String, Path)),
    responses(
        (status = 200, description = "The instance", body = InstanceInfo),
        (status = 400, description = "The request is invalid", body = Problem),
        (status = 404, description = "No such instance on this host", body = Problem),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
async fn show(
    State(api): State<Api>,
    Named((deployment, instance)): Named<(String, String)>,
) -> Result<Json<InstanceInfo>, Failure> {
    let instance = api.instance(&deployment, &instance)?;
    Ok(Json(instance_info(&api, &instance)))
}

/// Begins a change. It is recorded when the answer comes, and done when the instance has the
/// numbers of the answer and is Ready.
#[utoipa::path(
    post,
    path = "/{change}",
    params(
        ("deployment" = String, Path),
        ("instance" = String, Path),
        ("change" = inline(InstanceChange), Path, description = "What to do"),
    ),
    responses(
        (status = 200, description = "The change was begun", body = Accepted),
        (status = 400, description = "The request is invalid, or there is no such change", body = Problem),
        (status = 404, description = "No such instance on this host", body = Problem),
        (status = 409, description = "The instance is being removed", body = Problem),
        (status = 500, description = "The change cannot be recorded", body = Problem),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
async fn change(
    State(api): State<Api>,
    Named((deployment, instance, change)): Named<(String, String, InstanceChange)>,
) -> Result<Json<Accepted>, Failure> {
    let instance = api.instance(&deployment, &instance)?;
    let accepted = instance.change(change.into()).await;
    Ok(Json(accepted.map_err(refused)?))
}

fn refused(error: ChangeError) -> Failure {
    let kind = match &error {
        ChangeError::Removed => RefusalKind::Conflict,
        ChangeError::Record(_) => RefusalKind::Internal,
    };
    Failure::new(kind, chain(&error))
}
