//! Creates a deployment on a host: all of it, or nothing is left.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::task::JoinSet;

use super::super::event::EventKind;
use super::super::guest::{self, GuestError};
use super::super::instance::{InstanceParts, PreparedInstance};
use super::super::spec::{InstanceSpec, PublicEndpoint};
use super::{Deployment, DeploymentHandle, Host, HostError, announce, blocking, lock};
use crate::digest::Digest;
use crate::endpoints::Rotation;
use crate::progress::Progress;
use crate::service::build_application_image;
use crate::service::model::Role;
use crate::store::content::ContentHold;
use crate::store::deployment::{DeploymentDir, Retention};
use crate::store::image::Image;

/// What to create.
#[derive(Debug)]
pub struct NewDeployment {
    /// 32 hexadecimal digits.
    pub id: String,
    /// Name of the service.
    pub service: String,
    /// What happens to its disks and logs at the end.
    pub retention: Retention,
    /// Its instances.
    pub specs: Vec<InstanceSpec>,
}

/// The rotation of each role, by role name.
type Rotations = BTreeMap<String, Rotation>;

impl Host {
    /// Until the hold is dropped, content without users stays.
    pub async fn hold_content(&self) -> Result<Arc<ContentHold>, HostError> {
        let content = self.0.content.clone();
        let hold = blocking(move || content.hold()).await?;
        let failed = HostError::directory("content", &self.0.options.data_dir);
        hold.map(Arc::new).map_err(failed)
    }

    /// Builds the application disk of `role` and adds it to the content.
    pub async fn add_application(
        &self,
        hold: &Arc<ContentHold>,
        role: &Role,
        progress: &Progress,
    ) -> Result<Digest, HostError> {
        let (content, hold) = (self.0.content.clone(), Arc::clone(hold));
        let (role, progress) = (role.clone(), progress.clone());
        blocking(move || {
            let build = |file: &_| {
                build_application_image(&role, file, &progress)
                    .map(drop)
                    .map_err(GuestError::application(&role.definition.name))
            };
            let built = content.add(&hold, build);
            built.map_err(HostError::guest(&format!("{}_IN_0", role.definition.name)))
        })
        .await?
    }

