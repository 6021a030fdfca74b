//! A deployment: one service with one configuration, running.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::{JoinHandle, JoinSet};
use vmbus::text::chain;

use super::event::EventKind;
use super::goal::{goal, instance_name};
use super::guest::{self, GuestError};
use super::heartbeat::HeartbeatRule;
use super::instance::{self, InstanceHandle, InstanceParts, Request};
use super::lifecycle::Limits;
use super::timeline::Timeline;
use crate::cgroup::{self, DeploymentGroup};
use crate::endpoints::{self, ListenError, Rotation};
use crate::progress::Progress;
use crate::service::Place;
use crate::service::model::ServiceModel;
use crate::store::deployment::{DeploymentDir, short_id, sweep};
use crate::store::image::{self, ImageError};
use crate::store::janitor::{self, Janitor};
use crate::store::paths;

/// How a deployment is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where images and deployments live.
    pub data_dir: PathBuf,
    /// Heartbeat rule.
    pub rule: HeartbeatRule,
    /// Factor on every limit that depends on the speed of this machine.
    pub timeout_scale: f64,
    /// Keep disks and logs when the deployment ends.
    pub keep: bool,
    /// Address on which endpoints are published.
    pub address: IpAddr,
}

impl Options {
    /// Defaults: endpoints on loopback, nothing kept, the 600 s rule.
    pub fn new(data_dir: PathBuf) -> Self {
        Self {
            data_dir,
            rule: HeartbeatRule::DEFAULT,
            timeout_scale: 1.0,
            keep: false,
            address: Ipv4Addr::LOCALHOST.into(),
        }
    }
}

/// Why a deployment cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum DeployError {
    /// The guest image.
    #[error("guest image")]
    Image {
        /// Where the service names it.
        place: Place,
        /// Why.
        source: ImageError,
    },
    /// A public port.
    #[error("public endpoint")]
    Listen {
        /// Where the service asks for it.
        place: Place,
        /// Why.
        source: ListenError,
    },
    /// Disks or logs of an instance.
    #[error("instance {instance}")]
    Guest {
        /// The instance.
        instance: String,
        /// Why.
        #[source]
        source: GuestError,
    },
    /// The deployment's directory.
    #[error("cannot make {what} in {}", path.display())]
    Directory {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A blocking step panicked.
    #[error("internal: {0}")]
    Internal(String),
}

/// Public addresses by the names of role and endpoint: two roles may each have
/// an endpoint of one name.
pub type Published = BTreeMap<(String, String), SocketAddr>;

/// A running deployment. Its disks go when it is dropped, unless kept.
#[derive(Debug)]
pub struct Deployment {
    instances: Vec<InstanceHandle>,
    tasks: Vec<JoinHandle<()>>,
    // Ends when it is dropped.
    _listeners: JoinSet<()>,
    published: Published,
    dir: DeploymentDir,
    _janitor: Janitor,
}

/// A handle for stopping and asking while the events are being read.
#[derive(Debug, Clone)]
pub struct DeploymentHandle {
    id: String,
    instances: Vec<InstanceHandle>,
}

