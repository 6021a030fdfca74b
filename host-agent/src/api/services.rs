//! The paths of services, packages and operations.

use std::time::Duration;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use http_body_util::BodyExt as _;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::listener::Client;
use super::request::{Failure, Named};
use super::routes::{Api, deployment_info};
use super::types::{
    ApplyAnswer, ApplyRequest, History, OperationQuery, PackageInfo, PlannedEndpoint,
    PlannedInstance, Problem, RefusalKind, RevisionInfo, ServiceInfo, Services,
};
use crate::blocking::blocking;
use crate::controller::{ControllerError, ServiceState};
use crate::digest::Digest;
use crate::service::MAX_PACKED;
use crate::service::model::ServiceModel;
use crate::store::packages::{AddError, PartialPackage};
use crate::store::services::{Operation, Wanted};
use crate::supervisor::instance::InstanceHandle;
use crate::supervisor::plan::instance_names;

/// Longest wait for an operation in one request.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// Paths below the version.
pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::default()
        .routes(routes!(list))
        .routes(routes!(show, apply, delete))
        .routes(routes!(history))
        .routes(routes!(operation))
        .routes(routes!(package, upload))
}

#[utoipa::path(
    get,
    path = "/services",
    responses(
        (status = 200, description = "Every service", body = Services),
        (status = 404, description = "This host keeps no services", body = Problem),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
async fn list(State(api): State<Api>) -> Result<Json<Services>, Failure> {
    let services = api.controller()?.services().await?;
    let services = services.iter().map(|state| service_info(&api, state));
    Ok(Json(Services {
        services: services.collect(),
    }))
}

#[utoipa::path(
    get,
    path = "/services/{name}",
    params(("name" = String, Path, description = "Name of the service")),
    responses(
        (status = 200, description = "The service", body = ServiceInfo),
        (status = 400, description = "The request is invalid", body = Problem),
        (status = 404, description = "No such service on this host", body = Problem),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
async fn show(
    State(api): State<Api>,
    Named(name): Named<String>,
) -> Result<Json<ServiceInfo>, Failure> {
    let service = api.controller()?.service(&name).await?;
    Ok(Json(service_info(&api, &service)))
}

#[utoipa::path(
    put,
    path = "/services/{name}",
    params(("name" = String, Path, description = "Name of the service")),
    request_body = ApplyRequest,
    responses(
        (status = 200, description = "What is created or updated", body = ApplyAnswer),
        (status = 400, description = "The request is invalid", body = Problem),
        (status = 404, description = "No such package on this host", body = Problem),
        (status = 409, description = "The service cannot be changed so, is being deleted, or does not fit", body = Problem),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients, or the host cannot run guests", body = Problem),
    ),
)]
async fn apply(
    State(api): State<Api>,
    Named(name): Named<String>,
    request: Request,
) -> Result<Json<ApplyAnswer>, Failure> {
    let controller = api.controller()?;
    let user = user(&request);
    let ApplyRequest {
        package,
        configuration,
        publish,
        policy,
        dry_run,
    } = api.json(request).await?;
    let wanted = Wanted {
        package,
        configuration,
        publish,
    };
    let model = controller.load(&wanted).await?;
    controller.check_room(&name, &model).await?;
    let mut answer = plan(&model);
    answer.update = controller.plan_update(&name, &wanted).await?;
    if answer.update.is_some() {
        answer.create.clear();
    }
    if !dry_run {
        answer.operation = controller.apply(&name, wanted, policy, user).await?;
    }
    Ok(Json(answer))
}

