//! The files, the cgroup and the VMM process of a boot, made on a blocking thread: a file
//! system that hangs must not hold up the other instances of this process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::task::JoinHandle;
use tokio::time::Instant;
use vmbus::text::chain;

use super::InstanceParts;
use super::record::PendingRecord;
use crate::blocking::DropBlocking;
use crate::cgroup::{self, GroupError, GuestGroup};
use crate::store::deployment::short_id;
use crate::supervisor::guest;
use crate::supervisor::process::{Launch, VmmProcess};
use crate::until::until;

/// A VMM process that has started.
#[derive(Debug)]
pub(super) struct StartedBoot {
    process: Unclaimed,
    /// The cgroup of the process: none where limits are not enforced.
    pub(super) group: Option<DropBlocking<GuestGroup>>,
    /// Why limits are not enforced, if they should be.
    pub(super) not_limited: Option<GroupError>,
}

impl StartedBoot {
    /// The process, which from here on ends as [`VmmProcess`] says.
    pub(super) fn claim(&mut self) -> VmmProcess {
        self.process.0.take().expect("a boot is claimed once")
    }
}

/// A process whose boot may be cancelled: then it is killed, even if it could outlive this
/// one.
#[derive(Debug)]
struct Unclaimed(Option<VmmProcess>);

impl Drop for Unclaimed {
    fn drop(&mut self) {
        if let Some(process) = &mut self.0 {
            process.kill();
        }
    }
}

/// The preparation of one boot, under way. If it is dropped, what it opens and
/// makes is released when its system calls return.
#[derive(Debug)]
pub(super) struct Preparation {
    generation: u64,
    task: JoinHandle<Result<Box<StartedBoot>, String>>,
    cancelled: Arc<AtomicBool>,
    /// When it is reported that it takes long.
    pub(super) warn_at: Option<Instant>,
}

impl Preparation {
    /// `record` is written first: a VMM process that runs is recorded, whatever ends
    /// this process. `earlier` is the cgroup of the boot before, which is removed.
    pub(super) fn start(
        generation: u64,
        parts: &InstanceParts,
        record: Option<PendingRecord>,
        earlier: Option<GuestGroup>,
    ) -> Self {
        let (dir, spec, image) = (parts.dir.clone(), parts.spec.clone(), parts.image.clone());
        let (group, dial_limit, durable) = (parts.group.clone(), parts.dial_limit, parts.durable);
        let require_sandbox = parts.require_sandbox;
        let cancelled = Arc::new(AtomicBool::new(false));
        let is_cancelled = Arc::clone(&cancelled);
        let task = tokio::task::spawn_blocking(move || {
            // Both have the same name.
            drop(earlier);
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
            let mut not_limited = None;
            let group = group
                .transpose()
                .unwrap_or_else(|error| not_limited.replace(error).and(None));
            if is_cancelled.load(Ordering::Relaxed) {
                return Err("cancelled".into());
            }
            let launch = Launch {
                generation,
                guest,
                files,
                log,
                outlive_in: durable.then_some(dir.as_path()),
                require_sandbox,
            };
            let process = VmmProcess::spawn(launch, |pid| {
                if let Some(Err(error)) = group.as_ref().map(|group| group.enter(pid)) {
                    not_limited = Some(error);
                }
            });
            let process = process.map_err(|error| chain(&error))?;
            Ok(Box::new(StartedBoot {
                process: Unclaimed(Some(process)),
                group: group.map(DropBlocking::new),
                not_limited,
            }))
        });
        Self {
            generation,
            task,
            cancelled,
            warn_at: Some(Instant::now() + parts.prepare_limit),
        }
    }
}

impl Drop for Preparation {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
        // A preparation that waits for a thread does not begin.
        self.task.abort();
    }
}

/// What happens to a preparation.
#[derive(Debug)]
pub(super) enum Prepared {
    /// It has ended.
    Ended(u64, Result<Box<StartedBoot>, String>),
    /// It takes long. Reported once.
    Late(u64),
}

/// The end of the preparation, with the number of its boot. Cancelling loses
/// nothing.
pub(super) async fn next_prepared(preparation: &mut Option<Preparation>) -> Prepared {
    let Some(running) = preparation else {
        return std::future::pending().await;
    };
    let generation = running.generation;
    let warn_at = running.warn_at;
    let result = tokio::select! {
        biased;
        result = &mut running.task => result,
        () = until(warn_at) => {
            running.warn_at = None;
            return Prepared::Late(generation);
        }
    };
    *preparation = None;
    let result = result.unwrap_or_else(|error| Err(format!("preparation of a boot: {error}")));
    Prepared::Ended(generation, result)
}
