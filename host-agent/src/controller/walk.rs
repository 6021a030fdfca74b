//! Walks a rollout: looks at the instances, does the next step, and looks again. The cursor
//! is in the store before what it says is done.

use std::collections::BTreeMap;
use std::future::pending;
use std::time::Duration;

use futures_util::future::{join_all, select_all};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use vmbus::message::RoleState;
use vmbus::text::chain;

use super::plan::{Change, Targets, change, refusal};
use super::rollout::{Moved, Progress, Seen, SeenState, Step};
use super::{Controller, ControllerError};
use crate::store::rollouts::{Rollout, Stage};
use crate::store::services::OperationState;
use crate::supervisor::event::{EventKind, RolloutStep};
use crate::supervisor::host::DeploymentHandle;
use crate::supervisor::instance::InstanceHandle;
use crate::supervisor::spec::InstanceSpec;
use crate::supervisor::status::Phase;
use crate::until::until;

/// Time between the end of new connections to an instance and its stop: a request that it was
/// given last is answered.
const DRAIN: Duration = Duration::from_secs(1);

struct Walk<'a> {
    controller: &'a Controller,
    deployment: &'a str,
    targets: Targets,
    /// Since when each instance is Ready without a break.
    ready: BTreeMap<String, Instant>,
}

/// Walks `rollout` of service `name` until it is over, waits for the operator, or `wake` says
/// that something else is wanted.
pub(super) async fn walk(
    controller: &Controller,
    name: &str,
    mut rollout: Rollout,
    deployment: &DeploymentHandle,
    wake: &Notify,
) -> Result<(), ControllerError> {
    let targets = match targets(controller, name, &rollout, deployment).await {
        Ok(targets) => targets,
        Err(error) => {
            if let Step::Move(next, moved) = rollout.failed(chain(&error)) {
                moves(controller, name, &rollout, &next, &moved, &[]).await?;
            }
            return Ok(());
        }
    };
    let mut this = Walk {
        controller,
        deployment: deployment.id(),
        targets,
        ready: BTreeMap::new(),
    };
    let mut entered = Instant::now();
    loop {
        let Some(deployment) = controller.0.host.deployment(this.deployment) else {
            return Ok(());
        };
        let instances = deployment.instances();
        let mut states: Vec<_> = instances.iter().map(InstanceHandle::watch_status).collect();
        for state in &mut states {
            // Only what changes after the look below wakes the wait.
            state.mark_unchanged();
        }
        let seen = this.look(instances, rollout.incarnation);
        let mut step = rollout.next(&seen, entered.elapsed());
        if let Step::Change(names) = &step {
            match this.change(names, &deployment).await {
                Ok(()) => continue,
                Err(error) => step = rollout.failed(chain(&error)),
            }
        }
        match step {
            Step::Retire(names) => {
                for name in names {
                    controller.0.host.retire(this.deployment, &name).await?;
                }
            }
            Step::Wait(due) => {
                let due = due.map(|due| Instant::now() + due);
                tokio::select! {
                    () = changed(&mut states) => {}
                    () = until(due) => {}
                    () = wake.notified() => return Ok(()),
                }
            }
            Step::Move(next, moved) => {
                let goes_on = moves(controller, name, &rollout, &next, &moved, &seen).await?;
                if !goes_on || moved != Moved::On {
                    return Ok(());
                }
                (rollout, entered) = (next, Instant::now());
            }
            Step::Finish => return finish(controller, name, &rollout).await,
            Step::Rest | Step::Change(_) => return Ok(()),
        }
    }
}

async fn targets(
    controller: &Controller,
    name: &str,
    rollout: &Rollout,
    deployment: &DeploymentHandle,
) -> Result<Targets, ControllerError> {
    let (of_store, generation) = (name.to_owned(), rollout.to);
    let found = controller.with_store(move |store| store.revision(&of_store, generation));
    let Some(revision) = found.await? else {
        return Err(ControllerError::NoRevision(name.to_owned()));
    };
    let targets = controller
        .targets(&revision.wanted, deployment, rollout.incarnation)
        .await?;
    let old: Vec<_> = deployment.instances().iter().map(|it| it.spec()).collect();
    let new: Vec<_> = targets.specs.iter().collect();
    match refusal(&old, &new).filter(|_| !old.is_empty()) {
        Some(why) => Err(ControllerError::NotPossible(why)),
        None => Ok(targets),
    }
}

/// Notes that the cursor moves, and reports it. False if another update has replaced this one.
async fn moves(
    controller: &Controller,
    name: &str,
    from: &Rollout,
    next: &Rollout,
    moved: &Moved,
    seen: &[Seen],
) -> Result<bool, ControllerError> {
    let result = match moved {
        Moved::On | Moved::Back(_) => None,
        Moved::Paused => Some((OperationState::Paused, None)),
        Moved::Halted(why) => {
            let why = match &from.rolling_back {
                Some(first) => format!("{first}; on the way back: {why}"),
                None => why.clone(),
            };
            Some((OperationState::Halted, Some(why)))
        }
    };
    if !advance(controller, name, next, from, result).await? {
        return Ok(false);
    }
    let report = |step| {
        let timeline = controller.0.host.timeline().of_service(name);
        timeline.report(None, EventKind::Rollout { step });
    };
    if let Stage::Domain(domain) = from.stage
        && matches!(moved, Moved::On | Moved::Paused)
    {
        report(RolloutStep::DomainDone { domain });
    }
    match moved {
        Moved::On => {
            if let Stage::Domain(domain) = next.stage {
                let old = seen.iter().filter(|it| it.domain == domain);
                let old = old.filter(|it| matches!(it.state, SeenState::Old { .. }));
                let instances = old.map(|it| it.name.clone()).collect();
                report(RolloutStep::DomainBegun { domain, instances });
            }
        }
        Moved::Paused => report(RolloutStep::Paused { done: next.done }),
        Moved::Halted(because) => report(RolloutStep::Halted {
            because: because.clone(),
        }),
        Moved::Back(because) => report(RolloutStep::GoesBack {
            to: next.to,
            because: because.clone(),
        }),
    }
    Ok(true)
}

