//! Keeps the services of the store running on the host: what was asked for is durable
//! before it is answered, and a task for each service does what is missing.

pub mod agents;
mod changes;
mod copies;
mod decide;
mod error;
pub mod events;
pub mod garbage;
pub mod plan;
mod reconcile;
mod rollout;
mod walk;

use std::collections::BTreeSet;
use std::collections::btree_map::{BTreeMap, Entry};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::blocking::blocking;
use crate::progress::Progress;
use crate::service;
use crate::service::ServiceRules;
use crate::service::model::ServiceModel;
use crate::store::agents::AgentPackages;
use crate::store::database::StoreError;
use crate::store::packages::PackageStore;
use crate::store::rollouts::{RolloutPolicy, Target};
use crate::store::services::{
    Applied, Expected, Operation, OperationState, Revision, ServiceRecord, ServiceStore, Wanted,
};
use crate::supervisor::deploy::sizes;
use crate::supervisor::host::{DeploymentHandle, Host};
use crate::supervisor::timeline::Events;
use crate::until::until;
pub use error::ControllerError;
use events::EventLog;

/// Address on which endpoints are published.
const ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Longest name of a service, as that of a DNS label.
const MAX_NAME: usize = 63;

/// The services of a host. A clone is another handle to the same.
#[derive(Debug, Clone)]
pub struct Controller(Arc<State>);

#[derive(Debug)]
struct State {
    host: Host,
    // Locked on blocking threads only.
    store: Arc<Mutex<ServiceStore>>,
    events: EventLog,
    packages: PackageStore,
    agents: AgentPackages,
    /// Held while it is decided what is offered.
    offering: tokio::sync::Mutex<()>,
    /// Why this host cannot run guests, if it cannot.
    unable: Option<String>,
    /// Wakes the task of each service.
    tasks: Mutex<BTreeMap<String, Arc<Notify>>>,
    /// What the operator decides.
    policy: Mutex<Arc<Policy>>,
    /// Counts the changes of operations.
    changes: watch::Sender<u64>,
    /// Wakes what keeps the good copy of the store.
    copy: Arc<Notify>,
}

/// What the operator of a host decides about its services.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// Sizes, images, ports.
    pub rules: ServiceRules,
    /// Most services.
    pub max_services: Option<u32>,
}

/// A service and what runs of it.
#[derive(Debug, Clone)]
pub struct ServiceState {
    /// What is wanted.
    pub record: ServiceRecord,
    /// What runs.
    pub deployment: Option<DeploymentHandle>,
    /// Its newest operation.
    pub operation: Option<Operation>,
}

impl Controller {
    /// Adopts the deployments of the services in `store` and starts to keep each service at
    /// what is wanted. Records `events`, which are those of the host. A host that is `unable`
    /// to run guests, for this reason, takes no new service. Services are read by `policy`.
    ///
    /// # Errors
    /// The store cannot be read, or the deployments cannot be listed.
    pub async fn start(
        host: Host,
        store: ServiceStore,
        events: Events,
        policy: Policy,
        unable: Option<String>,
    ) -> Result<Self, ControllerError> {
        let packages = PackageStore::new(&host.options().data_dir);
        let copy = Arc::new(Notify::new());
        let copier = store.database().copier().clone();
        let restored = store.database().restored().cloned();
        let copying = copies::keep(copier, Arc::clone(&copy), host.timeline().clone());
        let agents = AgentPackages::new(&host.options().data_dir);
        let store = Arc::new(Mutex::new(store));
        let events = EventLog::start(Arc::clone(&store), events, host.timeline().clone());
        let this = Self(Arc::new(State {
            host,
            store,
            events,
            packages: packages.clone(),
            agents,
            offering: tokio::sync::Mutex::default(),
            unable,
            tasks: Mutex::default(),
            policy: Mutex::new(Arc::new(policy)),
            changes: watch::Sender::new(0),
            copy,
        }));
        tokio::spawn(copying);
        if let Some(restored) = restored {
            this.report_restored(restored);
        }
        let (services, used) = this
            .with_store(|store| Ok((store.services()?, store.packages()?)))
            .await?;
        // Nobody uploads yet. What cannot be removed only takes space.
        let _ = blocking(move || packages.sweep(&used)).await?;
        this.start_agents().await?;
        let deployments = services.iter().filter_map(|it| it.deployment.clone());
        let known: BTreeSet<String> = deployments.collect();
        this.report_unknown(&known).await?;
        // Those that are to be stopped may be stopped already: their tasks look.
        let stopped = services
            .iter()
            .filter(|it| it.expected == Expected::Stopped);
        let stopped: BTreeSet<_> = stopped.filter_map(|it| it.deployment.clone()).collect();
        let adopted = move |id: &str| known.contains(id) && !stopped.contains(id);
        this.0.host.adopt(adopted).await?;
        for service in services {
            this.wake(&service.name);
        }
        Ok(this)
    }

