//! What an update does to each role: compares the instances that run with those of the new
//! revision.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{ADDRESS, Controller, ControllerError};
use crate::progress::Progress;
use crate::store::services::Wanted;
use crate::supervisor::host::{DeploymentHandle, HeldContent, same_disks};
use crate::supervisor::plan::{Placement, plan};
use crate::supervisor::spec::InstanceSpec;

/// What an update does to the instances of a role that stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// Nothing.
    None,
    /// Settings only: the guest keeps running and gets a new goal.
    Configuration,
    /// Another application: OS disk, local storage and logs stay.
    Application,
    /// Another size, guest image or local storage: the instance is made anew, and what is on
    /// its disks is lost.
    Recreate,
}

/// What an update does to a role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RolePlan {
    /// Its name.
    pub role: String,
    /// What happens to the instances that stay.
    pub change: Change,
    /// Instances that run now.
    pub instances: usize,
    /// Instances of the new revision.
    pub wanted: usize,
    /// Upgrade domains of the instances that are changed: one is taken down after the other.
    pub domains: usize,
}

/// What an update does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UpdatePlan {
    /// The revision that is wanted now.
    pub from: u64,
    /// Each role; none if no instance runs, so that all are created.
    pub roles: Vec<RolePlan>,
}

/// The instances of a revision, and the content that they need.
#[derive(Debug)]
pub(super) struct Targets {
    pub(super) specs: Vec<InstanceSpec>,
    pub(super) hold: HeldContent,
}

impl Controller {
    /// What the update of service `name` to `wanted` does. `None` if there is no such service.
    ///
    /// # Errors
    /// The update is not possible.
    pub async fn plan_update(
        &self,
        name: &str,
        wanted: &Wanted,
    ) -> Result<Option<UpdatePlan>, ControllerError> {
        let of_store = name.to_owned();
        let found = self.with_store(move |store| store.service(&of_store));
        let Some(record) = found.await? else {
            return Ok(None);
        };
        let from = record.generation;
        let Some(deployment) = self.state(record, None).deployment else {
            let roles = Vec::new();
            return Ok(Some(UpdatePlan { from, roles }));
        };
        let targets = self.targets(wanted, &deployment, 1).await?;
        let old: Vec<_> = deployment.instances().iter().map(|it| it.spec()).collect();
        let new: Vec<_> = targets.specs.iter().collect();
        if let Some(why) = refusal(&old, &new) {
            return Err(ControllerError::NotPossible(why));
        }
        let known: BTreeSet<_> = old.iter().map(|it| it.name()).collect();
        let added = new.iter().filter(|it| !known.contains(it.name()));
        let added: Vec<_> = added.map(|it| it.size.clone()).collect();
        // Claimed when they are made; here only the answer counts.
        self.0.host.claim(&added)?;
        let roles = role_plans(&old, &new);
        Ok(Some(UpdatePlan { from, roles }))
    }

    /// The instances of a revision in a deployment that runs.
    pub(super) async fn targets(
        &self,
        wanted: &Wanted,
        deployment: &DeploymentHandle,
        incarnation: u64,
    ) -> Result<Targets, ControllerError> {
        let model = self.load(wanted).await?;
        let (host, progress) = (&self.0.host, Progress::default());
        // An image that was built anew under the same name would cost each instance its disks.
        let known = deployment
            .instances()
            .first()
            .map(|it| it.spec().image.clone());
        let image = match known.filter(|image| image.name == model.image) {
            Some(image) => image,
            None => host.verify_image(&model.image, &progress).await?,
        };
        let hold = host.hold_content().await?;
        let mut applications = BTreeMap::new();
        for role in &model.roles {
            let digest = host.add_application(&hold, role, &progress).await?;
            applications.insert(role.definition.name.clone(), digest);
        }
        let placement = Placement {
            deployment: deployment.id(),
            incarnation,
            image: &image,
            applications: &applications,
            address: ADDRESS,
            stop_timeout: host.options().role_stop(),
        };
        let specs = plan(&model, &placement);
        Ok(Targets { specs, hold })
    }
}

/// What takes an instance from `old` to `new`.
pub(super) fn change(old: &InstanceSpec, new: &InstanceSpec) -> Change {
    let mut same = old.clone();
    same.goal.incarnation = new.goal.incarnation;
    if same == *new {
        Change::None
    } else if !same_disks(old, new) {
        Change::Recreate
    } else if old.application == new.application && old.service == new.service {
        // Only the goal differs, which a guest that runs can be given.
        Change::Configuration
    } else {
        Change::Application
    }
}

