//! The paths of the page and what they show.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use askama::Template;
use axum::Router;
use axum::extract::{FromRequestParts, Path, Query, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::middleware::map_response;
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use serde::Deserialize;

use super::actions::{act_on_instance, act_on_service, instance_actions, service_actions};
use super::assets::{self, asset};
use super::data::{
    event_rows, instance_row, instance_rows, operation_row, plots, revision_row, service_row, strip,
};
use super::gate::protect;
use super::samples::{Samples, monotonic};
use super::sessions::Session;
use super::states::stays;
use super::views::{EventsPage, Frame, InstancePage, LogTab, Message, Overview, ServicePage};
use crate::api::request::Failure;
use crate::api::types::{LogFile, PROGRAM, RefusalKind};
use crate::controller::{Controller, ControllerError};
use crate::store::events::{EventFilter, StoredEvent};

/// Events on a page with other things.
const FEW_EVENTS: usize = 20;
/// Events on the page of events.
const MANY_EVENTS: usize = 500;
/// Events from which the states of an instance are read: some boots.
const STATE_EVENTS: usize = 400;

/// What the handlers share.
#[derive(Debug, Clone)]
pub(super) struct Page(Arc<PageState>);

#[derive(Debug)]
struct PageState {
    controller: Controller,
    samples: Samples,
}

/// The page about the services of `controller`.
#[expect(
    clippy::disallowed_methods,
    reason = "pages are for people and not part of the API's document"
)]
pub fn router(controller: Controller) -> Router {
    let page = Page(Arc::new(PageState {
        samples: Samples::start(controller.host().clone()),
        controller,
    }));
    Router::new()
        .route("/", get(overview))
        .route("/events", get(events))
        .route("/services/{service}", get(service))
        .route("/services/{service}/{action}", post(act_on_service))
        .route("/services/{service}/instances/{instance}", get(instance))
        .route(
            "/services/{service}/instances/{instance}/{action}",
            post(act_on_instance),
        )
        .route("/page/{file}", get(asset))
        .layer(map_response(protect))
        .with_state(page)
}

/// The browser's session; none on the Unix socket.
struct Csrf(String);

impl<S: Send + Sync> FromRequestParts<S> for Csrf {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        let session = parts.extensions.get::<Session>();
        Ok(Self(session.map_or_else(String::new, |it| it.csrf.clone())))
    }
}

impl Page {
    /// The services.
    pub(super) fn controller(&self) -> &Controller {
        &self.0.controller
    }

    async fn newest(
        &self,
        filter: &EventFilter,
        most: usize,
    ) -> Result<Vec<StoredEvent>, ControllerError> {
        self.controller().events().newest(filter, most).await
    }
}

/// The answer to a request that fails: as that of the API.
pub(super) struct Failed(StatusCode, String);

impl Failed {
    pub(super) fn new(kind: RefusalKind, text: impl Into<String>) -> Self {
        let (status, text) = Failure::new(kind, text).into_parts();
        Self(status, text)
    }
}

impl From<ControllerError> for Failed {
    fn from(error: ControllerError) -> Self {
        let (status, text) = Failure::from(error).into_parts();
        Self(status, text)
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let title = match self.0 {
            StatusCode::NOT_FOUND => "Not found",
            status if status.is_server_error() => "Error",
            _ => "Refused",
        };
        message(self.0, title, &self.1)
    }
}

/// A page that says one thing.
pub(super) fn message(status: StatusCode, title: &str, text: &str) -> Response {
    let frame = frame(title.to_owned(), String::new(), Csrf(String::new()));
    let text = text.to_owned();
    (status, html(&Message { frame, text })).into_response()
}

