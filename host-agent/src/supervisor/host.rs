//! A host: runs instances of any number of deployments, with one event bus, one content
//! store, one cgroup and one janitor for all of them.

mod adopt;
mod create;
mod error;
mod place;
mod published;
mod rest;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use vmbus::text::chain;

use super::admission::{AdmissionLimits, Capacity, Demand, admit};
use super::agents::OfferedAgent;
use super::event::EventKind;
use super::instance::{InstanceHandle, Request};
use super::lifecycle::Limits;
use super::liveness::heartbeat::HeartbeatRule;
use super::spec::{GuestSize, ImageRef, InstanceSpec, PublicEndpoint};
use super::timeline::Timeline;
use crate::blocking::{DropBlocking, blocking};
use crate::cgroup::{self, HostGroup};
use crate::progress::Progress;
use crate::store::content::{ContentStore, SweepOnDrop};
use crate::store::deployment::{DeploymentDir, random_id, short_id, sweep};
use crate::store::image::{self, Image};
use crate::store::janitor::{self, Janitor, Remains};
pub use create::{HeldContent, NewDeployment};
pub use error::HostError;
pub use place::same_disks;
pub use published::Published;

/// How a host runs its instances.
#[derive(Debug, Clone)]
pub struct HostOptions {
    /// Where images, content and deployments live.
    pub data_dir: PathBuf,
    /// Where the host's socket lives.
    pub runtime_dir: PathBuf,
    /// Name of the socket, which its owner removes; else a random one, which goes with the
    /// host.
    pub socket: Option<&'static str>,
    /// Heartbeat rule.
    pub rule: HeartbeatRule,
    /// Factor on every limit that depends on the speed of this machine.
    pub timeout_scale: f64,
    /// What all instances may take, until [`Host::limit`] changes it.
    pub admission: AdmissionLimits,
    /// Start no guest whose VMM process lacks a layer of the sandbox.
    pub require_sandbox: bool,
}

impl HostOptions {
    /// Time that a role may take to stop.
    pub fn role_stop(&self) -> Duration {
        self.scaled(30)
    }

    fn scaled(&self, seconds: u64) -> Duration {
        Duration::from_secs(seconds).mul_f64(self.timeout_scale)
    }

    fn limits(&self) -> Limits {
        Limits {
            role_stop: self.role_stop(),
            power_off: self.scaled(10),
            begin: self.scaled(3),
            condemned: self.scaled(30),
            vmm_stop: self.scaled(2),
            death: self.scaled(10),
        }
    }
}

/// A host. A clone is another handle to the same host, whose instances end with the last
/// handle.
#[derive(Debug, Clone)]
pub struct Host(Arc<HostState>);

#[derive(Debug)]
struct HostState {
    id: String,
    options: HostOptions,
    content: ContentStore,
    timeline: Timeline,
    group: Option<Arc<DropBlocking<HostGroup>>>,
    images: Mutex<BTreeMap<ImageRef, Arc<Image>>>,
    deployments: Mutex<BTreeMap<String, Deployment>>,
    capacity: Mutex<Capacity>,
    /// The guest agent that is offered to all guests.
    offers: watch::Sender<Option<Arc<OfferedAgent>>>,
    /// Of deployments that are being created.
    claimed: Mutex<Demand>,
    _janitor: Janitor,
}

#[derive(Debug)]
struct Deployment {
    handle: DeploymentHandle,
    published: Published,
    // Dropped before the directory, whose files it uses.
    tasks: JoinSet<()>,
    files: DropBlocking<Arc<Files>>,
    /// Every instance in the directory runs here.
    whole: bool,
}

/// The directory of a deployment. Drop removes content that only it used after it.
#[derive(Debug)]
struct Files {
    dir: DeploymentDir,
    _sweep: SweepOnDrop,
}

/// A handle to a running deployment, which runs on when the handle is dropped.
#[derive(Debug, Clone)]
pub struct DeploymentHandle {
    id: String,
    service: String,
    directory: PathBuf,
    instances: Vec<InstanceHandle>,
}

