//! Creates a deployment on a host: all of it, or nothing is left.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::super::event::EventKind;
use super::super::guest::{self, GuestError};
use super::super::instance::record::InstanceRecord;
use super::super::instance::{InstanceParts, PreparedInstance};
use super::super::lifecycle::RestartHistory;
use super::super::spec::InstanceSpec;
use super::published::{Published, RoleEndpoints};
use super::{Deployment, DeploymentHandle, Files, Host, HostError, announce, lock};
use crate::blocking::{DropBlocking, blocking};
use crate::digest::Digest;
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

/// Keeps content that no deployment uses yet; dropped on a blocking thread.
pub type HeldContent = DropBlocking<Arc<ContentHold>>;

impl Host {
    /// Keeps content without users until the hold is dropped.
    pub async fn hold_content(&self) -> Result<HeldContent, HostError> {
        let content = self.0.content.clone();
        let hold = blocking(move || content.hold()).await?;
        let failed = HostError::directory("lock the content in", &self.0.options.data_dir);
        let hold = hold.map_err(failed)?;
        Ok(DropBlocking::new(Arc::new(hold)))
    }

    /// Builds the application disk of `role` and adds it to the content.
    pub async fn add_application(
        &self,
        hold: &HeldContent,
        role: &Role,
        progress: &Progress,
    ) -> Result<Digest, HostError> {
        let (content, hold) = (self.0.content.clone(), Arc::clone(hold));
        let (role, progress) = (role.clone(), progress.clone());
        blocking(move || {
            let build = |file: &_| {
                build_application_image(&role, file, &progress)
                    .map(drop)
                    .map_err(GuestError::application(
                        &role.definition.name,
                        content.directory(),
                    ))
            };
            content.add(&hold, build).map_err(HostError::Application)
        })
        .await?
    }

    /// Creates a deployment and returns as soon as its instances are starting. `hold`
    /// keeps the content that the specs name.
    ///
    /// # Errors
    /// An instance could not be created. Nothing of the deployment is left, also if the
    /// future is dropped.
    pub async fn create(
        &self,
        new: NewDeployment,
        mut published: Published,
        hold: &HeldContent,
    ) -> Result<DeploymentHandle, HostError> {
        if lock(&self.0.deployments).contains_key(&new.id) {
            return Err(HostError::Exists(new.id));
        }
        let data_dir = self.0.options.data_dir.clone();
        let failed = HostError::directory("make a deployment in", &data_dir);
        let (id, owner) = (new.id.clone(), self.0.id.clone());
        let created = blocking(move || DeploymentDir::create(&data_dir, &id, &owner)).await?;
        let files = Files::new(created.map_err(failed)?, &self.0.content);
        match self.prepare_all(&new, &files, hold, &published).await {
            Ok(prepared) => {
                published.serve(&self.0.timeline.of(&new.id), Duration::ZERO);
                Ok(self.start(new, files, prepared, published, true))
            }
            Err(error) => {
                published.close().await;
                let files = Arc::clone(&files);
                // The error that is reported is the first one.
                let _ = blocking(move || files.dir.remove()).await;
                Err(error)
            }
        }
    }

    async fn prepare_all(
        &self,
        new: &NewDeployment,
        files: &Arc<Files>,
        hold: &HeldContent,
        published: &Published,
    ) -> Result<Vec<PreparedInstance>, HostError> {
        let timeline = self.0.timeline.of(&new.id);
        let durable = new.retention == Retention::Durable;
        let mut prepared = Vec::new();
        for spec in &new.specs {
            let image = self.image(&spec.image).await?;
            let path = self.make_files(spec, &image, files, hold, durable).await?;
            timeline.report(Some(spec.name()), EventKind::DisksReady { kept: false });
            let endpoints = published.of_role(spec.role());
            let mut parts = self.parts(spec.clone(), image, path, endpoints);
            parts.durable = durable;
            prepared.push(self.prepare(parts).await?);
        }
        let failed = HostError::directory("keep", files.dir.path());
        let (files, retention) = (Arc::clone(files), new.retention);
        blocking(move || files.dir.retain(retention))
            .await?
            .map_err(failed)?;
        Ok(prepared)
    }

    /// Makes the disks of an instance, and its record if it is durable: a deployment that
    /// can be adopted has all records.
    pub(super) async fn make_files(
        &self,
        spec: &InstanceSpec,
        image: &Arc<Image>,
        files: &Arc<Files>,
        hold: &HeldContent,
        durable: bool,
    ) -> Result<PathBuf, HostError> {
        let (content, hold) = (self.0.content.clone(), Arc::clone(hold));
        let (spec, image, files) = (spec.clone(), Arc::clone(image), Arc::clone(files));
        blocking(move || {
            let dir = &files.dir;
            let path = dir
                .instance(spec.name())
                .map_err(HostError::directory("make an instance in", dir.path()))?;
            guest::create_disks(&path, &spec, &image, &content, &hold)
                .map_err(HostError::guest(spec.name()))?;
            if durable {
                let record = InstanceRecord {
                    spec,
                    history: RestartHistory::default(),
                    process: None,
                };
                let written = record.write(&path);
                written.map_err(HostError::directory("write a record to", &path))?;
            }
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
        prepared.map_err(HostError::directory("open the logs in", &path))
    }

    pub(super) fn parts(
        &self,
        spec: InstanceSpec,
        image: Arc<Image>,
        dir: PathBuf,
        endpoints: RoleEndpoints,
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
            prepare_limit: options.scaled(30),
            rotation: endpoints.rotation,
            listeners: endpoints.listeners,
            offers: self.0.offers.subscribe(),
            durable: false,
            require_sandbox: options.require_sandbox,
        }
    }

    /// Starts the prepared instances, which cannot fail. `whole` if they are all that the
    /// directory has.
    pub(super) fn start(
        &self,
        new: NewDeployment,
        files: DropBlocking<Arc<Files>>,
        prepared: Vec<PreparedInstance>,
        published: Published,
        whole: bool,
    ) -> DeploymentHandle {
        let mut tasks = JoinSet::new();
        let mut instances = Vec::new();
        for instance in prepared {
            let (handle, task) = instance.start();
            tasks.spawn(task);
            instances.push(handle);
        }
        announce(&self.0.timeline.of(&new.id), &new.specs);
        let handle = DeploymentHandle {
            id: new.id.clone(),
            service: new.service,
            directory: files.dir.path().to_owned(),
            instances,
        };
        let deployment = Deployment {
            handle: handle.clone(),
            published,
            tasks,
            files,
            whole,
        };
        lock(&self.0.deployments).insert(new.id, deployment);
        handle
    }
}
