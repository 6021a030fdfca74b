//! Changes the instances of a deployment that runs: takes one to another spec, adds one,
//! removes one.

use std::path::PathBuf;
use std::sync::Arc;

use super::super::event::EventKind;
use super::super::guest;
use super::super::instance::Request;
use super::super::instance::record::InstanceRecord;
use super::super::lifecycle::RestartHistory;
use super::super::spec::InstanceSpec;
use super::create::HeldContent;
use super::{Files, Host, HostError, lock};
use crate::blocking::blocking;
use crate::store::image::Image;

impl Host {
    /// Takes an instance out of the rotation of its endpoints before it is changed: the
    /// connections that it has go on. It is back when its guest reports Ready anew.
    pub async fn drain(&self, deployment: &str, name: &str) {
        let handle = self.deployment(deployment);
        if let Some(handle) = handle.as_ref().and_then(|found| found.instance(name)) {
            handle.send(Request::Drain).await;
        }
    }

    /// Takes an instance to `spec`: one that runs is stopped cleanly, then it boots with the
    /// new application disk and keeps OS disk, local storage and logs (role model, section
    /// 3.4, row "in-place upgrade") if these fit the spec; else it is made anew, as one that
    /// does not exist. `hold` keeps the content that the spec names. Dropping the future may leave the instance stopped, until it is
    /// called again or the deployment is adopted.
    ///
    /// # Errors
    /// The deployment does not run here, the host has no room, or files cannot be made. The
    /// instance does not run then.
    pub async fn place(&self, spec: InstanceSpec, hold: &HeldContent) -> Result<(), HostError> {
        let (id, name) = (spec.deployment().to_owned(), spec.name().to_owned());
        self.take_out(&id, &name).await;
        let _claim = self.claim(std::slice::from_ref(&spec.size))?;
        let gone = || HostError::NotFound {
            deployment: id.clone(),
            name: name.clone(),
        };
        let (files, endpoints) = {
            let deployments = lock(&self.0.deployments);
            let found = deployments.get(&id).ok_or_else(gone)?;
            let files = Arc::clone(&found.files);
            (files, found.published.of_role(spec.role()))
        };
        let image = self.image(&spec.image).await?;
        let kept = self.swap(&spec, &files, hold).await?;
        let is_kept = kept.is_some();
        let (path, history) = match kept {
            Some(kept) => kept,
            None => {
                let path = self.make_anew(&spec, &image, &files, hold).await?;
                (path, RestartHistory::default())
            }
        };
        let timeline = self.0.timeline.of(&id);
        timeline.report(Some(&name), EventKind::DisksReady { kept: is_kept });
        let mut parts = self.parts(spec, image, path, endpoints);
        parts.durable = true;
        let prepared = self.prepare(parts).await?.restored(history);
        let mut deployments = lock(&self.0.deployments);
        let found = deployments.get_mut(&id).ok_or_else(gone)?;
        let (handle, task) = prepared.start();
        found.tasks.spawn(task);
        let instances = &mut found.handle.instances;
        instances.push(handle);
        instances.sort_by(|a, b| order(a.spec()).cmp(&order(b.spec())));
        Ok(())
    }

    /// Stops an instance cleanly and removes its disks and logs.
    ///
    /// # Errors
    /// Files could not be removed.
    pub async fn retire(&self, deployment: &str, name: &str) -> Result<(), HostError> {
        self.take_out(deployment, name).await;
        let files = {
            let deployments = lock(&self.0.deployments);
            let found = deployments.get(deployment);
            found.map(|found| Arc::clone(&found.files))
        };
        let Some(files) = files else { return Ok(()) };
        let (name, content) = (name.to_owned(), self.0.content.clone());
        let failed = HostError::removal(files.dir.path());
        let removed = blocking(move || {
            files.dir.remove_instance(&name)?;
            content.sweep()
        });
        removed.await?.map_err(failed)
    }

    /// Stops an instance and forgets it.
    async fn take_out(&self, deployment: &str, name: &str) {
        let handle = self.deployment(deployment);
        let Some(handle) = handle.as_ref().and_then(|found| found.instance(name)) else {
            return;
        };
        handle.send(Request::Stop).await;
        handle.ended().await;
        let mut deployments = lock(&self.0.deployments);
        if let Some(found) = deployments.get_mut(deployment) {
            found.handle.instances.retain(|it| it.spec().name() != name);
            // Those that have ended are not kept.
            while found.tasks.try_join_next().is_some() {}
        }
    }

    /// Gives an instance that is stopped the application disk of `spec`; its directory and
    /// history. `None` if it does not exist, or its disks are for another guest.
    async fn swap(
        &self,
        spec: &InstanceSpec,
        files: &Arc<Files>,
        hold: &HeldContent,
    ) -> Result<Option<(PathBuf, RestartHistory)>, HostError> {
        let (content, hold) = (self.0.content.clone(), Arc::clone(hold));
        let (spec, files) = (spec.clone(), Arc::clone(files));
        let swapped = blocking(move || {
            let path = files.dir.path().join(spec.name());
            let Ok(record) = InstanceRecord::read(&path) else {
                return Ok(None);
            };
            if !same_disks(&record.spec, &spec) {
                return Ok(None);
            }
            // Before the record: one that names the new application has its disk.
            guest::swap_application(&path, &spec, &content, &hold)
                .map_err(HostError::guest(spec.name()))?;
            // The delays of the old application are not those of the new one.
            let history = RestartHistory {
                generation: record.history.generation,
                ..RestartHistory::default()
            };
            let record = InstanceRecord {
                spec,
                history: history.clone(),
                process: None,
            };
            let written = record.write(&path);
            written.map_err(HostError::directory("write a record to", &path))?;
            Ok(Some((path, history)))
        });
        swapped.await?
    }

    async fn make_anew(
        &self,
        spec: &InstanceSpec,
        image: &Arc<Image>,
        files: &Arc<Files>,
        hold: &HeldContent,
    ) -> Result<PathBuf, HostError> {
        let (of_remove, name) = (Arc::clone(files), spec.name().to_owned());
        let failed = HostError::removal(files.dir.path());
        let removed = blocking(move || of_remove.dir.remove_instance(&name));
        removed.await?.map_err(failed)?;
        self.make_files(spec, image, files, hold, true).await
    }
}

/// Whether an instance of `old` can boot from its OS and resource disk as one of `new`.
pub fn same_disks(old: &InstanceSpec, new: &InstanceSpec) -> bool {
    let storage = |spec: &InstanceSpec| {
        let storage = spec.goal.role.local_storage.iter();
        let mut sizes: Vec<_> = storage.map(|it| (it.name.clone(), it.size_mib)).collect();
        sizes.sort();
        sizes
    };
    old.image == new.image && old.size == new.size && storage(old) == storage(new)
}

/// The order of instances in a deployment: by role, then by number.
fn order(spec: &InstanceSpec) -> (&str, usize, &str) {
    (spec.role(), spec.name().len(), spec.name())
}