impl Host {
    /// Removes what hosts that died have left, finds a cgroup and starts a janitor.
    /// Events go to `timeline`.
    ///
    /// # Errors
    /// The janitor cannot be started.
    pub async fn open(options: HostOptions, timeline: Timeline) -> Result<Self, HostError> {
        let (data_dir, limits) = (options.data_dir.clone(), options.admission);
        let content = ContentStore::new(&data_dir);
        let of_sweep = content.clone();
        let (id, swept, group, capacity) = blocking(move || {
            let swept = sweep(&data_dir).map_err(|error| chain(&error));
            let unused = of_sweep.sweep().map_err(|error| chain(&error));
            let id = random_id()?;
            let group = cgroup::find_parent()
                .map_err(|why| why.to_string())
                .and_then(|place| {
                    HostGroup::create(&place, short_id(&id)).map_err(|error| chain(&error))
                });
            Ok((id, swept.and(unused), group, Capacity::of_machine(limits)))
        })
        .await?
        .map_err(HostError::directory("choose an id for", &options.data_dir))?;
        let warn = |text| timeline.report(None, EventKind::Warning { text });
        if let Err(text) = swept {
            // It takes space but does not prevent a start.
            warn(text);
        }
        let group = match group {
            Ok(group) => Some(Arc::new(DropBlocking::new(group))),
            Err(why) => {
                warn(format!("memory limit of guests is not enforced: {why}"));
                None
            }
        };
        let remains = Remains {
            data_dir: options.data_dir.clone(),
            owner: id.clone(),
            socket: options.socket.is_none().then(|| socket_path(&options, &id)),
            group: group.as_ref().map(|group| group.path().to_owned()),
        };
        let janitor = janitor::start(remains).map_err(HostError::directory(
            "start a janitor for",
            &options.data_dir,
        ))?;
        Ok(Self(Arc::new(HostState {
            id,
            options,
            content,
            timeline,
            group,
            images: Mutex::default(),
            deployments: Mutex::default(),
            capacity: Mutex::new(capacity),
            offers: watch::Sender::new(None),
            claimed: Mutex::default(),
            _janitor: janitor,
        })))
    }

    /// Its options.
    pub fn options(&self) -> &HostOptions {
        &self.0.options
    }

    /// Path for the socket of the host's API.
    pub fn socket(&self) -> PathBuf {
        socket_path(&self.0.options, &self.0.id)
    }

    /// Its event bus.
    pub fn timeline(&self) -> &Timeline {
        &self.0.timeline
    }

    /// Offers a guest agent to all guests, or none.
    pub fn offer_agent(&self, offered: Option<OfferedAgent>) {
        self.0.offers.send_replace(offered.map(Arc::new));
    }

    /// The guest agent that is offered.
    pub fn offered_agent(&self) -> Option<Arc<OfferedAgent>> {
        self.0.offers.borrow().clone()
    }

    /// The deployment `id`, if it runs.
    pub fn deployment(&self, id: &str) -> Option<DeploymentHandle> {
        let deployments = lock(&self.0.deployments);
        deployments.get(id).map(|found| found.handle.clone())
    }

    /// Every deployment that runs, by its id.
    pub fn deployments(&self) -> Vec<DeploymentHandle> {
        let deployments = lock(&self.0.deployments);
        let handles = deployments.values().map(|it| it.handle.clone());
        handles.collect()
    }

    /// Limits what instances take from now on. Those that run do so further.
    ///
    /// # Errors
    /// A panic in the blocking step.
    pub async fn limit(&self, limits: AdmissionLimits) -> Result<(), HostError> {
        let capacity = blocking(move || Capacity::of_machine(limits)).await?;
        *lock(&self.0.capacity) = capacity;
        Ok(())
    }

    /// Claims room for instances that are going to be created. Drop the claim when they are.
    ///
    /// # Errors
    /// They do not fit beside what runs and what is being created.
    pub fn claim(&self, sizes: &[GuestSize]) -> Result<Claim, HostError> {
        let used = {
            let deployments = lock(&self.0.deployments);
            let instances = deployments.values().flat_map(|it| &it.handle.instances);
            Demand::sum(instances.map(|instance| &instance.spec().size))
        };
        let capacity = *lock(&self.0.capacity);
        let mut claimed = lock(&self.0.claimed);
        let demand = admit(capacity, used.plus(*claimed), sizes)?;
        *claimed = claimed.plus(demand);
        let state = Arc::clone(&self.0);
        Ok(Claim { state, demand })
    }

    /// Checks image `name` and keeps it open for instances.
    pub async fn verify_image(
        &self,
        name: &str,
        progress: &Progress,
    ) -> Result<ImageRef, HostError> {
        let (data_dir, of_open) = (self.0.options.data_dir.clone(), name.to_owned());
        let progress = progress.clone();
        let image = blocking(move || image::open(&data_dir, &of_open, &progress))
            .await?
            .map_err(HostError::Image)?;
        let reference = ImageRef {
            name: name.to_owned(),
            manifest: image.digest,
        };
        let verified = EventKind::ImageVerified {
            image: name.to_owned(),
            cached: image.cached,
        };
        self.0.timeline.report(None, verified);
        lock(&self.0.images).insert(reference.clone(), Arc::new(image));
        Ok(reference)
    }

