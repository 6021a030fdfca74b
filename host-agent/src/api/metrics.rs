//! `GET /metrics`: the state of the host as Prometheus text, collected at each scrape.

mod collect;
pub(crate) mod process;
#[cfg(test)]
mod tests;
mod text;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use nix::time::{ClockId, clock_gettime};
use prometheus_client::encoding::prometheus_text;
use tokio::time::timeout;

use super::request::Failure;
use super::routes::Api;
use super::types::Problem;
use crate::blocking::blocking;
use collect::{InstanceSample, Snapshot, StoreSample};
use process::ProcessSample;

/// Most time to read `/proc`. A scrape goes without figures of processes then.
const PROCESS_LIMIT: Duration = Duration::from_secs(1);

/// Answers with every metric.
#[utoipa::path(
    get,
    path = "/metrics",
    responses(
        (status = 200, description = "Prometheus text", body = String, content_type = "text/plain"),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
pub(super) async fn metrics(State(api): State<Api>) -> Result<Response, Failure> {
    let store = match api.services() {
        Some(controller) => {
            let (services, operations) = controller.counts().await?;
            Some(StoreSample {
                services,
                operations,
            })
        }
        None => None,
    };
    let instances = instances(&api, store.as_ref());
    let pids = instances.iter().filter_map(|it| it.status.vmm_pid);
    let processes = processes(&api, pids.collect()).await.unwrap_or_default();
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC);
    let snapshot = Snapshot {
        now: now.map_or(Duration::ZERO, Duration::from),
        store,
        instances,
        processes,
        connections: api.connections(),
    };
    let headers = [(CONTENT_TYPE, prometheus_text::CONTENT_TYPE)];
    Ok((headers, text::encode(snapshot.families())).into_response())
}

/// Every instance of the host. The label *service* is the name in the store: several
/// services may have the same definition.
fn instances(api: &Api, store: Option<&StoreSample>) -> Vec<InstanceSample> {
    let mut samples = Vec::new();
    for deployment in api.host().deployments() {
        let service = store.and_then(|store| store.service_of(deployment.id()));
        let service = service.unwrap_or(deployment.service()).to_owned();
        for instance in deployment.instances() {
            samples.push(InstanceSample {
                service: service.clone(),
                deployment: deployment.id().to_owned(),
                name: instance.spec().name().to_owned(),
                status: instance.status(),
            });
        }
    }
    samples
}

/// Figures of this process and of VMM processes; `None` if they are not read in time.
/// One thread reads at a time, so that a `/proc` that hangs holds up one thread only.
async fn processes(api: &Api, pids: Vec<u32>) -> Option<BTreeMap<u32, ProcessSample>> {
    let places = Arc::clone(&api.process_reads());
    let read = async {
        let place = places.acquire_owned().await.ok()?;
        let read = blocking(move || {
            let _place = place;
            let all = pids.into_iter().chain([std::process::id()]);
            let read = all.filter_map(|pid| Some((pid, process::read(pid)?)));
            read.collect()
        });
        read.await.ok()
    };
    timeout(PROCESS_LIMIT, read).await.ok()?
}