    /// Replaces the policy. It counts for services that are applied or started from now on.
    pub fn set_policy(&self, policy: Policy) {
        *lock(&self.0.policy) = Arc::new(policy);
    }

    fn policy(&self) -> Arc<Policy> {
        Arc::clone(&lock(&self.0.policy))
    }

    /// The host.
    pub fn host(&self) -> &Host {
        &self.0.host
    }

    /// The events of the host.
    pub fn events(&self) -> &EventLog {
        &self.0.events
    }

    /// Stores the events that were reported until now; later ones are not recorded.
    pub async fn close(&self) {
        self.0.events.close().await;
    }

    /// The packages.
    pub fn packages(&self) -> &PackageStore {
        &self.0.packages
    }

    /// Reads and checks what `wanted` names.
    pub async fn load(&self, wanted: &Wanted) -> Result<ServiceModel, ControllerError> {
        let (wanted, policy) = (wanted.clone(), self.policy());
        let packages = self.0.packages.clone();
        blocking(move || {
            let path = packages.path(&wanted.package);
            if !packages.has(&wanted.package) {
                return Err(ControllerError::NoPackage(wanted.package.hex()));
            }
            let progress = Progress::default();
            let mut model = policy
                .rules
                .load_text(&path, &wanted.configuration, &progress)?;
            service::publish(&mut model, &wanted.publish)?;
            Ok(model)
        })
        .await?
    }

    /// Creates service `name`, updates it, or does nothing if it is as wanted already. Durable
    /// when it returns.
    pub async fn apply(
        &self,
        name: &str,
        wanted: Wanted,
        policy: RolloutPolicy,
        user: u32,
    ) -> Result<Option<Operation>, ControllerError> {
        check_name(name)?;
        if let Some(why) = &self.0.unable {
            return Err(ControllerError::Unable(why.clone()));
        }
        let model = self.load(&wanted).await?;
        self.check_room(name, &model).await?;
        let (of_store, of_update) = (name.to_owned(), wanted.clone());
        let most = self.policy().max_services;
        let applied = self
            .with_store(move |store| {
                let exists = store.service(&of_store)?.is_some();
                match most {
                    Some(most) if !exists && store.services()?.len() >= most as usize => {
                        Ok(Err(most))
                    }
                    _ => store.apply(&of_store, &wanted, user).map(Ok),
                }
            })
            .await?;
        let applied = applied.map_err(ControllerError::Quota)?;
        match applied {
            Applied::Begun(operation) => {
                self.wake(name);
                Ok(Some(operation))
            }
            Applied::Unchanged(_) => Ok(None),
            Applied::Differs(_) => {
                let target = Target::New(of_update);
                self.update(name, target, policy, user).await
            }
            Applied::Deleting => Err(ControllerError::Deleting(name.into())),
        }
    }

    /// Refuses a new service for which the host has no room.
    pub async fn check_room(
        &self,
        name: &str,
        model: &ServiceModel,
    ) -> Result<(), ControllerError> {
        let of_store = name.to_owned();
        let found = self.with_store(move |store| store.service(&of_store));
        if found.await?.is_none() {
            // Claimed when it is created; here only the answer counts.
            self.0.host.claim(&sizes(model))?;
        }
        Ok(())
    }

