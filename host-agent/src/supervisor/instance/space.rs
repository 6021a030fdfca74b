//! Pauses for space: the host has no space for a guest's writes.

use std::collections::VecDeque;
use std::os::linux::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::statvfs::{Statvfs, statvfs};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::super::event::EventKind;
use super::super::guest;
use super::super::lifecycle::Input;
use super::{ClockId, Instance, clock};

/// Least that is asked for: a cluster of a diff disk and the tables that name it.
const MIN_NEEDED: u64 = 128 << 10;
/// Most time for the file system to tell its free bytes.
const MEASURE_LIMIT: Duration = Duration::from_secs(1);

impl Instance {
    pub(super) fn no_space(&mut self, disk: String, needed: u32, quota: bool) -> bool {
        let Some(name) = guest::disk_file(&disk) else {
            let text = "VMM process reported no space for an unknown disk".into();
            self.report_limited(EventKind::Warning { text });
            return true;
        };
        if self.space_claim.is_false {
            let text = "VMM process says again that the host has no space".into();
            self.report_limited(EventKind::Warning { text });
            return true;
        }
        let now = clock(ClockId::CLOCK_MONOTONIC);
        let reported = self.report_limit.take(now);
        let needed_bytes = u64::from(needed).max(MIN_NEEDED);
        self.space_claim.claimed = Some((needed_bytes, quota));
        let Some(boot) = &mut self.boot else {
            return true;
        };
        boot.no_space_reported |= reported;
        self.liveness.no_space(now);
        let dir = self.parts.dir.clone();
        let event = EventKind::NoSpace {
            disk,
            file: dir.join(name),
            mount: dir.clone(),
            needed_bytes,
            free_bytes: None,
            quota,
        };
        self.observe(&event);
        if reported {
            self.held_reports
                .hold(event, MEASURE_LIMIT, move || DiskSpace::of(&dir));
        }
        self.feed(Input::NoSpace)
    }

    pub(super) fn space_back(&mut self) -> bool {
        self.space_claim.end();
        let now = clock(ClockId::CLOCK_MONOTONIC);
        let Some(paused) = self.liveness.space_back(now) else {
            return true;
        };
        self.observe(&EventKind::SpaceBack { paused_ms: 0 });
        let boot = self.boot.as_mut();
        if boot.is_some_and(|boot| std::mem::take(&mut boot.no_space_reported)) {
            let paused_ms = u64::try_from(paused.as_millis()).unwrap_or(u64::MAX);
            self.report(EventKind::SpaceBack { paused_ms });
        }
        self.feed(Input::SpaceBack)
    }
}

/// The file system of an instance's disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DiskSpace {
    mount: PathBuf,
    free: Option<u64>,
}

impl DiskSpace {
    /// Blocking, without limit on a file system that hangs.
    fn of(dir: &Path) -> Self {
        Self {
            mount: mount_of(dir),
            free: free_on(dir),
        }
    }
}

/// Events that wait for a measurement of the free bytes, which a blocking
/// thread makes. Events after them wait too, so that the order is kept.
#[derive(Debug, Default)]
pub(super) struct HeldReports {
    events: VecDeque<EventKind>,
    /// One at a time, so that a file system that hangs takes one thread.
    measurement: Option<JoinHandle<DiskSpace>>,
    deadline: Option<Instant>,
}

impl HeldReports {
    /// Keeps `event` until `measure` has returned, for `limit` at most.
    fn hold(
        &mut self,
        event: EventKind,
        limit: Duration,
        measure: impl FnOnce() -> DiskSpace + Send + 'static,
    ) {
        self.events.push_back(event);
        self.deadline.get_or_insert(Instant::now() + limit);
        let hangs = |measurement: &JoinHandle<_>| !measurement.is_finished();
        if !self.measurement.as_ref().is_some_and(hangs) {
            self.measurement = Some(tokio::task::spawn_blocking(measure));
        }
    }

    /// The event if it can be reported now, and no event waits before it.
    pub(super) fn pass(&mut self, event: EventKind) -> Option<EventKind> {
        if self.events.is_empty() {
            return Some(event);
        }
        self.events.push_back(event);
        None
    }

