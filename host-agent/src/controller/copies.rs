//! Keeps the good copy of the store fresh, and reports what a start had to repair or leave.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::sleep;
use vmbus::text::chain;

use super::{Controller, ControllerError};
use crate::blocking::blocking;
use crate::store::deployment::durable;
use crate::store::good_copy::{Copier, Restored};
use crate::supervisor::event::EventKind;
use crate::supervisor::timeline::Timeline;

/// Least time between two copies: a store that changes all the time is written once more a
/// second. A damaged store loses at most the changes of this time.
const PAUSE: Duration = Duration::from_secs(1);
/// Delay after a copy that failed.
const RETRY: Duration = Duration::from_secs(30);

/// Copies the store after it changed, which `changed` says, for as long as the process runs.
pub(super) async fn keep(copier: Copier, changed: Arc<Notify>, timeline: Timeline) {
    let mut failed = false;
    loop {
        changed.notified().await;
        let of_copy = copier.clone();
        let copied = blocking(move || of_copy.copy()).await;
        let error = match &copied {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(chain(error)),
            Err(error) => Some(chain(error)),
        };
        match error {
            None => sleep(PAUSE).await,
            Some(error) => {
                if !failed {
                    let text = format!("the good copy of the store cannot be written: {error}");
                    timeline.report(None, EventKind::Warning { text });
                }
                changed.notify_one();
                sleep(RETRY).await;
            }
        }
        failed = !matches!(copied, Ok(Ok(())));
    }
}

impl Controller {
    /// Reports that the good copy of the store was put in its place.
    pub(super) fn report_restored(&self, restored: Restored) {
        let Restored { what, aside } = restored;
        let restored = EventKind::StoreRestored { what, aside };
        self.host().timeline().report(None, restored);
    }

    /// Reports the deployments that are kept in the data directory and that no service in
    /// `known` has: their guests, if they run, are left as they are.
    pub(super) async fn report_unknown(
        &self,
        known: &BTreeSet<String>,
    ) -> Result<(), ControllerError> {
        let data_dir = self.host().options().data_dir.clone();
        // A directory that cannot be listed has been reported by the adoption.
        let found = blocking(move || durable(&data_dir))
            .await?
            .unwrap_or_default();
        let is_known = |path: &PathBuf| {
            let id = path.file_name().and_then(OsStr::to_str);
            id.is_some_and(|id| known.contains(id))
        };
        for path in found.into_iter().filter(|path| !is_known(path)) {
            self.host()
                .timeline()
                .report(None, EventKind::UnknownDeployment { path });
        }
        Ok(())
    }
}
