//! Makes disks of an instance anew before a boot, on a blocking thread.

use tokio::task::JoinHandle;
use vmbus::text::chain;

use super::Instance;
use crate::supervisor::guest;
use crate::supervisor::lifecycle::{Input, Renewal};

/// Disks that are being made anew.
pub(super) type Renewing = JoinHandle<Result<(), String>>;

impl Instance {
    /// Begins. The record says so first: a host agent that dies meanwhile does it again.
    pub(super) fn renew(&mut self, renewal: Renewal) {
        self.wait = None;
        let record = self.changed_record();
        let (dir, spec) = (self.parts.dir.clone(), self.parts.spec.clone());
        let (image, content) = (self.parts.image.clone(), self.parts.content.clone());
        self.renewing = Some(tokio::task::spawn_blocking(move || {
            if let Some(record) = record {
                let written = record.write();
                written.map_err(|error| format!("cannot record the new disks: {error}"))?;
            }
            let renewed = guest::renew_disks(&dir, &spec, &image, &content, renewal);
            renewed.map_err(|error| chain(&error))
        }));
    }

    /// The end of [`Instance::renew`].
    pub(super) fn renewed(&mut self, result: Result<(), String>) -> bool {
        match result {
            Ok(()) => self.feed(Input::Renewed),
            Err(error) => self.feed(Input::SpawnFailed(error)),
        }
    }
}

/// The end of what is under way. Cancelling loses nothing.
pub(super) async fn next_renewed(renewing: &mut Option<Renewing>) -> Result<(), String> {
    let Some(task) = renewing else {
        return std::future::pending().await;
    };
    let result = task.await;
    *renewing = None;
    result.unwrap_or_else(|error| Err(format!("making disks anew: {error}")))
}