    /// Stops service `name` and removes everything of it. Durable when it returns.
    pub async fn delete(&self, name: &str, user: u32) -> Result<Operation, ControllerError> {
        let of_store = name.to_owned();
        let begun = self.with_store(move |store| store.delete(&of_store, user));
        let begun = begun.await?;
        let begun = begun.ok_or_else(|| ControllerError::NoService(name.into()))?;
        self.changed();
        self.wake(name);
        Ok(begun)
    }

    /// Every service.
    pub async fn services(&self) -> Result<Vec<ServiceState>, ControllerError> {
        let found = self.with_store(|store| {
            let services = store.services()?.into_iter();
            services
                .map(|record| {
                    let operation = store.operations(&record.name)?.into_iter().next();
                    Ok((record, operation))
                })
                .collect::<Result<Vec<_>, StoreError>>()
        });
        let found = found.await?.into_iter();
        let states = found.map(|(record, operation)| self.state(record, operation));
        Ok(states.collect())
    }

    /// One service.
    pub async fn service(&self, name: &str) -> Result<ServiceState, ControllerError> {
        let mut services = self.services().await?;
        services.retain(|service| service.record.name == name);
        services
            .pop()
            .ok_or_else(|| ControllerError::NoService(name.into()))
    }

    /// Every revision of a service, the oldest first, and its operations, the newest first.
    pub async fn history(
        &self,
        name: &str,
    ) -> Result<(Vec<Revision>, Vec<Operation>), ControllerError> {
        let of_store = name.to_owned();
        let found = self
            .with_store(move |store| Ok((store.history(&of_store)?, store.operations(&of_store)?)));
        match found.await? {
            (revisions, operations) if revisions.is_empty() && operations.is_empty() => {
                Err(ControllerError::NoService(name.into()))
            }
            found => Ok(found),
        }
    }

    /// An operation, when it has ended or `limit` has passed.
    pub async fn operation(&self, id: &str, limit: Duration) -> Result<Operation, ControllerError> {
        let deadline = Instant::now() + limit;
        let mut changes = self.0.changes.subscribe();
        loop {
            changes.mark_unchanged();
            let of_store = id.to_owned();
            let found = self.with_store(move |store| store.operation(&of_store));
            let found = found.await?;
            let found = found.ok_or_else(|| ControllerError::NoOperation(id.into()))?;
            if found.state != OperationState::Running || Instant::now() >= deadline {
                return Ok(found);
            }
            tokio::select! {
                _ = changes.changed() => {}
                () = until(Some(deadline)) => {}
            }
        }
    }

    /// The services of the store, and how many operations are in each state.
    pub async fn counts(
        &self,
    ) -> Result<(Vec<ServiceRecord>, Vec<(OperationState, u64)>), ControllerError> {
        self.with_store(|store| Ok((store.services()?, store.operation_counts()?)))
            .await
    }

    fn state(&self, record: ServiceRecord, operation: Option<Operation>) -> ServiceState {
        let id = record.deployment.as_deref();
        ServiceState {
            deployment: id.and_then(|id| self.0.host.deployment(id)),
            record,
            operation,
        }
    }

    /// Wakes the task of service `name`, or starts it.
    fn wake(&self, name: &str) {
        match lock(&self.0.tasks).entry(name.to_owned()) {
            Entry::Occupied(task) => task.get().notify_one(),
            Entry::Vacant(place) => {
                let wake = Arc::clone(place.insert(Arc::default()));
                tokio::spawn(reconcile::run(self.clone(), name.to_owned(), wake));
            }
        }
    }

    /// An operation has begun or ended.
    fn changed(&self) {
        self.0.changes.send_modify(|number| *number += 1);
    }

    async fn with_store<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut ServiceStore) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, ControllerError> {
        let store = Arc::clone(&self.0.store);
        let worked = blocking(move || {
            let mut store = lock(&store);
            let result = work(&mut store);
            (result, store.database().take_changed())
        });
        let (result, changed) = worked.await?;
        if changed {
            self.0.copy.notify_one();
        }
        Ok(result?)
    }
}

fn check_name(name: &str) -> Result<(), ControllerError> {
    let fits = (1..=MAX_NAME).contains(&name.len());
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    if fits && name.bytes().all(is_plain) {
        return Ok(());
    }
    Err(ControllerError::Name(name.to_owned()))
}

/// A panic cannot leave a change half made: each is one call or one transaction.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