fn html(template: &impl Template) -> Response {
    match template.render() {
        Ok(text) => Html(text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

fn frame(title: String, stream: String, csrf: Csrf) -> Frame {
    Frame {
        title,
        style: assets::style(),
        script: assets::script(),
        icon: assets::icon(),
        stream,
        csrf: csrf.0,
        version: PROGRAM,
    }
}

/// Path of the events after those that a page shows. Without an event the page fetches itself
/// again when it has loaded, so that none is missed.
fn stream(newest: &[StoredEvent], filter: &str) -> String {
    let after = newest.last().map_or(0, |event| event.number);
    format!("/v1/events?after={after}{filter}")
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(now.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

async fn overview(State(page): State<Page>, csrf: Csrf) -> Result<Response, Failed> {
    let newest = page.newest(&EventFilter::default(), FEW_EVENTS).await?;
    let services = page.controller().services().await?;
    let now = monotonic();
    let instances = services.iter().flat_map(|it| instance_rows(it, now));
    Ok(html(&Overview {
        frame: frame("Overview".into(), stream(&newest, ""), csrf),
        services: services.iter().map(service_row).collect(),
        instances: instances.collect(),
        plots: plots(&page.0.samples.own()),
        events: event_rows(&newest, None),
    }))
}

async fn events(State(page): State<Page>, csrf: Csrf) -> Result<Response, Failed> {
    let newest = page.newest(&EventFilter::default(), MANY_EVENTS).await?;
    Ok(html(&EventsPage {
        frame: frame("Events".into(), stream(&newest, ""), csrf),
        events: event_rows(&newest, None),
    }))
}

async fn service(
    State(page): State<Page>,
    Path(name): Path<String>,
    csrf: Csrf,
) -> Result<Response, Failed> {
    let filter = EventFilter {
        service: Some(name.clone()),
        ..EventFilter::default()
    };
    let newest = page.newest(&filter, FEW_EVENTS).await?;
    let state = page.controller().service(&name).await?;
    let (revisions, operations) = page.controller().history(&name).await?;
    let of_stream = format!("&service={}", encoded(&name));
    Ok(html(&ServicePage {
        frame: frame(name.clone(), stream(&newest, &of_stream), csrf),
        service: service_row(&state),
        actions: service_actions(&state),
        instances: instance_rows(&state, monotonic()),
        operations: operations.iter().map(operation_row).collect(),
        revisions: revisions.iter().rev().map(revision_row).collect(),
        events: event_rows(&newest, Some(&name)),
    }))
}

#[derive(Debug, Deserialize)]
struct InstanceQuery {
    log: Option<LogFile>,
}

async fn instance(
    State(page): State<Page>,
    Path((name, instance)): Path<(String, String)>,
    Query(query): Query<InstanceQuery>,
    csrf: Csrf,
) -> Result<Response, Failed> {
    let state = page.controller().service(&name).await?;
    let deployment = state.deployment.as_ref();
    let found = deployment.and_then(|it| Some((it, it.instance(&instance)?)));
    let (deployment, handle) = found.ok_or_else(|| no_instance(&name, &instance))?;
    let filter = EventFilter {
        service: None,
        deployment: Some(deployment.id().to_owned()),
        instance: Some(instance.clone()),
    };
    let newest = page.newest(&filter, STATE_EVENTS).await?;
    let stays = stays(&newest, handle.status().word(), now_ms());
    let samples = page.0.samples.of(deployment.id(), &instance);
    let (of_service, of_instance) = (encoded(&name), encoded(&instance));
    let of_stream = format!("&service={of_service}&instance={of_instance}");
    let log = query.log.unwrap_or(LogFile::Role);
    let logs = [LogFile::Role, LogFile::Agent, LogFile::Serial];
    let log_path = format!(
        "/v1/deployments/{}/instances/{of_instance}/logs?follow=true&source={}",
        deployment.id(),
        log.name()
    );
    let few = &newest[newest.len().saturating_sub(FEW_EVENTS)..];
    Ok(html(&InstancePage {
        frame: frame(instance.clone(), stream(&newest, &of_stream), csrf),
        instance: instance_row(&name, handle, monotonic()),
        strip: strip(&stays),
        actions: instance_actions(&name, handle),
        plots: plots(&samples),
        logs: logs
            .map(|it| LogTab {
                name: it.name(),
                chosen: it == log,
            })
            .into(),
        log_path,
        events: event_rows(few, Some(&name)),
    }))
}

/// No such instance runs.
pub(super) fn no_instance(service: &str, instance: &str) -> Failed {
    let text = format!("no instance {instance} of service {service} runs on this host");
    Failed::new(RefusalKind::NotFound, text)
}

/// A text as one segment of a path.
pub(super) fn encoded(text: &str) -> String {
    let encoded = askama::filters::urlencode_strict(text);
    encoded.map_or_else(|never| match never {}, |it| it.to_string())
}
