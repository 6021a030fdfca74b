//! What can be asked of a service and of an instance, each after a confirmation. The controller
//! and the host do it, as for the API.

use axum::extract::{Path, State};
use axum::response::Redirect;
use serde::Deserialize;

use super::action::Action;
use super::routes::{Failed, Page, encoded, no_instance};
use super::views::ActionRow;
use crate::api::types::RefusalKind;
use crate::controller::ServiceState;
use crate::store::services::Expected;
use crate::supervisor::instance::InstanceHandle;

/// What can be asked of a service.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ServiceAction {
    Start,
    Stop,
    Delete,
}

/// What can be asked of an instance.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum InstanceAction {
    Pause,
    Resume,
}

/// What can be asked of a service now.
pub(super) fn service_actions(state: &ServiceState) -> Vec<ActionRow> {
    let record = &state.record;
    let name = &record.name;
    let action = |id, label, question| ActionRow {
        id,
        label,
        question,
        path: format!("{}/{id}", service_path(name)),
    };
    let delete = || {
        let question = format!("Stop service {name} and remove its disks and logs?");
        action("delete", "Delete", question)
    };
    match record.expected {
        Expected::Started => {
            let question = format!("Stop service {name}? Its disks and logs stay.");
            vec![action("stop", "Stop", question), delete()]
        }
        Expected::Stopped => {
            let start = action("start", "Start", format!("Start service {name}?"));
            vec![start, delete()]
        }
        Expected::Deleted => Vec::new(),
    }
}

/// What can be asked of an instance now.
pub(super) fn instance_actions(service: &str, instance: &InstanceHandle) -> Vec<ActionRow> {
    let name = instance.spec().name();
    let action = |id, label, question| ActionRow {
        id,
        label,
        question,
        path: format!("{}/{id}", instance_path(service, name)),
    };
    let pause = if instance.status().paused {
        let question = format!("Let the processors of instance {name} run again?");
        action("resume", "Resume", question)
    } else {
        let question = format!("Stop the processors of instance {name}? It answers nobody then.");
        action("pause", "Pause", question)
    };
    vec![pause]
}

pub(super) async fn act_on_service(
    State(page): State<Page>,
    Path((name, wanted)): Path<(String, ServiceAction)>,
    action: Action,
) -> Result<Redirect, Failed> {
    let (controller, user) = (page.controller(), action.user);
    match wanted {
        ServiceAction::Start => controller.start_again(&name, user).await?,
        ServiceAction::Stop => controller.stop(&name, user).await?,
        ServiceAction::Delete => {
            controller.delete(&name, user).await?;
            return Ok(Redirect::to("/"));
        }
    };
    Ok(Redirect::to(&service_path(&name)))
}

pub(super) async fn act_on_instance(
    State(page): State<Page>,
    Path((service, name, wanted)): Path<(String, String, InstanceAction)>,
    _: Action,
) -> Result<Redirect, Failed> {
    let state = page.controller().service(&service).await?;
    let instance = state.deployment.as_ref().and_then(|it| it.instance(&name));
    let instance = instance.ok_or_else(|| no_instance(&service, &name))?;
    let paused = match wanted {
        InstanceAction::Pause => true,
        InstanceAction::Resume => false,
    };
    let done = instance.pause(paused).await;
    done.map_err(|text| Failed::new(RefusalKind::Unreachable, text))?;
    Ok(Redirect::to(&instance_path(&service, &name)))
}

fn service_path(name: &str) -> String {
    format!("/services/{}", encoded(name))
}

fn instance_path(service: &str, name: &str) -> String {
    format!("{}/instances/{}", service_path(service), encoded(name))
}