/// Why instances cannot be taken from `old` to `new`.
pub(super) fn refusal(old: &[&InstanceSpec], new: &[&InstanceSpec]) -> Option<String> {
    let roles = |specs: &[&InstanceSpec]| -> BTreeMap<String, InstanceSpec> {
        let roles = specs.iter().map(|it| (it.role().to_owned(), (*it).clone()));
        roles.collect()
    };
    let (old, new) = (roles(old), roles(new));
    let anew = "delete the service and apply it again";
    for role in old.keys().chain(new.keys()) {
        let (Some(old), Some(new)) = (old.get(role), new.get(role)) else {
            let what = if new.contains_key(role) {
                "added"
            } else {
                "removed"
            };
            return Some(format!(
                "an update cannot have a role {what} ({role}): {anew}"
            ));
        };
        if old.endpoints != new.endpoints {
            return Some(format!(
                "an update cannot change the endpoints of role {role}: {anew}"
            ));
        }
        for storage in &old.goal.role.local_storage {
            let new = new.goal.role.storage(&storage.name);
            if let Some(new) = new.filter(|new| new.size_mib < storage.size_mib) {
                return Some(format!(
                    "an update cannot make local storage {} of role {role} smaller ({} -> {} \
                     MiB): keep its size, or {anew}",
                    storage.name, storage.size_mib, new.size_mib
                ));
            }
        }
    }
    None
}

fn role_plans(old: &[&InstanceSpec], new: &[&InstanceSpec]) -> Vec<RolePlan> {
    let roles: BTreeSet<_> = old.iter().chain(new).map(|it| it.role()).collect();
    let plans = roles.into_iter().map(|role| {
        let of = |specs: &[&InstanceSpec]| specs.iter().filter(|it| it.role() == role).count();
        let stay = old.iter().filter_map(|old| {
            let new = new.iter().find(|new| new.name() == old.name())?;
            Some((change(old, new), new.goal.update_domain))
        });
        let stay: Vec<_> = stay.collect();
        let changed = stay.iter().filter(|(change, _)| *change != Change::None);
        RolePlan {
            role: role.to_owned(),
            change: stay
                .iter()
                .map(|(change, _)| *change)
                .max()
                .unwrap_or(Change::None),
            instances: of(old),
            wanted: of(new),
            domains: changed
                .map(|(_, domain)| domain)
                .collect::<BTreeSet<_>>()
                .len(),
        }
    });
    plans.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::content::ContentStore;
    use crate::supervisor::guest::tests::{image, spec};

    #[test]
    fn what_differs_decides_what_happens_to_an_instance() {
        let dir = tempfile::tempdir().unwrap();
        let content = ContentStore::new(dir.path());
        let image = image(dir.path());
        let old = spec(&content, &content.hold().unwrap(), &image);
        let with = |edit: &dyn Fn(&mut InstanceSpec)| {
            let mut new = old.clone();
            new.goal.incarnation += 1;
            edit(&mut new);
            new
        };
        let other = crate::digest::Digest::of(&b"other"[..]).unwrap().0;
        let plan = |edit: &dyn Fn(&mut InstanceSpec)| {
            let new = with(edit);
            (change(&old, &new), refusal(&[&old], &[&new]))
        };
        assert_eq!(plan(&|_| {}), (Change::None, None));
        let setting = |it: &mut InstanceSpec| {
            it.goal.role.settings.insert("colour".into(), "red".into());
        };
        assert_eq!(plan(&setting), (Change::Configuration, None));
        assert_eq!(
            plan(&|it| it.application = other),
            (Change::Application, None)
        );
        assert_eq!(
            plan(&|it| it.size.memory_mib *= 2),
            (Change::Recreate, None)
        );
        let refused = |edit: &dyn Fn(&mut InstanceSpec)| plan(edit).1.unwrap();
        assert!(refused(&|it| it.endpoints.clear()).contains("the endpoints of role"));
        assert!(refused(&|it| it.goal.role.name = "Other".into()).contains("removed"));

        let stores = |size| {
            let mut spec = old.clone();
            let storage = vmbus::role::LocalStorage {
                name: "cache".into(),
                size_mib: size,
                clean_on_role_recycle: false,
            };
            spec.goal.role.local_storage = vec![storage];
            spec
        };
        assert_eq!(change(&stores(10), &stores(20)), Change::Recreate);
        assert_eq!(refusal(&[&stores(10)], &[&stores(20)]), None);
        let smaller = refusal(&[&stores(20)], &[&stores(10)]).unwrap();
        assert!(smaller.contains("smaller (20 -> 10 MiB)"), "{smaller}");

        // Two instances of another package, one more.
        let named = |spec: &InstanceSpec, number: u32| {
            let mut spec = spec.clone();
            spec.goal.instance = format!("A_IN_{number}");
            spec.goal.update_domain = number;
            spec
        };
        let new = with(&|it| it.application = other);
        let before = [named(&old, 0), named(&old, 1)];
        let after = [named(&new, 0), named(&new, 1), named(&new, 2)];
        let plans = role_plans(&before.each_ref(), &after.each_ref());
        assert_eq!(
            plans,
            [RolePlan {
                role: old.role().to_owned(),
                change: Change::Application,
                instances: 2,
                wanted: 3,
                domains: 2,
            }]
        );
    }
}
