//! The task of one service: looks at what is wanted and what is there, does the next step,
//! and looks again.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::select_all;
use tokio::sync::Notify;
use vmbus::text::chain;

use super::decide::{Presence, Step, next_step, outcome};
use super::walk::walk;
use super::{ADDRESS, Controller, ControllerError, lock};
use crate::blocking::blocking;
use crate::progress::Progress;
use crate::store::deployment::{Retention, directory, random_id};
use crate::store::services::{Operation, OperationState, ServiceRecord};
use crate::supervisor::deploy::{DeployOptions, deploy};
use crate::supervisor::event::EventKind;
use crate::supervisor::host::{DeploymentHandle, HostError};

/// Delay after a step that failed, doubled each time.
const RETRY: Duration = Duration::from_secs(10);
/// Longest delay after a step that failed.
const RETRY_MOST: Duration = Duration::from_secs(300);

/// How a step ended.
enum Done {
    /// Look again.
    Again,
    /// The service is forgotten.
    Gone,
}

/// Keeps service `name` at what is wanted, until nothing of it is left.
pub(super) async fn run(controller: Controller, name: String, wake: Arc<Notify>) {
    let mut delay = RETRY;
    loop {
        match step(&controller, &name, &wake).await {
            Ok(Done::Again) => delay = RETRY,
            Ok(Done::Gone) => return controller.leave(&name).await,
            Err(error) => {
                controller.failed(&name, &error).await;
                tokio::select! {
                    () = wake.notified() => delay = RETRY,
                    () = tokio::time::sleep(delay) => delay = RETRY_MOST.min(2 * delay),
                }
            }
        }
    }
}

async fn step(controller: &Controller, name: &str, wake: &Notify) -> Result<Done, ControllerError> {
    let of_store = name.to_owned();
    let found = controller.with_store(move |store| store.service(&of_store));
    let Some(service) = found.await? else {
        return Ok(Done::Gone);
    };
    let running = controller.state(service.clone(), None).deployment;
    let presence = match (&running, &service.deployment) {
        (Some(_), _) => Presence::Running,
        (None, Some(id)) if controller.has_files(id).await? => {
            if controller.0.host.may_run(id).await? {
                Presence::Files
            } else {
                Presence::Stopped
            }
        }
        _ => Presence::Absent,
    };
    match (next_step(&service, presence), running) {
        (Step::Deploy, _) => {
            let deploying = create(controller, &service);
            // A deletion meanwhile: nothing is left of a creation that is dropped.
            tokio::select! {
                created = deploying => created?,
                () = wake.notified() => {}
            }
        }
        (Step::Adopt, _) => adopt(controller, &service).await?,
        (Step::Watch, Some(deployment)) => {
            let of_store = name.to_owned();
            let found = controller.with_store(move |store| store.rollout(&of_store));
            match found.await?.filter(|it| !it.paused && it.halted.is_none()) {
                Some(rollout) => walk(controller, name, rollout, &deployment, wake).await?,
                None => watch(controller, name, &deployment, wake).await?,
            }
        }
        (Step::Stop, Some(deployment)) => {
            deployment.stop().await;
            deployment.ended().await;
            controller.0.host.release(deployment.id()).await;
        }
        (Step::Rest, _) => {
            end_running(controller, name, None).await?;
            wake.notified().await;
        }
        (Step::Remove, Some(deployment)) => {
            deployment.stop().await;
            deployment.ended().await;
            controller.0.host.remove(deployment.id()).await?;
        }
        (Step::Discard, _) => {
            if let Some(id) = &service.deployment {
                controller.0.host.discard(id).await?;
            }
        }
        (Step::Forget, _) => {
            let of_store = name.to_owned();
            let forgotten = controller.with_store(move |store| store.forget(&of_store));
            forgotten.await?;
            controller.changed();
        }
        // `next_step` gives these for a running deployment only.
        (Step::Watch | Step::Stop | Step::Remove, None) => {}
    }
    Ok(Done::Again)
}

/// Creates the deployment of the newest revision. Its id is in the store before anything of
/// it exists, so that a host agent that dies here finds it again.
async fn create(controller: &Controller, service: &ServiceRecord) -> Result<(), ControllerError> {
    let (name, generation) = (service.name.clone(), service.generation);
    let found = controller.with_store(move |store| store.revision(&name, generation));
    let Some(revision) = found.await? else {
        return Err(ControllerError::NoService(service.name.clone()));
    };
    let of_store = service.name.clone();
    let found = controller.with_store(move |store| store.incarnation(&of_store));
    let incarnation = found.await?;
    let model = controller.load(&revision.wanted).await?;
    let host = &controller.0.host;
    let id = random_id().map_err(|source| HostError::Directory {
        what: "choose an id in",
        path: host.options().data_dir.clone(),
        source,
    })?;
    let (name, of_store) = (service.name.clone(), id.clone());
    let noted = controller.with_store(move |store| store.deploying(&name, &of_store));
    noted.await?;
    let how = DeployOptions {
        id,
        incarnation,
        retention: Retention::Durable,
        address: ADDRESS,
    };
    let progress = CancelOnDrop(Progress::default());
    deploy(host, &model, &how, &progress.0).await?;
    Ok(())
}

