//! The state of a host at one scrape, and the metrics of it. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use super::super::types::PROGRAM;
use super::process::ProcessSample;
use super::text::{Family, Kind, Labels};
use crate::store::services::{Expected, OperationState, ServiceRecord};
use crate::supervisor::status::InstanceStatus;

/// The state of a host.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    /// `CLOCK_MONOTONIC`.
    pub(super) now: Duration,
    /// What its store has; `None` of a host that keeps no services.
    pub(super) store: Option<StoreSample>,
    pub(super) instances: Vec<InstanceSample>,
    /// By process id: this process and VMM processes.
    pub(super) processes: BTreeMap<u32, ProcessSample>,
    pub(super) connections: usize,
}

/// What the store has.
#[derive(Debug)]
pub(super) struct StoreSample {
    pub(super) services: Vec<ServiceRecord>,
    pub(super) operations: Vec<(OperationState, u64)>,
}

impl StoreSample {
    /// Name of the service of a deployment.
    pub(super) fn service_of(&self, deployment: &str) -> Option<&str> {
        let mut services = self.services.iter();
        let found = services.find(|it| it.deployment.as_deref() == Some(deployment));
        Some(found?.name.as_str())
    }
}

/// An instance.
#[derive(Debug)]
pub(super) struct InstanceSample {
    pub(super) service: String,
    pub(super) deployment: String,
    pub(super) name: String,
    pub(super) status: InstanceStatus,
}

impl InstanceSample {
    fn labels(&self) -> Labels {
        vec![
            ("service", self.service.clone()),
            ("deployment", self.deployment.clone()),
            ("instance", self.name.clone()),
        ]
    }

    fn labels_and(&self, name: &'static str, value: &str) -> Labels {
        let mut labels = self.labels();
        labels.push((name, value.to_owned()));
        labels
    }
}

impl Snapshot {
    /// Every metric.
    pub(super) fn families(&self) -> Vec<Family> {
        let mut families = vec![gauge(
            "host_agent_build_info",
            "Version of the program that answers; always 1.",
            vec![(one("version", PROGRAM), 1.0)],
        )];
        families.extend(self.of_store());
        families.extend(self.of_instances());
        families.extend(self.of_vmm_processes());
        families.push(gauge(
            "host_agent_api_connections",
            "Connections to the API, this one included.",
            vec![(Vec::new(), self.connections as f64)],
        ));
        families.extend(self.of_this_process());
        families
    }

    fn of_store(&self) -> Vec<Family> {
        let Some(store) = &self.store else {
            return Vec::new();
        };
        let expected = |name, wanted| {
            let services = store.services.iter();
            let count = services.filter(|it| it.expected == wanted).count();
            (one("expected", name), count as f64)
        };
        let operations = |name, wanted| {
            let mut counts = store.operations.iter();
            let count = counts.find(|(state, _)| *state == wanted);
            (one("state", name), count.map_or(0, |(_, n)| *n) as f64)
        };
        vec![
            gauge(
                "host_agent_services",
                "Services by what is wanted of them.",
                vec![
                    expected("started", Expected::Started),
                    expected("stopped", Expected::Stopped),
                    expected("deleted", Expected::Deleted),
                ],
            ),
            gauge(
                "host_agent_operations",
                "Operations that the store keeps, by state.",
                vec![
                    operations("running", OperationState::Running),
                    operations("succeeded", OperationState::Succeeded),
                    operations("failed", OperationState::Failed),
                    operations("paused", OperationState::Paused),
                    operations("halted", OperationState::Halted),
                    operations("rolled-back", OperationState::RolledBack),
                ],
            ),
        ]
    }

