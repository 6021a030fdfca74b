//! Figures of this process and of each instance over the last half hour, for the plots.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::time::{MissedTickBehavior, interval};

use crate::api::metrics::process;
use crate::blocking::blocking;
use crate::supervisor::host::Host;

/// Time between two samples.
pub(super) const PERIOD: Duration = Duration::from_secs(10);

/// Samples that are kept of an instance: half an hour, 8 KiB.
const KEPT: usize = 180;

/// Deployment and name of an instance; both are empty for this process.
type Key = (String, String);

/// The figures of one instance at one time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sample {
    /// Processor time of its VMM process since the sample before, in hundredths of a processor.
    pub(super) cpu_percent: Option<f64>,
    /// Resident memory of its VMM process.
    pub(super) resident_bytes: Option<u64>,
    /// Seconds since the last heartbeat.
    pub(super) heartbeat_age: Option<f64>,
}

/// The figures of an instance.
#[derive(Debug, Default)]
struct Series {
    samples: VecDeque<Sample>,
    /// VMM process, its processor time and the time of the last sample.
    last: Option<(u32, f64, Duration)>,
}

/// The figures of all instances. A clone is another handle to the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Samples(Arc<Mutex<BTreeMap<Key, Series>>>);

/// An instance of the host, as it is sampled.
struct Subject {
    key: Key,
    pid: Option<u32>,
    last_heartbeat: Option<Duration>,
}

impl Samples {
    /// Samples the instances of `host` until the runtime ends.
    pub(super) fn start(host: Host) -> Self {
        let this = Self::default();
        let samples = this.clone();
        tokio::spawn(async move {
            let mut ticks = interval(PERIOD);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                let (subjects, samples) = (subjects(&host), samples.clone());
                // One at a time: a `/proc` that hangs holds up one thread.
                let _ = blocking(move || samples.take(subjects)).await;
            }
        });
        this
    }

    /// The samples of an instance, the oldest first.
    pub(super) fn of(&self, deployment: &str, instance: &str) -> Vec<Sample> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = all.get(&(deployment.to_owned(), instance.to_owned()));
        found.map_or_else(Vec::new, |series| series.samples.iter().copied().collect())
    }

    /// Those of this process.
    pub(super) fn own(&self) -> Vec<Sample> {
        self.of("", "")
    }

    /// Takes one sample of each instance, and forgets those that are gone. Blocks.
    fn take(&self, subjects: Vec<Subject>) {
        let read = subjects.into_iter().map(|subject| {
            let figures = subject.pid.and_then(process::read);
            (subject, figures, monotonic())
        });
        let read: Vec<_> = read.collect();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut before = std::mem::take(&mut *all);
        for (subject, figures, now) in read {
            let mut series = before.remove(&subject.key).unwrap_or_default();
            let cpu = subject.pid.zip(figures.map(|it| it.cpu_seconds));
            let cpu_percent = series.last.zip(cpu).and_then(|(last, (pid, seconds))| {
                let passed = now.saturating_sub(last.2).as_secs_f64();
                (last.0 == pid && passed > 0.0).then(|| 100.0 * (seconds - last.1) / passed)
            });
            series.last = cpu.map(|(pid, seconds)| (pid, seconds, now));
            if series.samples.len() >= KEPT {
                series.samples.pop_front();
            }
            series.samples.push_back(Sample {
                cpu_percent,
                resident_bytes: figures.map(|it| it.resident_bytes),
                heartbeat_age: subject
                    .last_heartbeat
                    .map(|last| now.saturating_sub(last).as_secs_f64()),
            });
            all.insert(subject.key, series);
        }
    }
}

/// `CLOCK_MONOTONIC`.
pub(super) fn monotonic() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

fn subjects(host: &Host) -> Vec<Subject> {
    let mut subjects = vec![Subject {
        key: Key::default(),
        pid: Some(std::process::id()),
        last_heartbeat: None,
    }];
    for deployment in host.deployments() {
        for instance in deployment.instances() {
            let status = instance.status();
            subjects.push(Subject {
                key: (deployment.id().into(), instance.spec().name().into()),
                pid: status.vmm_pid,
                last_heartbeat: status.last_heartbeat,
            });
        }
    }
    subjects
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(name: &str, pid: Option<u32>) -> Subject {
        Subject {
            key: ("d".into(), name.into()),
            pid,
            last_heartbeat: Some(Duration::ZERO),
        }
    }

    #[test]
    fn figures_are_bounded_and_go_with_their_instance() {
        let samples = Samples::default();
        let own = Some(std::process::id());
        for _ in 0..KEPT + 3 {
            samples.take(vec![subject("A_IN_0", own)]);
        }
        let found = samples.of("d", "A_IN_0");
        assert_eq!(found.len(), KEPT);
        let last = found[KEPT - 1];
        assert!(last.cpu_percent.is_some() && last.resident_bytes > Some(0));
        assert!(last.heartbeat_age > Some(0.0));
        // The boot after the next has another process.
        samples.take(vec![subject("A_IN_0", None)]);
        let found = samples.of("d", "A_IN_0");
        assert_eq!(found[KEPT - 1].cpu_percent, None);
        samples.take(Vec::new());
        assert!(samples.of("d", "A_IN_0").is_empty());
    }
}
