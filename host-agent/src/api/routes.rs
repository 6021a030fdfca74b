//! The paths of the API and what they do with the host.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, FromRequest as _, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{Method, Uri};
use axum::middleware::map_response;
use axum::response::{IntoResponse as _, Response};
use axum::{Json, Router};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use utoipa::openapi::{Info, OpenApi, OpenApiBuilder};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::guard;
use super::listener::Places;
use super::request::{Failure, Named};
use super::types::{
    DeploymentInfo, Deployments, EndpointInfo, Health, InstanceInfo, MAX_BODY, PROGRAM,
    PROGRAM_HEADER, PauseRequest, Problem, RefusalKind,
};
use super::{agents, changes, events, exec, gc, logs, metrics, services};
use crate::controller::Controller;
use crate::supervisor::host::{DeploymentHandle, Host};
use crate::supervisor::instance::InstanceHandle;

/// What the handlers share.
#[derive(Debug, Clone)]
pub(super) struct Api(Arc<ApiState>);

#[derive(Debug)]
struct ApiState {
    /// The OpenAPI document.
    openapi: String,
    host: Host,
    /// Of a host agent that keeps services.
    controller: Option<Controller>,
    /// Whether the deployments have ended. Each log that is sent has a receiver.
    ended: watch::Receiver<bool>,
    started: Instant,
    places: Places,
    /// Limits the threads that read `/proc` for scrapes.
    process_reads: Arc<Semaphore>,
    request_limit: Duration,
}

/// The router of a host, and of the services that it keeps.
pub(super) fn router(
    host: Host,
    controller: Option<Controller>,
    ended: watch::Receiver<bool>,
    places: Places,
    request_limit: Duration,
) -> Router {
    let (router, document) = documented();
    let openapi = document_of(&document).to_string();
    let api = Api(Arc::new(ApiState {
        openapi,
        host,
        controller,
        ended,
        started: Instant::now(),
        places,
        process_reads: Arc::new(Semaphore::new(1)),
        request_limit,
    }));
    router
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(map_response(with_program))
        .with_state(api)
}

/// The paths with their handlers, and the document of both. A path that is not in the
/// document cannot be added (clippy.toml).
fn documented() -> (Router<Api>, OpenApi) {
    let info = Info::new("host-agent", PROGRAM);
    let document = OpenApiBuilder::new().info(info).build();
    let instance = OpenApiRouter::default()
        .routes(routes!(exec::exec))
        .routes(routes!(logs::logs))
        .routes(routes!(pause));
    OpenApiRouter::with_openapi(document)
        .routes(routes!(health))
        .routes(routes!(metrics::metrics))
        .routes(routes!(openapi))
        .routes(routes!(deployments))
        .routes(routes!(events::events))
        .routes(routes!(gc::gc))
        .nest(
            "/v1/deployments/{deployment}/instances/{instance}",
            instance,
        )
        .nest("/v1", services::routes())
        .nest("/v1", changes::routes())
        .nest("/v1", agents::routes())
        .split_for_parts()
}

/// The OpenAPI document, with the answers that the guard gives in place of handlers.
fn document_of(document: &OpenApi) -> Value {
    let mut document = serde_json::to_value(document).expect("the document is JSON");
    let paths = document["paths"].as_object_mut();
    let operations = paths.into_iter().flat_map(|paths| paths.values_mut());
    let operations = operations.filter_map(Value::as_object_mut).flatten();
    for (method, operation) in operations {
        let Some(responses) = operation
            .get_mut("responses")
            .and_then(Value::as_object_mut)
        else {
            continue;
        };
        for (status, description) in guard::answers(method) {
            responses.entry(*status).or_insert_with(|| {
                let schema = json!({"$ref": "#/components/schemas/Problem"});
                json!({
                    "description": description,
                    "content": {"application/json": {"schema": schema}},
                })
            });
        }
    }
    document
}

impl Api {
    /// The instance of a running deployment.
    pub(super) fn instance(&self, deployment: &str, name: &str) -> Result<InstanceHandle, Failure> {
        let deployments = self.0.host.deployments();
        let found = deployments.iter().find(|found| found.id() == deployment);
        let found = found.and_then(|found| found.instance(name)).cloned();
        found.ok_or_else(|| {
            let text = format!("no instance {name} of deployment {deployment} on this host");
            Failure::new(RefusalKind::NotFound, text)
        })
    }

    /// The host.
    pub(super) fn host(&self) -> &Host {
        &self.0.host
    }

    /// Number of connections to the API.
    pub(super) fn connections(&self) -> usize {
        self.0.places.taken()
    }

    /// The place of the one thread that reads `/proc`.
    pub(super) fn process_reads(&self) -> Arc<Semaphore> {
        Arc::clone(&self.0.process_reads)
    }

    /// Becomes true when the deployments have ended.
    pub(super) fn ended(&self) -> watch::Receiver<bool> {
        self.0.ended.clone()
    }