/// Deploys a service and returns as soon as its instances are starting. Tells
/// `timeline` of what is done, and `progress` of what takes long.
pub async fn deploy(
    model: ServiceModel,
    options: Options,
    timeline: Timeline,
    progress: Progress,
) -> Result<Deployment, DeployError> {
    let mut listeners = JoinSet::new();
    let mut published = Published::new();
    let mut rotations = Vec::new();
    for role in &model.roles {
        let rotation = Rotation::default();
        for (endpoint, public) in role.endpoints() {
            let address = SocketAddr::new(options.address, public.port);
            let listener = endpoints::listen(&model.endpoint_name(role, endpoint), address)
                .map_err(|source| DeployError::Listen {
                    place: public.place.clone(),
                    source,
                })?;
            // From here on clients can connect: one that comes before there is
            // an instance is closed, not left to wait.
            let (rotation, port) = (rotation.clone(), endpoint.local_port);
            listeners.spawn(endpoints::serve(listener, rotation, port));
            let name = (role.definition.name.clone(), endpoint.name.clone());
            published.insert(name, address);
        }
        rotations.push(rotation);
    }

    let data_dir = options.data_dir.clone();
    let name = model.image.clone();
    let checking = progress.clone();
    let (swept, image) = blocking(move || {
        // Remains of a command that was killed.
        let swept = sweep(&data_dir);
        (swept, image::open(&data_dir, &name, &checking))
    })
    .await?;
    if let Err(error) = swept {
        // No reason not to run.
        let text = chain(&error);
        timeline.tell(None, EventKind::Warning { text });
    }
    let image = Arc::new(image.map_err(|source| DeployError::Image {
        place: model.image_place.clone(),
        source,
    })?);
    timeline.tell(
        None,
        EventKind::ImageVerified {
            image: model.image.clone(),
            cached: image.cached,
        },
    );
    let directory = |what, path: &Path| {
        let path = path.to_owned();
        move |source| DeployError::Directory { what, path, source }
    };
    let dir = DeploymentDir::create(&options.data_dir, options.keep)
        .map_err(directory("a deployment", &options.data_dir))?;
    let group = limit_guests(dir.path(), &timeline).map(Arc::new);
    let of_guests = group.as_ref().map(|group| group.path());
    let janitor = janitor::start(dir.path(), &paths::runtime_dir(), of_guests)
        .map_err(directory("a janitor", dir.path()))?;
    let scaled = |seconds: u64| Duration::from_secs(seconds).mul_f64(options.timeout_scale);
    let limits = Limits {
        role_stop: scaled(30),
        power_off: scaled(10),
        begin: scaled(3),
        condemned: scaled(30),
        vmm_stop: scaled(2),
        death: scaled(10),
    };
    let mut prepared = Vec::new();
    for (role, rotation) in model.roles.iter().zip(rotations) {
        let mut first: Option<PathBuf> = None;
        for number in 0..role.instances {
            let name = instance_name(role, number);
            let path = dir
                .instance(&name)
                .map_err(directory("an instance", dir.path()))?;
            let (for_disks, disk_role, disk_image, building) = (
                path.clone(),
                role.clone(),
                Arc::clone(&image),
                progress.clone(),
            );
            let sibling = first.clone();
            first.get_or_insert_with(|| path.clone());
            blocking(move || {
                let sibling = sibling.as_deref();
                guest::create_disks(&for_disks, &disk_role, &disk_image, sibling, &building)
            })
            .await?
            .map_err(|source| DeployError::Guest {
                instance: name.clone(),
                source,
            })?;
            timeline.tell(Some(&name), EventKind::DisksReady { kept: false });
            let stop_ms = u64::try_from(limits.role_stop.as_millis()).unwrap_or(u64::MAX);
            prepared.push(InstanceParts {
                goal: goal(role, number, dir.id(), 1, stop_ms),
                name,
                role: role.clone(),
                image: Arc::clone(&image),
                dir: path,
                rule: options.rule,
                limits,
                group: group.clone(),
                hello_limit: scaled(10),
                dial_limit: scaled(2),
                probe_limit: scaled(3),
                ping_every: scaled(10),
                rotation: rotation.clone(),
                timeline: timeline.clone(),
            });
        }
    }
    let mut instances = Vec::new();
    let mut tasks = Vec::new();
    for parts in prepared {
        let path = parts.dir.clone();
        let (handle, task) = instance::start(parts).map_err(directory("logs", &path))?;
        instances.push(handle);
        tasks.push(task);
    }
    for (role, endpoint, public) in model.endpoints() {
        timeline.tell(
            None,
            EventKind::EndpointPublished {
                endpoint: model.endpoint_name(role, endpoint),
                address: SocketAddr::new(options.address, public.port),
                local_port: endpoint.local_port,
            },
        );
    }
    Ok(Deployment {
        instances,
        tasks,
        _listeners: listeners,
        published,
        dir,
        _janitor: janitor,
    })
}

/// The cgroup in which the guests' processes get theirs. Without one a service
/// runs all the same, and that is said once.
fn limit_guests(dir: &Path, timeline: &Timeline) -> Option<DeploymentGroup> {
    let made = cgroup::find_parent()
        .map_err(|why| why.to_string())
        .and_then(|place| {
            DeploymentGroup::create(&place, &short_id(dir)).map_err(|error| chain(&error))
        });
    made.inspect_err(|why| {
        let text = format!("memory limit of guests is not enforced: {why}");
        timeline.tell(None, EventKind::Warning { text });
    })
    .ok()
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, DeployError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| DeployError::Internal(error.to_string()))
}

impl Deployment {
    /// 32 hexadecimal digits.
    pub fn id(&self) -> &str {
        self.dir.id()
    }

    /// Directory with the disks and logs of the instances.
    pub fn directory(&self) -> &Path {
        self.dir.path()
    }

    /// Public address of each endpoint.
    pub const fn published(&self) -> &Published {
        &self.published
    }

    /// A handle that can be used while events are read.
    pub fn handle(&self) -> DeploymentHandle {
        DeploymentHandle {
            id: self.dir.id().to_owned(),
            instances: self.instances.clone(),
        }
    }

    /// Waits for every instance to end and stops listening.
    pub async fn finished(mut self) {
        for task in self.tasks.drain(..) {
            let _ = task.await;
        }
    }
}

impl Drop for Deployment {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl DeploymentHandle {
    /// 32 hexadecimal digits.
    pub fn id(&self) -> &str {
        &self.id
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

    /// The instances.
    pub fn instances(&self) -> &[InstanceHandle] {
        &self.instances
    }

    /// The instance called `name`.
    pub fn instance(&self, name: &str) -> Option<&InstanceHandle> {
        self.instances.iter().find(|instance| instance.name == name)
    }
}
