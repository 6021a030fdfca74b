//! What is asked of a service that exists.

use super::{Controller, ControllerError};
use crate::store::changes::Asked;
use crate::store::rollouts::{RolloutPolicy, Target, Updated};
use crate::store::services::{Operation, Wanted};
use crate::supervisor::event::{EventKind, RolloutStep};

impl Controller {
    /// Stops service `name`: its guests end and its endpoints close; its disks and logs stay.
    /// Nothing if it is stopped already. Durable when it returns.
    pub async fn stop(&self, name: &str, user: u32) -> Result<Option<Operation>, ControllerError> {
        let of_store = name.to_owned();
        let asked = self.with_store(move |store| store.stop(&of_store, user));
        self.asked(name, asked.await?)
    }

    /// Refuses a change of service `name`, which exists, on a host that cannot run guests.
    async fn check_able(&self, name: &str) -> Result<(), ControllerError> {
        let of_store = name.to_owned();
        let found = self.with_store(move |store| store.service(&of_store));
        if found.await?.is_none() {
            return Err(ControllerError::NoService(name.to_owned()));
        }
        let unable = self.0.unable.as_ref();
        unable.map_or(Ok(()), |why| Err(ControllerError::Unable(why.clone())))
    }

    /// Starts service `name` again, on the disks that it has. Nothing if it is started
    /// already. Durable when it returns.
    pub async fn start_again(
        &self,
        name: &str,
        user: u32,
    ) -> Result<Option<Operation>, ControllerError> {
        self.check_able(name).await?;
        let of_store = name.to_owned();
        let asked = self.with_store(move |store| store.start(&of_store, user));
        self.asked(name, asked.await?)
    }

    /// Takes service `name` to another revision, one upgrade domain after the other. Nothing
    /// if it is the revision that is wanted already. Durable when it returns.
    pub async fn update(
        &self,
        name: &str,
        target: Target,
        policy: RolloutPolicy,
        user: u32,
    ) -> Result<Option<Operation>, ControllerError> {
        self.check_able(name).await?;
        if let Target::New(wanted) = &target {
            self.plan_update(name, wanted).await?;
        }
        let of_store = name.to_owned();
        let updated = self.with_store(move |store| store.update(&of_store, &target, &policy, user));
        let begun = self.updated(name, updated.await?)?;
        let of_store = name.to_owned();
        let rollout = self.with_store(move |store| store.rollout(&of_store));
        if let Some(rollout) = rollout.await?.filter(|_| begun.is_some()) {
            let (from, to) = (rollout.from, rollout.to);
            let timeline = self.0.host.timeline().of_service(name);
            let step = RolloutStep::Started { from, to };
            timeline.report(None, EventKind::Rollout { step });
        }
        Ok(begun)
    }

    /// Goes on with a rollout that is paused or halted. Nothing if it goes on already.
    /// Durable when it returns.
    pub async fn resume(
        &self,
        name: &str,
        user: u32,
    ) -> Result<Option<Operation>, ControllerError> {
        let of_store = name.to_owned();
        let updated = self.with_store(move |store| store.resume(&of_store, user));
        self.updated(name, updated.await?)
    }

    /// What is wanted of service `name` now.
    pub async fn wanted(&self, name: &str) -> Result<Wanted, ControllerError> {
        let of_store = name.to_owned();
        let found = self.with_store(move |store| {
            let Some(service) = store.service(&of_store)? else {
                return Ok(None);
            };
            store.revision(&of_store, service.generation)
        });
        let found = found.await?;
        let found = found.ok_or_else(|| ControllerError::NoService(name.into()))?;
        Ok(found.wanted)
    }

    fn updated(&self, name: &str, updated: Updated) -> Result<Option<Operation>, ControllerError> {
        match updated {
            Updated::Asked(asked) => self.asked(name, asked),
            Updated::Stopped => Err(ControllerError::Stopped(name.into())),
            Updated::NoRevision => Err(ControllerError::NoRevision(name.into())),
            Updated::NotWaiting => Err(ControllerError::NotWaiting(name.into())),
        }
    }

    fn asked(&self, name: &str, asked: Asked) -> Result<Option<Operation>, ControllerError> {
        match asked {
            Asked::Begun(operation) => {
                self.changed();
                self.wake(name);
                Ok(Some(operation))
            }
            Asked::Unchanged => Ok(None),
            Asked::Deleting => Err(ControllerError::Deleting(name.into())),
            Asked::NoService => Err(ControllerError::NoService(name.into())),
        }
    }
}
