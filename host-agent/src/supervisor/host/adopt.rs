//! Takes over the durable deployments of a host agent that is gone.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use tokio::task::JoinSet;
use vmbus::text::chain;

use super::super::event::EventKind;
use super::super::instance::PreparedInstance;
use super::super::instance::record::InstanceRecord;
use super::super::process::{AttachError, Expected, VmmProcess};
use super::create::NewDeployment;
use super::published::{Published, RoleEndpoints};
use super::{DeploymentHandle, Files, Host, HostError};
use crate::blocking::blocking;
use crate::endpoints::HandedOver;
use crate::store::deployment::{DeploymentDir, Retention, durable};

/// Directory and record of an instance.
type Recorded = (PathBuf, io::Result<InstanceRecord>);
/// An instance that is adopted, and what its VMM process held if it runs.
type Adopted = (InstanceRecord, PreparedInstance, Option<HandedOver>);

/// Time for an adopted guest to be in rotation again, in seconds: its agents dial their
/// channels anew, or it boots. Clients that have connected meanwhile wait for that.
const PATIENCE: u64 = 30;

impl Host {
    /// Adopts every durable deployment that no host agent owns and whose id is `wanted`:
    /// attaches to the VMM processes that run, takes over the listening sockets that these
    /// held, listens on the other public addresses, and restarts the guests that ended meanwhile. What cannot be adopted is reported and left as it is.
    ///
    /// # Errors
    /// The deployments cannot be listed.
    pub async fn adopt(
        &self,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Vec<DeploymentHandle>, HostError> {
        let data_dir = self.0.options.data_dir.clone();
        let failed = HostError::directory("list the deployments in", &data_dir);
        let found = blocking(move || durable(&data_dir)).await?;
        let mut found = found.map_err(failed)?;
        found.retain(|path| {
            path.file_name()
                .and_then(OsStr::to_str)
                .is_some_and(&wanted)
        });
        let adopting = found.into_iter().map(|path| {
            let this = self.clone();
            async move {
                let result = this.adopt_deployment(&path).await;
                (path, result)
            }
        });
        let mut adopted = Vec::new();
        for (path, result) in at_once(adopting).await {
            match result {
                Ok(handle) => adopted.extend(handle),
                Err(error) => {
                    let id = path.file_name().unwrap_or_default().to_string_lossy();
                    self.report_not_adopted(&id, None, "deployment ", &error);
                }
            }
        }
        Ok(adopted)
    }

    /// `None` if another host agent owns the deployment.
    async fn adopt_deployment(&self, path: &Path) -> Result<Option<DeploymentHandle>, HostError> {
        let failed = HostError::directory("read", path);
        let of_adopt = path.to_owned();
        let found = blocking(move || {
            let Some(dir) = DeploymentDir::adopt(&of_adopt)? else {
                return Ok(None);
            };
            let instances = dir.instances()?.into_iter();
            let recorded: Vec<Recorded> = instances
                .map(|path| (path.clone(), InstanceRecord::read(&path)))
                .collect();
            Ok(Some((dir, recorded)))
        });
        let Some((dir, recorded)) = found.await?.map_err(failed)? else {
            return Ok(None);
        };
        let files = Files::new(dir, &self.0.content);
        let records = recorded
            .iter()
            .filter_map(|(_, record)| record.as_ref().ok());
        let endpoints = records.map(|record| (record.spec.role(), &record.spec.endpoints[..]));
        let mut published = Published::of(endpoints);
        let mut new = NewDeployment {
            service: String::new(),
            id: files.dir.id().to_owned(),
            retention: Retention::Durable,
            specs: Vec::new(),
        };
        let count = recorded.len();
        let adopting = recorded.into_iter().map(|(path, record)| {
            let role = record.as_ref().map_or("", |record| record.spec.role());
            let (this, endpoints) = (self.clone(), published.of_role(role));
            async move {
                let result = this.adopt_instance(&path, record, endpoints).await;
                (path, result)
            }
        });
        let mut prepared = Vec::new();
        for (path, result) in at_once(adopting).await {
            match result {
                Ok((record, instance, handed_over)) => {
                    if let Some(handed_over) = handed_over {
                        let foreign = published.take_over(record.spec.role(), handed_over);
                        self.report_foreign(&record, foreign);
                    }
                    new.service.clone_from(&record.spec.service);
                    new.specs.push(record.spec);
                    prepared.push(instance);
                }
                Err(error) => {
                    let name = path.file_name().unwrap_or_default().to_string_lossy();
                    self.report_not_adopted(&new.id, Some(&name), "", &*error);
                }
            }
        }
        if prepared.is_empty() {
            return Ok(None);
        }
        // After every VMM process has given what it held: else an address is in use.
        let patience = self.0.options.scaled(PATIENCE);
        published.serve(&self.0.timeline.of(&new.id), patience);
        let whole = prepared.len() == count;
        Ok(Some(self.start(new, files, prepared, published, whole)))
    }

    async fn adopt_instance(
        &self,
        dir: &Path,
        record: io::Result<InstanceRecord>,
        endpoints: RoleEndpoints,
    ) -> Result<Adopted, Box<dyn std::error::Error + Send + Sync>> {
        let record = record?;
        let image = self.image(&record.spec.image).await?;
        let expected = Expected {
            name: record.spec.name().to_owned(),
            generation: record.history.generation,
            process: record.process,
        };
        let mut parts = self.parts(record.spec.clone(), image, dir.to_owned(), endpoints);
        parts.durable = true;
        let instance = self.prepare(parts).await?;
        let history = record.history.clone();
        if !history.running {
            return Ok((record, instance.restored(history), None));
        }
        let mut held = None;
        let instance = match VmmProcess::attach(dir, &expected).await {
            Ok((process, attached, handed_over)) => {
                held = Some(handed_over);
                blocking(move || instance.attached(history, process, attached)).await?
            }
            Err(AttachError::Gone { exit }) => instance.ended(history, exit),
            // Recorded before it was started.
            Err(AttachError::NoSocket(_)) if record.process.is_none() => {
                instance.ended(history, None)
            }
            Err(error) => return Err(error.into()),
        };
        Ok((record, instance, held))
    }

    fn report_foreign(&self, record: &InstanceRecord, count: usize) {
        if count > 0 {
            let timeline = self.0.timeline.of(record.spec.deployment());
            let text = format!(
                "the VMM process handed over {count} descriptors that do not listen on an \
                 endpoint of its role"
            );
            timeline.report(Some(record.spec.name()), EventKind::Warning { text });
        }
    }

    fn report_not_adopted(
        &self,
        deployment: &str,
        instance: Option<&str>,
        what: &str,
        error: &(dyn std::error::Error + 'static),
    ) {
        let text = format!("{what}not adopted: {}", chain(error));
        let timeline = self.0.timeline.of(deployment);
        timeline.report(instance, EventKind::Warning { text });
    }
}

/// Does all of `work` at the same time, since each part may wait seconds for a VMM process.
/// The results are in the order of the parts.
async fn at_once<T, F>(work: impl IntoIterator<Item = F>) -> Vec<T>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let mut tasks = JoinSet::new();
    for (number, part) in work.into_iter().enumerate() {
        tasks.spawn(async move { (number, part.await) });
    }
    let mut results = tasks.join_all().await;
    results.sort_by_key(|(number, _)| *number);
    results.into_iter().map(|(_, result)| result).collect()
}
