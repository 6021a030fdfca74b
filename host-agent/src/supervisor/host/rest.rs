//! Deployments whose guests do not run: their files stay until they are adopted or removed.

use std::ffi::OsStr;
use std::sync::Arc;

use super::super::instance::record::InstanceRecord;
use super::{Deployment, Files, Host, HostError, lock};
use crate::blocking::{DropBlocking, blocking};
use crate::store::deployment::{DeploymentDir, directory};

impl Host {
    /// Waits for every instance of a deployment to end and stops listening. Its files stay,
    /// for [`Host::adopt`] or [`Host::discard`].
    pub async fn release(&self, id: &str) {
        if let Some(deployment) = self.take_down(id).await {
            let files = deployment.files.into_inner();
            // Waited for, because the next adoption needs the lock. A panic releases it too.
            let _ = blocking(move || drop(files)).await;
        }
    }

    /// Takes the deployment out of this host when its instances have ended.
    pub(super) async fn take_down(&self, id: &str) -> Option<DownDeployment> {
        let mut deployment = lock(&self.0.deployments).remove(id)?;
        while deployment.tasks.join_next().await.is_some() {}
        deployment.published.close().await;
        lock(&self.0.images).retain(|_, image| Arc::strong_count(image) > 1);
        let Deployment { files, whole, .. } = deployment;
        Some(DownDeployment { files, whole })
    }

    /// Whether a guest may run of a deployment that this host has not adopted, by the records
    /// of its instances. One that cannot be read says nothing, so its guest may run.
    ///
    /// # Errors
    /// The deployment's directory cannot be read.
    pub async fn may_run(&self, id: &str) -> Result<bool, HostError> {
        let path = directory(&self.0.options.data_dir, id);
        let failed = HostError::directory("read", &path);
        let found = blocking(move || {
            let entries = std::fs::read_dir(&path)?.collect::<Result<Vec<_>, _>>()?;
            let mut instances = entries.into_iter().map(|it| it.path());
            Ok(instances.any(|path| {
                let plain = path.file_name().and_then(OsStr::to_str);
                let is_instance = path.is_dir() && plain.is_some_and(|it| !it.starts_with('.'));
                is_instance
                    && InstanceRecord::read(&path).map_or(true, |record| record.history.running)
            }))
        });
        found.await?.map_err(failed)
    }

    /// Removes the files of a deployment that no host agent has and of which no guest runs.
    ///
    /// # Errors
    /// Files could not be removed, or another host agent has the deployment.
    pub async fn discard(&self, id: &str) -> Result<(), HostError> {
        let path = directory(&self.0.options.data_dir, id);
        let (failed, content) = (HostError::removal(&path), self.0.content.clone());
        let removed = blocking(move || match DeploymentDir::adopt(&path)? {
            Some(dir) => dir.remove().and_then(|()| content.sweep()).map(|()| None),
            None if path.exists() => Ok(Some(path)),
            None => Ok(None),
        });
        match removed.await?.map_err(failed)? {
            Some(path) => Err(HostError::NotAdopted { path }),
            None => Ok(()),
        }
    }
}

/// A deployment whose instances have ended and whose endpoints are closed.
#[derive(Debug)]
pub(super) struct DownDeployment {
    pub(super) files: DropBlocking<Arc<Files>>,
    /// As in [`Deployment`].
    pub(super) whole: bool,
}