    /// The verified image that a spec names.
    async fn image(&self, wanted: &ImageRef) -> Result<Arc<Image>, HostError> {
        let known = |this: &Self| lock(&this.0.images).get(wanted).cloned();
        if let Some(image) = known(self) {
            return Ok(image);
        }
        let found = self
            .verify_image(&wanted.name, &Progress::default())
            .await?;
        known(self).ok_or_else(|| HostError::ImageChanged {
            name: wanted.name.clone(),
            wanted: wanted.manifest.hex(),
            found: found.manifest.hex(),
        })
    }

    /// Gives a running instance a newer goal; an older one is ignored. The instance keeps
    /// its guest, and its status has the incarnation once the guest has applied the goal.
    ///
    /// # Errors
    /// No such instance runs here.
    pub async fn apply(&self, spec: InstanceSpec) -> Result<(), HostError> {
        let missing = || HostError::NotFound {
            deployment: spec.deployment().to_owned(),
            name: spec.name().to_owned(),
        };
        let handle = self.deployment(spec.deployment());
        let handle = handle.as_ref().and_then(|it| it.instance(spec.name()));
        let goal = Box::new(spec.goal.clone());
        handle.ok_or_else(missing)?.send(Request::Apply(goal)).await;
        if let Some(found) = lock(&self.0.deployments).get_mut(spec.deployment()) {
            let mut instances = found.handle.instances.iter_mut();
            if let Some(known) = instances.find(|it| it.spec().name() == spec.name()) {
                *known = known.with_goal(spec.goal);
            }
        }
        Ok(())
    }

    /// Waits for every instance of a deployment to end, stops listening, and removes its
    /// files unless they are kept or an instance that was not adopted may use them.
    ///
    /// # Errors
    /// Files could not be removed. The next start removes them.
    pub async fn remove(&self, id: &str) -> Result<(), HostError> {
        let Some(deployment) = self.take_down(id).await else {
            return Ok(());
        };
        if !deployment.whole {
            return Ok(());
        }
        let (files, content) = (Arc::clone(&deployment.files), self.0.content.clone());
        let removed = blocking(move || {
            files.dir.remove()?;
            content.sweep()
        });
        let failed = HostError::removal(deployment.files.dir.path());
        removed.await?.map_err(failed)
    }
}

/// Room for instances that are being created.
#[derive(Debug)]
pub struct Claim {
    state: Arc<HostState>,
    demand: Demand,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claimed = lock(&self.state.claimed);
        *claimed = claimed.minus(self.demand);
    }
}

impl Files {
    fn new(dir: DeploymentDir, content: &ContentStore) -> DropBlocking<Arc<Self>> {
        DropBlocking::new(Arc::new(Self {
            dir,
            _sweep: SweepOnDrop(content.clone()),
        }))
    }
}

impl DeploymentHandle {
    /// 32 hexadecimal digits.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Name of the service.
    pub fn service(&self) -> &str {
        &self.service
    }

    /// Directory with the disks and logs of the instances.
    pub fn directory(&self) -> &std::path::Path {
        &self.directory
    }

    /// The instances, in the order of their specs.
    pub fn instances(&self) -> &[InstanceHandle] {
        &self.instances
    }

    /// The instance called `name`.
    pub fn instance(&self, name: &str) -> Option<&InstanceHandle> {
        self.instances.iter().find(|it| it.spec().name() == name)
    }

    /// Stops every instance cleanly.
    pub async fn stop(&self) {
        for instance in &self.instances {
            instance.send(Request::Stop).await;
        }
    }

    /// Stops every instance now.
    pub async fn kill(&self) {
        for instance in &self.instances {
            instance.send(Request::Kill).await;
        }
    }

    /// Waits until every instance has ended.
    pub async fn ended(&self) {
        for instance in &self.instances {
            instance.ended().await;
        }
    }
}

/// Reports the public endpoints of `specs`.
fn announce(timeline: &Timeline, specs: &[InstanceSpec]) {
    let mut last: Option<&[PublicEndpoint]> = None;
    for spec in specs {
        // Instances of a role follow one another and share their endpoints.
        if last.replace(&spec.endpoints) == Some(&spec.endpoints) {
            continue;
        }
        for endpoint in &spec.endpoints {
            let published = EventKind::EndpointPublished {
                endpoint: endpoint.label.clone(),
                address: endpoint.address,
                local_port: endpoint.local_port,
            };
            timeline.report(None, published);
        }
    }
}

fn socket_path(options: &HostOptions, id: &str) -> PathBuf {
    let name = options.socket.unwrap_or(short_id(id));
    options.runtime_dir.join(format!("{name}.sock"))
}

/// A panic cannot leave a change half made: each is one call.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