    fn of_instances(&self) -> Vec<Family> {
        let mut states: BTreeMap<&str, u64> = BTreeMap::new();
        for instance in &self.instances {
            *states.entry(instance.status.word()).or_default() += 1;
        }
        let states = states
            .iter()
            .map(|(state, n)| (one("state", state), *n as f64));
        let each = |value: fn(&InstanceSample) -> f64| {
            let instances = self.instances.iter();
            instances.map(|it| (it.labels(), value(it))).collect()
        };
        let exits = self.instances.iter().flat_map(|it| {
            let exits = it.status.exits.iter();
            exits.map(|(cause, n)| (it.labels_and("cause", cause), *n as f64))
        });
        let ages = self.instances.iter().filter_map(|it| {
            let age = self.now.saturating_sub(it.status.last_heartbeat?);
            Some((it.labels(), age.as_secs_f64()))
        });
        vec![
            gauge(
                "host_agent_instances",
                "Instances by state.",
                states.collect(),
            ),
            gauge(
                "host_agent_instance_state",
                "1 for the state that the instance has.",
                self.instances
                    .iter()
                    .map(|it| (it.labels_and("state", it.status.word()), 1.0))
                    .collect(),
            ),
            gauge(
                "host_agent_instance_ready",
                "Whether the instance takes connections.",
                each(|it| f64::from(u8::from(it.status.is_ready()))),
            ),
            gauge(
                "host_agent_instance_generation",
                "Number of the guest's boot, 0 before the first.",
                each(|it| it.status.generation as f64),
            ),
            gauge(
                "host_agent_instance_applied_incarnation",
                "Incarnation of the goal that the guest has applied in this boot.",
                each(|it| it.status.applied as f64),
            ),
            gauge(
                "host_agent_instance_recycles",
                "Times that the role ended by itself in this boot.",
                each(|it| f64::from(it.status.recycles)),
            ),
            counter(
                "host_agent_instance_guest_exits",
                "Guests of the instance that ended since this host agent started, by cause.",
                exits.collect(),
            ),
            gauge(
                "host_agent_instance_heartbeat_age_seconds",
                "Time since the last heartbeat of this boot.",
                ages.collect(),
            ),
        ]
    }

    fn of_vmm_processes(&self) -> Vec<Family> {
        let each = |value: fn(&ProcessSample) -> f64| {
            let known = self.instances.iter().filter_map(|it| {
                let process = self.processes.get(&it.status.vmm_pid?)?;
                Some((it.labels(), value(process)))
            });
            known.collect()
        };
        vec![
            counter(
                "host_agent_vmm_cpu_seconds",
                "Processor time of the VMM process, the guest's included.",
                each(|process| process.cpu_seconds),
            ),
            gauge(
                "host_agent_vmm_resident_memory_bytes",
                "Resident memory of the VMM process, the guest's included.",
                each(|process| process.resident_bytes as f64),
            ),
        ]
    }

    fn of_this_process(&self) -> Vec<Family> {
        let own = self.processes.get(&std::process::id());
        let sample = |value: Option<f64>| {
            let samples = value.map(|value| (Vec::new(), value));
            samples.into_iter().collect()
        };
        vec![
            counter(
                "process_cpu_seconds",
                "Processor time of the host agent.",
                sample(own.map(|it| it.cpu_seconds)),
            ),
            gauge(
                "process_resident_memory_bytes",
                "Resident memory of the host agent.",
                sample(own.map(|it| it.resident_bytes as f64)),
            ),
            gauge(
                "process_open_fds",
                "Open descriptors of the host agent.",
                sample(own.and_then(|it| it.open_fds).map(|n| n as f64)),
            ),
        ]
    }
}

fn one(name: &'static str, value: &str) -> Labels {
    vec![(name, value.to_owned())]
}

fn gauge(name: &'static str, help: &'static str, samples: Vec<(Labels, f64)>) -> Family {
    Family {
        name,
        help,
        kind: Kind::Gauge,
        samples,
    }
}

/// The encoder appends `_total` to `name`.
fn counter(name: &'static str, help: &'static str, samples: Vec<(Labels, f64)>) -> Family {
    Family {
        name,
        help,
        kind: Kind::Counter,
        samples,
    }
}
