//! Takes over the durable deployments of a host agent that is gone.

use std::path::PathBuf;

use vmbus::text::chain;

use super::super::event::EventKind;
use super::super::instance::PreparedInstance;
use super::super::instance::record::InstanceRecord;
use super::super::process::{AttachError, Expected, VmmProcess};
use super::create::{NewDeployment, Published};
use super::{DeploymentHandle, Host, HostError, blocking};
use crate::store::deployment::{DeploymentDir, Retention, take_durable};

/// An instance as it was found on disk.
struct RecordedInstance {
    record: InstanceRecord,
    dir: PathBuf,
}

impl Host {
    /// Adopts every durable deployment that no host agent owns: attaches to the VMM
    /// processes that run, publishes the endpoints, and restarts the guests that ended
    /// meanwhile. An instance that cannot be adopted is reported and left as it is.
    ///
    /// # Errors
    /// The deployments cannot be listed.
    pub async fn adopt(&self) -> Result<Vec<DeploymentHandle>, HostError> {
        let (data_dir, owner) = (self.0.options.data_dir.clone(), self.0.id.clone());
        let taken = blocking(move || take_durable(&data_dir, &owner))
            .await?
            .map_err(HostError::directory(
                "a list of deployments",
                &self.0.options.data_dir,
            ))?;
        let mut adopted = Vec::new();
        for dir in taken {
            let id = dir.id().to_owned();
            match self.adopt_deployment(dir).await {
                Ok(handle) => adopted.push(handle),
                Err(error) => {
                    let text = format!("deployment not adopted: {}", chain(&error));
                    let timeline = self.0.timeline.of(&id);
                    timeline.report(None, EventKind::Warning { text });
                }
            }
        }
        Ok(adopted)
    }

    async fn adopt_deployment(&self, dir: DeploymentDir) -> Result<DeploymentHandle, HostError> {
        let id = dir.id().to_owned();
        let path = dir.path().to_owned();
        let (dir, found) = blocking(move || {
            let found = find_instances(&dir);
            (dir, found)
        })
        .await?;
        let found = found.map_err(HostError::directory("a list of instances", &path))?;
        let endpoints = found.iter().map(|found| {
            let spec = &found.record.spec;
            (spec.role(), &spec.endpoints[..])
        });
        let published = self.publish(&id, endpoints)?;
        let mut new = NewDeployment {
            service: String::new(),
            id,
            retention: Retention::Durable,
            specs: Vec::new(),
        };
        let mut prepared = Vec::new();
        for found in found {
            let name = found.record.spec.name().to_owned();
            new.service.clone_from(&found.record.spec.service);
            let spec = found.record.spec.clone();
            match self.adopt_instance(found, &published).await {
                Ok(instance) => {
                    prepared.push(instance);
                    new.specs.push(spec);
                }
                Err(error) => {
                    let text = format!("not adopted: {}", chain(&*error));
                    let timeline = self.0.timeline.of(&new.id);
                    timeline.report(Some(&name), EventKind::Warning { text });
                }
            }
        }
        Ok(self.start(new, dir, prepared, published))
    }

    async fn adopt_instance(
        &self,
        found: RecordedInstance,
        published: &Published,
    ) -> Result<PreparedInstance, Box<dyn std::error::Error + Send + Sync>> {
        let RecordedInstance { record, dir } = found;
        let image = self.image(&record.spec.image).await?;
        let rotation = published.rotation(record.spec.role());
        let expected = Expected {
            name: record.spec.name().to_owned(),
            generation: record.history.generation,
            process: record.process,
        };
        let mut parts = self.parts(record.spec, image, dir.clone(), rotation);
        parts.durable = true;
        let instance = self.prepare(parts).await?;
        if !record.history.running {
            return Ok(instance.restored(record.history));
        }
        match VmmProcess::attach(&dir, &expected).await {
            Ok((process, attached)) => {
                let history = record.history;
                Ok(blocking(move || instance.attached(history, process, attached)).await?)
            }
            Err(AttachError::Gone { exit }) => Ok(instance.ended(record.history, exit)),
            // Recorded before it was started.
            Err(AttachError::NoSocket(_)) if record.process.is_none() => {
                Ok(instance.ended(record.history, None))
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn find_instances(dir: &DeploymentDir) -> std::io::Result<Vec<RecordedInstance>> {
    let mut found = Vec::new();
    for name in dir.instances()? {
        let path = dir.instance(&name)?;
        let record = InstanceRecord::read(&path)?;
        found.push(RecordedInstance { record, dir: path });
    }
    Ok(found)
}