    /// What was measured for the events that wait; nothing at their deadline.
    /// Cancelling loses nothing.
    pub(super) async fn measured(&mut self) -> Option<DiskSpace> {
        let (Some(deadline), Some(measurement)) = (self.deadline, &mut self.measurement) else {
            return std::future::pending().await;
        };
        let measured = tokio::time::timeout_at(deadline, measurement).await.ok()?;
        self.measurement = None;
        measured.ok()
    }

    /// The events that wait, completed by what was measured.
    pub(super) fn release(&mut self, measured: Option<DiskSpace>) -> VecDeque<EventKind> {
        self.deadline = None;
        let mut events = std::mem::take(&mut self.events);
        for event in &mut events {
            if let (
                EventKind::NoSpace {
                    mount, free_bytes, ..
                },
                Some(measured),
            ) = (event, &measured)
            {
                mount.clone_from(&measured.mount);
                *free_bytes = measured.free;
            }
        }
        events
    }
}

/// The mount point above `file`: the last directory on the same device.
fn mount_of(file: &Path) -> PathBuf {
    let device = |path: &Path| path.metadata().map(|metadata| metadata.st_dev()).ok();
    let own = device(file);
    let same = file.ancestors().take_while(|path| device(path) == own);
    same.last().unwrap_or(file).to_owned()
}

/// Bytes that an unprivileged user may still use on the file system of `file`.
pub(super) fn free_on(file: &Path) -> Option<u64> {
    statvfs(file).ok().as_ref().map(available)
}

/// Bytes of a file system that an unprivileged user may still use.
pub(super) fn available(stat: &Statvfs) -> u64 {
    stat.blocks_available() * stat.fragment_size()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    fn no_space() -> EventKind {
        EventKind::NoSpace {
            disk: "os".into(),
            file: "/data/a/diff.qcow2".into(),
            mount: "/data/a".into(),
            needed_bytes: MIN_NEEDED,
            free_bytes: None,
            quota: false,
        }
    }

    fn measured(free: u64) -> DiskSpace {
        DiskSpace {
            mount: "/data".into(),
            free: Some(free),
        }
    }

    #[test]
    fn a_file_is_under_the_mount_point_of_its_file_system() {
        assert_eq!(mount_of(Path::new("/proc/self/status")), Path::new("/proc"));
        assert_eq!(mount_of(Path::new("/")), Path::new("/"));
        assert_eq!(free_on(Path::new("/proc/self/status")), Some(0));
        let own = std::env::current_exe().unwrap();
        assert!(free_on(&own).is_some());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn later_events_wait_for_the_free_bytes() {
        let mut held = HeldReports::default();
        let back = EventKind::SpaceBack { paused_ms: 1 };
        assert_eq!(held.pass(back.clone()), Some(back.clone()));
        held.hold(no_space(), Duration::from_secs(600), || measured(7));
        assert_eq!(held.pass(back.clone()), None);
        let space = held.measured().await;
        let events = held.release(space);
        let EventKind::NoSpace {
            mount, free_bytes, ..
        } = &events[0]
        else {
            panic!("{events:?}");
        };
        assert_eq!(
            (mount.as_path(), *free_bytes),
            (Path::new("/data"), Some(7))
        );
        assert_eq!(events[1], back);
        assert_eq!(held.pass(back.clone()), Some(back));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_hanging_file_system_takes_one_thread_and_a_limited_time() {
        let mut held = HeldReports::default();
        let (hang, hanging) = mpsc::channel::<()>();
        let limit = Duration::from_millis(1);
        held.hold(no_space(), limit, move || {
            let _ = hanging.recv();
            measured(1)
        });
        for _ in 0..3 {
            assert_eq!(held.measured().await, None);
            assert_eq!(held.release(None), [no_space()]);
            let (second, started) = mpsc::channel::<()>();
            held.hold(no_space(), limit, move || {
                let _ = second.send(());
                measured(1)
            });
            // Disconnected: it was dropped without a start.
            assert_eq!(started.recv(), Err(mpsc::RecvError));
        }
        drop(hang);
        while held
            .measurement
            .as_ref()
            .is_some_and(|it| !it.is_finished())
        {
            tokio::task::yield_now().await;
        }
        // A result from long ago is not reported.
        held.release(None);
        held.hold(no_space(), Duration::from_secs(600), || measured(2));
        assert_eq!(held.measured().await, Some(measured(2)));
    }
}