/// Cancels the blocking step that runs when its future is dropped.
struct CancelOnDrop(Progress);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

async fn adopt(controller: &Controller, service: &ServiceRecord) -> Result<(), ControllerError> {
    let Some(id) = service.deployment.clone() else {
        return Ok(());
    };
    let wanted = id.clone();
    let adopted = controller.0.host.adopt(move |id| id == wanted).await?;
    if adopted.is_empty() {
        let path = directory(&controller.0.host.options().data_dir, &id);
        return Err(HostError::NotAdopted { path }.into());
    }
    Ok(())
}

/// Ends the operation when the instances are Ready or one has failed, then waits.
async fn watch(
    controller: &Controller,
    name: &str,
    deployment: &DeploymentHandle,
    wake: &Notify,
) -> Result<(), ControllerError> {
    let of_store = name.to_owned();
    let found = controller.with_store(move |store| store.running(&of_store));
    if let Some(running) = found.await? {
        let result = tokio::select! {
            result = settled(deployment) => result,
            () = wake.notified() => return Ok(()),
        };
        end(controller, &running, result.err()).await?;
    }
    wake.notified().await;
    Ok(())
}

/// Ends the operation of service `name` that runs, if one does.
async fn end_running(
    controller: &Controller,
    name: &str,
    error: Option<String>,
) -> Result<(), ControllerError> {
    let of_store = name.to_owned();
    let found = controller.with_store(move |store| store.running(&of_store));
    match found.await? {
        Some(running) => end(controller, &running, error).await,
        None => Ok(()),
    }
}

/// Ends `operation`, unless another one has replaced it: it has succeeded unless there is an
/// `error`.
async fn end(
    controller: &Controller,
    operation: &Operation,
    error: Option<String>,
) -> Result<(), ControllerError> {
    let id = operation.id.clone();
    let state = match error {
        None => OperationState::Succeeded,
        Some(_) => OperationState::Failed,
    };
    let ended =
        controller.with_store(move |store| store.end_operation(&id, state, error.as_deref()));
    ended.await?;
    controller.changed();
    Ok(())
}

/// Waits until the states of the instances decide about their start.
async fn settled(deployment: &DeploymentHandle) -> Result<(), String> {
    let instances = deployment.instances();
    let mut states: Vec<_> = instances.iter().map(|it| it.watch_status()).collect();
    loop {
        let found: Vec<_> = instances
            .iter()
            .zip(&mut states)
            .map(|(it, state)| (it.spec().name(), state.borrow_and_update().clone()))
            .collect();
        if let Some(result) = outcome(&found) {
            return result;
        }
        let changes = states.iter_mut().map(|state| {
            Box::pin(async {
                if state.changed().await.is_err() {
                    // Its actor has ended: no change follows.
                    pending::<()>().await;
                }
            })
        });
        select_all(changes).await;
    }
}

impl Controller {
    async fn has_files(&self, id: &str) -> Result<bool, ControllerError> {
        let path = directory(&self.0.host.options().data_dir, id);
        Ok(blocking(move || path.exists()).await?)
    }

    /// Ends the operation of a service that failed, and reports why.
    async fn failed(&self, name: &str, error: &ControllerError) {
        let text = chain(error);
        let warning = format!("service {name}: {text}");
        let timeline = self.0.host.timeline().of_service(name);
        timeline.report(None, EventKind::Warning { text: warning });
        let of_store = name.to_owned();
        let ended = self.with_store(move |store| store.end(&of_store, Some(&text)));
        if let Err(error) = ended.await {
            let text = format!("service {name}: {}", chain(&error));
            timeline.report(None, EventKind::Warning { text });
        }
        self.changed();
    }

    /// The task of service `name` ends. If the service was created again meanwhile, another
    /// one starts.
    async fn leave(&self, name: &str) {
        lock(&self.0.tasks).remove(name);
        let of_store = name.to_owned();
        let found = self.with_store(move |store| store.service(&of_store));
        if matches!(found.await, Ok(Some(_))) {
            self.wake(name);
        }
    }
}