async fn finish(
    controller: &Controller,
    name: &str,
    rollout: &Rollout,
) -> Result<(), ControllerError> {
    let (result, step) = match &rollout.rolling_back {
        None => {
            let done = RolloutStep::Done { to: rollout.to };
            ((OperationState::Succeeded, None), done)
        }
        Some(why) => {
            let back = RolloutStep::Back { to: rollout.to };
            ((OperationState::RolledBack, Some(why.clone())), back)
        }
    };
    if advance(controller, name, rollout, rollout, Some(result)).await? {
        controller
            .0
            .host
            .timeline()
            .of_service(name)
            .report(None, EventKind::Rollout { step });
    }
    Ok(())
}

async fn advance(
    controller: &Controller,
    name: &str,
    next: &Rollout,
    from: &Rollout,
    result: Option<(OperationState, Option<String>)>,
) -> Result<bool, ControllerError> {
    let (name, next, from) = (name.to_owned(), next.clone(), from.clone());
    let noted = controller.with_store(move |store| {
        let result = result.as_ref();
        let result = result.map(|(state, why)| (*state, why.as_deref()));
        store.advance(&name, &next, &from, result)
    });
    let noted = noted.await?;
    controller.changed();
    Ok(noted)
}

async fn changed(
    states: &mut [tokio::sync::watch::Receiver<crate::supervisor::status::InstanceStatus>],
) {
    if states.is_empty() {
        return pending().await;
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

impl Walk<'_> {
    /// Every instance that exists or is to exist.
    fn look(&mut self, instances: &[InstanceHandle], incarnation: u64) -> Vec<Seen> {
        let now = Instant::now();
        let mut seen = Vec::new();
        for target in &self.targets.specs {
            let found = instances
                .iter()
                .find(|it| it.spec().name() == target.name());
            let state = match found {
                None => SeenState::Missing,
                Some(found) => {
                    let (state, is_ready) = state(found, target, incarnation);
                    if !is_ready {
                        self.ready.remove(target.name());
                    }
                    match state {
                        SeenState::New(Progress::Ready(_)) => {
                            let since = self.ready.entry(target.name().to_owned());
                            let since = *since.or_insert(now);
                            SeenState::New(Progress::Ready(now - since))
                        }
                        state => state,
                    }
                }
            };
            seen.push(Seen {
                name: target.name().to_owned(),
                domain: target.goal.update_domain,
                state,
            });
        }
        let targets = &self.targets.specs;
        let surplus = instances.iter().map(InstanceHandle::spec);
        let surplus = surplus.filter(|it| targets.iter().all(|target| target.name() != it.name()));
        seen.extend(surplus.map(|spec| Seen {
            name: spec.name().to_owned(),
            domain: spec.goal.update_domain,
            state: SeenState::Surplus,
        }));
        seen
    }

    /// Takes the instances called `names` to the revision, all at the same time.
    async fn change(
        &self,
        names: &[String],
        deployment: &DeploymentHandle,
    ) -> Result<(), ControllerError> {
        let host = &self.controller.0.host;
        let mut drains = false;
        for name in names {
            let found = deployment.instance(name);
            if found.is_some_and(|found| found.status().is_ready()) {
                host.drain(self.deployment, name).await;
                drains = true;
            }
        }
        if drains {
            sleep(DRAIN).await;
        }
        let targets = self.targets.specs.iter();
        let targets = targets.filter(|target| names.iter().any(|name| name == target.name()));
        let changes = targets.map(|target| async move {
            let found = deployment.instance(target.name());
            let only_configuration = found.is_some_and(|found| {
                // A role that keeps failing gets a new boot too.
                change(found.spec(), target) == Change::Configuration && found.status().is_ready()
            });
            if only_configuration {
                host.apply(target.clone()).await
            } else {
                host.place(target.clone(), &self.targets.hold).await
            }
        });
        let results = join_all(changes).await;
        Ok(results.into_iter().collect::<Result<(), _>>()?)
    }
}

/// What `found` is for a rollout to `target`, and whether it is Ready with its own goal.
fn state(found: &InstanceHandle, target: &InstanceSpec, incarnation: u64) -> (SeenState, bool) {
    let (spec, status) = (found.spec(), found.status());
    if change(spec, target) != Change::None {
        let ready = status.is_ready();
        return (SeenState::Old { ready }, ready);
    }
    if spec.goal.incarnation < incarnation {
        return (SeenState::Same, true);
    }
    if status.is_ready() && status.applied >= spec.goal.incarnation {
        return (SeenState::New(Progress::Ready(Duration::ZERO)), true);
    }
    let failed = matches!(
        status.phase,
        Phase::Failed
            | Phase::Faulted
            | Phase::Stopped { .. }
            | Phase::Role(RoleState::Failed | RoleState::Cycling)
    );
    let progress = if failed {
        Progress::Failed(status.word())
    } else {
        Progress::Starting(status.word())
    };
    (SeenState::New(progress), false)
}