#[utoipa::path(
    delete,
    path = "/services/{name}",
    params(("name" = String, Path, description = "Name of the service")),
    responses(
        (status = 200, description = "The operation", body = Operation),
        (status = 400, description = "The request is invalid", body = Problem),
        (status = 404, description = "No such service on this host", body = Problem),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
async fn delete(
    State(api): State<Api>,
    Named(name): Named<String>,
    request: Request,
) -> Result<Json<Operation>, Failure> {
    let begun = api.controller()?.delete(&name, user(&request)).await?;
    Ok(Json(begun))
}

#[utoipa::path(
    get,
    path = "/services/{name}/history",
    params(("name" = String, Path, description = "Name of the service")),
    responses(
        (status = 200, description = "Its revisions and operations", body = History),
        (status = 400, description = "The request is invalid", body = Problem),
        (status = 404, description = "No such service on this host", body = Problem),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
async fn history(
    State(api): State<Api>,
    Named(name): Named<String>,
) -> Result<Json<History>, Failure> {
    let (revisions, operations) = api.controller()?.history(&name).await?;
    let revisions = revisions.into_iter().map(|revision| RevisionInfo {
        generation: revision.generation,
        package: revision.wanted.package,
        user: revision.user,
        at_ms: revision.at_ms,
    });
    Ok(Json(History {
        revisions: revisions.collect(),
        operations,
    }))
}

#[utoipa::path(
    get,
    path = "/operations/{id}",
    params(("id" = String, Path, description = "Its id"), OperationQuery),
    responses(
        (status = 200, description = "The operation", body = Operation),
        (status = 400, description = "The request is invalid", body = Problem),
        (status = 404, description = "No such operation on this host", body = Problem),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
async fn operation(
    State(api): State<Api>,
    Named(id): Named<String>,
    query: Result<Query<OperationQuery>, QueryRejection>,
) -> Result<Json<Operation>, Failure> {
    let wait = Duration::from_millis(query?.0.wait_ms).min(MAX_WAIT);
    Ok(Json(api.controller()?.operation(&id, wait).await?))
}

#[utoipa::path(
    get,
    path = "/packages/{digest}",
    params(("digest" = Digest, Path, description = "SHA-256 of the package")),
    responses(
        (status = 200, description = "The package is on this host", body = PackageInfo),
        (status = 400, description = "The request is invalid", body = Problem),
        (status = 404, description = "No such package on this host", body = Problem),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
async fn package(
    State(api): State<Api>,
    Named(digest): Named<String>,
) -> Result<Json<PackageInfo>, Failure> {
    let package = parse(&digest)?;
    let packages = api.controller()?.packages().clone();
    match blocking(move || packages.has(&package)).await {
        Ok(true) => Ok(Json(PackageInfo { package })),
        Ok(false) => Err(ControllerError::NoPackage(digest).into()),
        Err(error) => Err(ControllerError::from(error).into()),
    }
}

/// Takes a package in as it arrives.
#[utoipa::path(
    put,
    path = "/packages/{digest}",
    params(("digest" = Digest, Path, description = "SHA-256 of the package")),
    request_body(content = String, content_type = "application/octet-stream"),
    responses(
        (status = 200, description = "The package is durable", body = PackageInfo),
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
) -> Result<Json<PackageInfo>, Failure> {
    let package = parse(&digest)?;
    let packages = api.controller()?.packages().clone();
    let mut body = request.into_body();
    let mut partial = blocking(move || packages.begin())
        .await
        .map_err(internal)??;
    let mut length = 0;
    while let Some(frame) = api.in_time(body.frame()).await? {
        let frame = frame.map_err(|error| Failure::new(RefusalKind::Invalid, error.to_string()))?;
        let Ok(bytes) = frame.into_data() else {
            continue;
        };
        length += bytes.len() as u64;
        if length > MAX_PACKED {
            let text = format!("a package has at most {MAX_PACKED} bytes");
            return Err(Failure::new(RefusalKind::Invalid, text));
        }
        let written = blocking(move || -> Result<PartialPackage, AddError> {
            partial.write(&bytes)?;
            Ok(partial)
        });
        partial = written
            .await
            .map_err(internal)?
            .map_err(ControllerError::from)?;
    }
    let finished = blocking(move || partial.finish(&package)).await;
    finished.map_err(internal)?.map_err(ControllerError::from)?;
    Ok(Json(PackageInfo { package }))
}

pub(super) fn internal(error: tokio::task::JoinError) -> Failure {
    ControllerError::from(error).into()
}

pub(super) fn parse(digest: &str) -> Result<Digest, Failure> {
    Digest::from_hex(digest).ok_or_else(|| {
        let text = format!("{digest} is no SHA-256 in 64 lower-case digits");
        Failure::new(RefusalKind::Invalid, text)
    })
}

/// The user of the request's connection.
pub(super) fn user(request: &Request) -> u32 {
    let client = request.extensions().get::<Client>();
    client.map_or(u32::MAX, |client| client.user)
}

fn plan(model: &ServiceModel) -> ApplyAnswer {
    let sizes = model
        .roles
        .iter()
        .flat_map(|role| (0..role.instances).map(|_| &role.size));
    let create = instance_names(model).into_iter().zip(sizes);
    let create = create.map(|(name, size)| PlannedInstance {
        name,
        vcpus: size.vcpus,
        memory_mib: size.memory_mib,
    });
    let endpoints = model
        .endpoints()
        .map(|(role, endpoint, public)| PlannedEndpoint {
            name: model.endpoint_name(role, endpoint),
            port: public.port,
            instances: role.instances,
        });
    ApplyAnswer {
        create: create.collect(),
        endpoints: endpoints.collect(),
        update: None,
        operation: None,
    }
}

fn service_info(api: &Api, state: &ServiceState) -> ServiceInfo {
    let deployment = state.deployment.as_ref();
    let instances = deployment.map_or(&[][..], |found| found.instances());
    let is_ready = |it: &&InstanceHandle| it.status().is_ready();
    ServiceInfo {
        name: state.record.name.clone(),
        expected: state.record.expected,
        generation: state.record.generation,
        ready: instances.iter().filter(is_ready).count(),
        deployment: deployment.map(|found| deployment_info(api, found)),
        operation: state.operation.clone(),
    }
}
