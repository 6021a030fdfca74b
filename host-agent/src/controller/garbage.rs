//! What no service needs any more.

use std::collections::BTreeSet;
use std::path::Path;

use vmbus::text::chain;

use super::{Controller, ControllerError, lock};
use crate::blocking::blocking;
use crate::service::ServiceRules;
use crate::store::garbage::{Garbage, Needed, collect};
use crate::store::services::ServiceStore;

impl Controller {
    /// Finds what is not needed, images too if `images` is set, and removes it unless `only_ask`
    /// is. No service is changed meanwhile.
    pub async fn collect_garbage(
        &self,
        images: bool,
        only_ask: bool,
    ) -> Result<Vec<Garbage>, ControllerError> {
        let store = std::sync::Arc::clone(&self.0.store);
        let (data_dir, policy) = (self.host().options().data_dir.clone(), self.policy());
        blocking(move || {
            let rules = images.then_some(&policy.rules);
            of_store(&lock(&store), &data_dir, rules, only_ask)
        })
        .await?
    }
}

/// As [`Controller::collect_garbage`], of a store that no controller has; images too if there are
/// `rules` by which revisions name them. Blocking.
pub fn of_store(
    store: &ServiceStore,
    data_dir: &Path,
    rules: Option<&ServiceRules>,
    only_ask: bool,
) -> Result<Vec<Garbage>, ControllerError> {
    let needed = Needed {
        packages: store.packages()?,
        images: rules.map(|rules| image_names(store, rules)).transpose()?,
    };
    collect(data_dir, &needed, only_ask).map_err(ControllerError::Garbage)
}

/// The images that revisions name. Blocking.
///
/// # Errors
/// The store, or a configuration of a newer version that cannot be read.
fn image_names(
    store: &ServiceStore,
    rules: &ServiceRules,
) -> Result<BTreeSet<String>, ControllerError> {
    let mut names = BTreeSet::new();
    for service in store.services()? {
        for revision in store.history(&service.name)? {
            let found = rules
                .images_named(&revision.wanted.configuration)
                .inspect_err(|error| {
                    tracing::warn!(service = service.name, "{}", chain(error));
                })?;
            names.extend(found);
        }
    }
    Ok(names)
}
