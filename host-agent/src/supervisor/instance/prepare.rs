//! The files and the cgroup of a boot, made ready on a blocking thread: a file
//! system that hangs must not hold up the other instances of this process.

use std::fs::File;
use std::os::fd::OwnedFd;

use tokio::task::JoinHandle;
use vmbus::text::chain;

use super::InstanceParts;
use super::record::PendingRecord;
use crate::cgroup::{self, GroupError, GuestGroup};
use crate::store::deployment::short_id;
use crate::supervisor::guest;
use crate::vmm::spec::GuestSpec;

/// What a VMM process is started with.
#[derive(Debug)]
pub(super) struct PreparedBoot {
    pub(super) guest: GuestSpec,
    pub(super) files: Vec<OwnedFd>,
    pub(super) log: File,
    /// The cgroup for the process: `Ok(None)` where limits are not enforced.
    pub(super) group: Result<Option<GuestGroup>, GroupError>,
}

/// The preparation of one boot, under way. If it is dropped, what it opens and
/// makes is released when its system calls return.
#[derive(Debug)]
pub(super) struct Preparation {
    generation: u64,
    task: JoinHandle<Result<PreparedBoot, String>>,
}

impl Preparation {
    /// `record` is written first: a VMM process that runs is recorded, whatever ends
    /// this process.
    pub(super) fn start(
        generation: u64,
        parts: &InstanceParts,
        record: Option<PendingRecord>,
    ) -> Self {
        let (dir, spec, image) = (parts.dir.clone(), parts.spec.clone(), parts.image.clone());
        let (group, dial_limit) = (parts.group.clone(), parts.dial_limit);
        let task = tokio::task::spawn_blocking(move || {
            if let Some(record) = record {
                let written = record.write();
                written.map_err(|error| format!("cannot record the boot: {error}"))?;
            }
            let log = guest::vmm_log(&dir).map_err(|error| chain(&error))?;
            let prepared = guest::prepare(&dir, &spec, &image, dial_limit);
            let (guest, files) = prepared.map_err(|error| chain(&error))?;
            let group = group.map(|group| {
                let in_memory = guest::disks_in_memory(&dir, &image);
                let limits = cgroup::GuestLimits::of(guest.vcpus, guest.memory_mib, in_memory);
                let name = format!("{}.{}", short_id(spec.deployment()), spec.name());
                group.guest(&name, limits)
            });
            Ok(PreparedBoot {
                guest,
                files,
                log,
                group: group.transpose(),
            })
        });
        Self { generation, task }
    }
}

impl Drop for Preparation {
    fn drop(&mut self) {
        // A preparation that waits for a thread does not begin.
        self.task.abort();
    }
}

/// The end of the preparation, with the number of its boot. Cancelling loses
/// nothing.
pub(super) async fn next_prepared(
    preparation: &mut Option<Preparation>,
) -> (u64, Result<PreparedBoot, String>) {
    let Some(Preparation { generation, task }) = preparation else {
        return std::future::pending().await;
    };
    let (generation, result) = (*generation, task.await);
    *preparation = None;
    let result = result.unwrap_or_else(|error| Err(format!("preparation of a boot: {error}")));
    (generation, result)
}