    /// Listens on the public addresses of deployment `id`: a role's name and endpoints
    /// each. Clients that connect before an instance is Ready are closed.
    ///
    /// # Errors
    /// An address is in use or not permitted; none is listened on.
    pub fn publish<'a>(
        &self,
        id: &str,
        roles: impl IntoIterator<Item = (&'a str, &'a [PublicEndpoint])>,
    ) -> Result<Published, HostError> {
        let mut published = Published {
            host: self.clone(),
            deployment: id.to_owned(),
            rotations: Rotations::new(),
            kept: false,
        };
        for (role, endpoints) in roles {
            published.role(role, endpoints)?;
        }
        Ok(published)
    }

    /// Creates a deployment and returns as soon as its instances are starting. `hold`
    /// keeps the content that the specs name.
    ///
    /// # Errors
    /// It could not be created whole; nothing of it is left.
    pub async fn create(
        &self,
        new: NewDeployment,
        published: Published,
        hold: &Arc<ContentHold>,
    ) -> Result<DeploymentHandle, HostError> {
        if lock(&self.0.deployments).contains_key(&new.id) {
            return Err(HostError::Exists(new.id));
        }
        let (data_dir, id, owner, retention) = (
            self.0.options.data_dir.clone(),
            new.id.clone(),
            self.0.id.clone(),
            new.retention,
        );
        let dir = blocking(move || DeploymentDir::create(&data_dir, &id, &owner, retention))
            .await?
            .map_err(HostError::directory(
                "a deployment",
                &self.0.options.data_dir,
            ))?;
        let dir = Arc::new(dir);
        let prepared = self.prepare_all(&new, &dir, hold, &published).await;
        // The blocking steps have returned, and with them the other references.
        let dir = Arc::into_inner(dir);
        let dir = dir.ok_or_else(|| HostError::Internal("a disk is still being made".into()))?;
        let prepared = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                // The error that is reported is the first one.
                let _ = blocking(move || dir.remove()).await;
                return Err(error);
            }
        };
        Ok(self.start(new, dir, prepared, published))
    }

    async fn prepare_all(
        &self,
        new: &NewDeployment,
        dir: &Arc<DeploymentDir>,
        hold: &Arc<ContentHold>,
        published: &Published,
    ) -> Result<Vec<PreparedInstance>, HostError> {
        let timeline = self.0.timeline.of(&new.id);
        let mut prepared = Vec::new();
        for spec in &new.specs {
            let image = self.image(&spec.image).await?;
            let path = self.make_disks(spec, &image, dir, hold).await?;
            timeline.report(Some(spec.name()), EventKind::DisksReady { kept: false });
            let rotation = published.rotation(spec.role());
            let mut parts = self.parts(spec.clone(), image, path, rotation);
            parts.durable = new.retention == Retention::Durable;
            prepared.push(self.prepare(parts).await?);
        }
        Ok(prepared)
    }

    async fn make_disks(
        &self,
        spec: &InstanceSpec,
        image: &Arc<Image>,
        dir: &Arc<DeploymentDir>,
        hold: &Arc<ContentHold>,
    ) -> Result<PathBuf, HostError> {
        let (content, hold) = (self.0.content.clone(), Arc::clone(hold));
        let (spec, image, dir) = (spec.clone(), Arc::clone(image), Arc::clone(dir));
        blocking(move || {
            let path = dir
                .instance(spec.name())
                .map_err(HostError::directory("an instance", dir.path()))?;
            guest::create_disks(&path, &spec, &image, &content, &hold)
                .map_err(HostError::guest(spec.name()))?;
            Ok(path)
        })
        .await?
    }

    pub(super) async fn prepare(
        &self,
        parts: InstanceParts,
    ) -> Result<PreparedInstance, HostError> {
        let path = parts.dir.clone();
        let prepared = blocking(move || PreparedInstance::new(parts)).await?;
        prepared.map_err(HostError::directory("logs", &path))
    }

    pub(super) fn parts(
        &self,
        spec: InstanceSpec,
        image: Arc<Image>,
        dir: PathBuf,
        rotation: Rotation,
    ) -> InstanceParts {
        let options = &self.0.options;
        InstanceParts {
            timeline: self.0.timeline.of(spec.deployment()),
            spec,
            image,
            dir,
            rule: options.rule,
            limits: options.limits(),
            group: self.0.group.clone(),
            hello_limit: options.scaled(10),
            dial_limit: options.scaled(2),
            probe_limit: options.scaled(3),
            ping_every: options.scaled(10),
            rotation,
            durable: false,
        }
    }

    /// Starts what is prepared; nothing can fail from here on.
    pub(super) fn start(
        &self,
        new: NewDeployment,
        dir: DeploymentDir,
        prepared: Vec<PreparedInstance>,
        published: Published,
    ) -> DeploymentHandle {
        let mut tasks = JoinSet::new();
        let mut instances = Vec::new();
        for instance in prepared {
            let (handle, task) = instance.start();
            tasks.spawn(task);
            instances.push(handle);
        }
        published.keep();
        announce(&self.0.timeline.of(&new.id), &new.specs);
        let handle = DeploymentHandle {
            id: new.id.clone(),
            service: new.service,
            directory: dir.path().to_owned(),
            instances,
        };
        let deployment = Deployment {
            handle: handle.clone(),
            dir,
            tasks,
        };
        lock(&self.0.deployments).insert(new.id, deployment);
        handle
    }
}

/// The listeners of a deployment that is being created; dropping it closes them.
#[derive(Debug)]
pub struct Published {
    host: Host,
    deployment: String,
    rotations: Rotations,
    kept: bool,
}

impl Published {
    fn role(&mut self, role: &str, endpoints: &[PublicEndpoint]) -> Result<(), HostError> {
        if self.rotations.contains_key(role) {
            return Ok(());
        }
        let rotation = Rotation::default();
        let mut listeners = lock(&self.host.0.listeners);
        for endpoint in endpoints {
            listeners
                .add(
                    &self.deployment,
                    &endpoint.label,
                    endpoint.address,
                    rotation.clone(),
                    endpoint.local_port,
                )
                .map_err(|source| HostError::Listen {
                    role: role.to_owned(),
                    name: endpoint.name.clone(),
                    source,
                })?;
        }
        drop(listeners);
        self.rotations.insert(role.to_owned(), rotation);
        Ok(())
    }

    /// The rotation of `role`.
    pub(super) fn rotation(&self, role: &str) -> Rotation {
        self.rotations.get(role).cloned().unwrap_or_default()
    }

    fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        if !self.kept {
            lock(&self.host.0.listeners).remove(&self.deployment);
        }
    }
}