    /// The JSON in the body of `request`.
    pub(super) async fn json<T: DeserializeOwned>(&self, request: Request) -> Result<T, Failure> {
        let read = Json::from_request(request, &());
        Ok(self.in_time(read).await??.0)
    }

    /// The result of reading from a client, if it sends in time.
    pub(super) async fn in_time<T>(&self, read: impl Future<Output = T>) -> Result<T, Failure> {
        let read = tokio::time::timeout(self.0.request_limit, read).await;
        read.map_err(|_| {
            let text = "the request did not arrive in time";
            Failure::new(RefusalKind::Invalid, text)
        })
    }

    /// The services of this host, if it keeps services.
    pub(super) fn services(&self) -> Option<&Controller> {
        self.0.controller.as_ref()
    }

    /// The services of this host.
    pub(super) fn controller(&self) -> Result<&Controller, Failure> {
        self.0.controller.as_ref().ok_or_else(|| {
            let text = "this host agent runs one deployment and keeps no services: start \
                        host-agent serve";
            Failure::new(RefusalKind::NotFound, text)
        })
    }
}

/// What clients get to know about a deployment.
pub(super) fn deployment_info(api: &Api, deployment: &DeploymentHandle) -> DeploymentInfo {
    let uptime = api.0.started.elapsed();
    let instances = deployment.instances().iter().map(|instance| {
        let (spec, status) = (instance.spec(), instance.status());
        let endpoints = spec.endpoints.iter().map(|endpoint| EndpointInfo {
            name: endpoint.name.clone(),
            address: endpoint.address,
            local_port: endpoint.local_port,
        });
        InstanceInfo {
            name: spec.name().to_owned(),
            state: status.word().to_owned(),
            generation: status.generation,
            incarnation: spec.goal.incarnation,
            uptime_ms: u64::try_from(uptime.as_millis()).unwrap_or(u64::MAX),
            vmm_pid: status.vmm_pid,
            endpoints: endpoints.collect(),
            status,
        }
    });
    DeploymentInfo {
        deployment: deployment.id().to_owned(),
        service: deployment.service().to_owned(),
        pid: std::process::id(),
        instances: instances.collect(),
    }
}

#[utoipa::path(
    get,
    path = "/healthz",
    responses(
        (status = 200, description = "The host agent answers", body = Health),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
async fn health() -> Json<Health> {
    Json(Health {
        status: "ok".into(),
        version: PROGRAM.into(),
    })
}

/// The OpenAPI document of these paths.
#[utoipa::path(
    get,
    path = "/v1/openapi.json",
    responses(
        (status = 200, description = "This document", body = serde_json::Value),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
async fn openapi(State(api): State<Api>) -> Response {
    let headers = [(CONTENT_TYPE, "application/json")];
    (headers, api.0.openapi.clone()).into_response()
}

#[utoipa::path(
    get,
    path = "/v1/deployments",
    responses(
        (status = 200, description = "Every deployment that runs", body = Deployments),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
async fn deployments(State(api): State<Api>) -> Json<Deployments> {
    let found = api.0.host.deployments();
    let deployments = found.iter().map(|found| deployment_info(&api, found));
    let deployments = deployments.collect();
    Json(Deployments { deployments })
}

#[utoipa::path(
    post,
    path = "/pause",
    params(("deployment" = String, Path), ("instance" = String, Path)),
    request_body = PauseRequest,
    responses(
        (status = 200, description = "The vCPUs are stopped, or run", body = PauseRequest),
        (status = 400, description = "The request is invalid", body = Problem),
        (status = 404, description = "No such instance on this host", body = Problem),
        (status = 503, description = "The VMM process cannot be reached, or too many clients", body = Problem),
    ),
)]
async fn pause(
    State(api): State<Api>,
    Named((deployment, instance)): Named<(String, String)>,
    request: Request,
) -> Result<Json<PauseRequest>, Failure> {
    let instance = api.instance(&deployment, &instance)?;
    let wanted: PauseRequest = api.json(request).await?;
    let unreachable = |text| Failure::new(RefusalKind::Unreachable, text);
    instance.pause(wanted.paused).await.map_err(unreachable)?;
    Ok(Json(wanted))
}

async fn no_such_path(method: Method, uri: Uri) -> Failure {
    missing(RefusalKind::NoSuchPath, &method, &uri)
}

async fn no_such_method(method: Method, uri: Uri) -> Failure {
    missing(RefusalKind::NoSuchMethod, &method, &uri)
}

fn missing(kind: RefusalKind, method: &Method, uri: &Uri) -> Failure {
    let text = format!("host-agent {PROGRAM} has no {method} {}", uri.path());
    Failure::new(kind, text)
}

async fn with_program(mut response: Response) -> Response {
    let program = axum::http::HeaderValue::from_static(PROGRAM);
    response.headers_mut().insert(PROGRAM_HEADER, program);
    response
}
