//! The text of metrics: values, units, and labels with any text.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use vmbus::message::RoleState;

use super::collect::{InstanceSample, Snapshot, StoreSample};
use super::process::ProcessSample;
use super::text::{Family, Kind, encode};
use crate::store::services::{Expected, OperationState, ServiceRecord};
use crate::supervisor::status::{InstanceStatus, Phase};

fn snapshot() -> Snapshot {
    let status = InstanceStatus {
        phase: Phase::Role(RoleState::Ready),
        generation: 2,
        vmm_pid: Some(7),
        applied: 3,
        recycles: 1,
        last_heartbeat: Some(Duration::from_secs(10)),
        exits: BTreeMap::from([("panic".to_owned(), 1)]),
        ..InstanceStatus::default()
    };
    Snapshot {
        now: Duration::from_millis(12_500),
        store: Some(StoreSample {
            services: vec![ServiceRecord {
                name: "shop".into(),
                expected: Expected::Started,
                generation: 1,
                deployment: Some("d1".into()),
            }],
            operations: vec![(OperationState::Succeeded, 4)],
        }),
        instances: vec![InstanceSample {
            service: "shop".into(),
            deployment: "d1".into(),
            name: "Web_IN_0".into(),
            status,
        }],
        processes: BTreeMap::from([(
            7,
            ProcessSample {
                cpu_seconds: 1.5,
                resident_bytes: 4096,
                open_fds: None,
            },
        )]),
        connections: 1,
    }
}

#[test]
fn every_state_of_a_host_has_its_line() {
    let text = encode(snapshot().families());
    let instance = r#"service="shop",deployment="d1",instance="Web_IN_0""#;
    for line in [
        r#"host_agent_services{expected="started"} 1"#.to_owned(),
        r#"host_agent_services{expected="deleted"} 0"#.to_owned(),
        r#"host_agent_operations{state="succeeded"} 4"#.to_owned(),
        r#"host_agent_operations{state="running"} 0"#.to_owned(),
        r#"host_agent_instances{state="Ready"} 1"#.to_owned(),
        format!(r#"host_agent_instance_state{{{instance},state="Ready"}} 1"#),
        format!("host_agent_instance_ready{{{instance}}} 1"),
        format!("host_agent_instance_generation{{{instance}}} 2"),
        format!("host_agent_instance_applied_incarnation{{{instance}}} 3"),
        format!("host_agent_instance_recycles{{{instance}}} 1"),
        format!(r#"host_agent_instance_guest_exits_total{{{instance},cause="panic"}} 1"#),
        format!("host_agent_instance_heartbeat_age_seconds{{{instance}}} 2.5"),
        format!("host_agent_vmm_cpu_seconds_total{{{instance}}} 1.5"),
        format!("host_agent_vmm_resident_memory_bytes{{{instance}}} 4096"),
        "host_agent_api_connections 1".to_owned(),
    ] {
        let is_it = |found: &str| found.strip_suffix(".0").unwrap_or(found) == line;
        assert!(text.lines().any(is_it), "{line}\n{text}");
    }
    // A host without services and instances has no lines about them.
    let text = encode(Snapshot::default().families());
    assert!(!text.contains("host_agent_services"), "{text}");
    assert!(!text.contains("host_agent_instance"), "{text}");
}

/// The labels of a line of the text format.
fn labels(line: &str) -> Vec<(String, String)> {
    let (_, mut rest) = line.split_once('{').expect("labels");
    let mut labels = Vec::new();
    while !rest.starts_with('}') {
        let (name, text) = rest.split_once("=\"").expect("a value in quotes");
        let mut value = String::new();
        let mut characters = text.chars();
        loop {
            match characters.next().expect("a quote ends the value") {
                '"' => break,
                '\\' => value.push(match characters.next() {
                    Some('n') => '\n',
                    Some(quoted @ ('"' | '\\')) => quoted,
                    other => panic!("{other:?} is not escaped in this format"),
                }),
                other => value.push(other),
            }
        }
        labels.push((name.trim_start_matches(',').to_owned(), value));
        rest = characters.as_str();
    }
    labels
}

proptest! {
    #![proptest_config(crate::property::cases(500))]

    #[test]
    fn any_text_in_labels_is_one_line_and_is_read_back(
        values in proptest::array::uniform2(r#"(?s)([\\"\n\r{}= ,#]|.){0,20}"#),
    ) {
        let [one, two] = values;
        let written = vec![("one", one), ("two", two)];
        let family = Family {
            name: "m",
            help: "A metric.",
            kind: Kind::Gauge,
            samples: vec![(written.clone(), 1.0)],
        };
        let text = encode(vec![family]);
        // Only a line feed ends a line.
        let lines: Vec<&str> = text.split('\n').collect();
        prop_assert_eq!(lines.len(), 4, "{}", &text);
        let read = labels(lines[2]);
        let read: Vec<_> = read.iter().map(|(name, value)| (&**name, value)).collect();
        let written: Vec<_> = written.iter().map(|(name, value)| (*name, value)).collect();
        prop_assert_eq!(read, written);
    }
}
