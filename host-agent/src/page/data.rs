//! From the state of the host and the rows of the store to what a page shows. Pure.

use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use super::plot::{Plot, plot};
use super::samples::Sample;
use super::states::Stay;
use super::views::{
    EndpointRow, EventRow, InstanceRow, Mood, OperationRow, RevisionRow, ServiceRow, Strip,
    StripPart,
};
use crate::controller::ServiceState;
use crate::store::events::StoredEvent;
use crate::store::services::{Expected, Operation, OperationState, Revision};
use crate::supervisor::instance::InstanceHandle;

/// Width of the strip of states in its own units.
const STRIP: u32 = 600;
/// Least width of a state: a restart within a day is seen.
const STRIP_LEAST: f64 = 2.0;

/// How a state of an instance is to be seen.
pub(super) fn mood(state: &str) -> Mood {
    match state {
        "Ready" => Mood::Good,
        "NoSpace" | "Ended" | "Faulted" | "Failed" | "Cycling" | "Recycling" => Mood::Bad,
        "Accepted" | "Unknown" | "Stopping" | "Stopped" => Mood::Off,
        _ => Mood::Busy,
    }
}

pub(super) fn instance_row(
    service: &str,
    instance: &InstanceHandle,
    monotonic: Duration,
) -> InstanceRow {
    let (spec, status) = (instance.spec(), instance.status());
    let age = status
        .last_heartbeat
        .map(|last| monotonic.saturating_sub(last));
    let endpoints = spec.endpoints.iter().map(|endpoint| EndpointRow {
        name: endpoint.label.clone(),
        address: endpoint.address.to_string(),
        local_port: endpoint.local_port,
    });
    InstanceRow {
        service: service.to_owned(),
        name: spec.name().to_owned(),
        state: status.word(),
        mood: mood(status.word()),
        paused: status.paused,
        generation: status.generation,
        recycles: status.recycles,
        heartbeat: age.map_or_else(|| "none in this boot".into(), ago),
        endpoints: endpoints.collect(),
        exits: status.exits.into_iter().collect(),
        no_space: status.no_space,
    }
}

/// The instances of a service.
pub(super) fn instance_rows(state: &ServiceState, monotonic: Duration) -> Vec<InstanceRow> {
    let deployment = state.deployment.as_ref();
    let instances = deployment.map_or(&[][..], |it| it.instances());
    let rows = instances.iter();
    rows.map(|it| instance_row(&state.record.name, it, monotonic))
        .collect()
}

pub(super) fn service_row(state: &ServiceState) -> ServiceRow {
    let deployment = state.deployment.as_ref();
    let instances = deployment.map_or(&[][..], |it| it.instances());
    let ready = instances.iter().filter(|it| it.status().is_ready()).count();
    let (record, all) = (&state.record, instances.len());
    let failed = state.operation.as_ref();
    let failed = failed.is_some_and(|it| {
        use OperationState::{Failed, Halted};
        matches!(it.state, Failed | Halted)
    });
    let (summary, mood) = if deployment.is_none() {
        let mood = if failed { Mood::Bad } else { Mood::Off };
        ("nothing runs".into(), mood)
    } else if ready == all && record.expected == Expected::Started {
        (format!("{ready} of {all} Ready"), Mood::Good)
    } else {
        let mood = if failed { Mood::Bad } else { Mood::Busy };
        (format!("{ready} of {all} Ready"), mood)
    };
    ServiceRow {
        name: record.name.clone(),
        wanted: word(&record.expected),
        summary,
        mood,
        generation: record.generation,
        deployment: record.deployment.clone(),
        operation: state.operation.as_ref().map(operation_row),
    }
}

pub(super) fn operation_row(operation: &Operation) -> OperationRow {
    let took = operation.ended_ms.map(|ended| {
        let ms = ended.saturating_sub(operation.started_ms);
        span(Duration::from_millis(ms))
    });
    OperationRow {
        kind: word(&operation.kind),
        state: word(&operation.state),
        mood: match operation.state {
            OperationState::Running | OperationState::Paused => Mood::Busy,
            OperationState::Succeeded => Mood::Good,
            OperationState::Failed | OperationState::Halted | OperationState::RolledBack => {
                Mood::Bad
            }
        },
        generation: operation.generation,
        started: time(operation.started_ms),
        took: took.unwrap_or_default(),
        user: operation.user,
        error: operation.error.clone().unwrap_or_default(),
    }
}

pub(super) fn revision_row(revision: &Revision) -> RevisionRow {
    RevisionRow {
        generation: revision.generation,
        package: revision.wanted.package.hex(),
        at: time(revision.at_ms),
        user: revision.user,
    }
}

/// The newest event first. `within` is the service whose page it is.
pub(super) fn event_rows(events: &[StoredEvent], within: Option<&str>) -> Vec<EventRow> {
    let rows = events.iter().rev().map(|event| {
        let record = &event.record;
        let service = record.service.as_deref();
        let service = service.filter(|service| Some(*service) != within);
        let about: Vec<&str> = service
            .into_iter()
            .chain(record.instance.as_deref())
            .collect();
        EventRow {
            at: time(record.at_ms),
            about: about.join(" "),
            text: record.text.clone(),
        }
    });
    rows.collect()
}

pub(super) fn strip(stays: &[Stay]) -> Strip {
    let begin = stays.first().map_or(0, |stay| stay.from_ms);
    let end = stays.last().map_or(begin, |stay| stay.to_ms);
    let scale = f64::from(STRIP) / (end.saturating_sub(begin)).max(1) as f64;
    let mut parts = Vec::new();
    for stay in stays {
        let x = stay.from_ms.saturating_sub(begin) as f64 * scale;
        let stayed = stay.to_ms.saturating_sub(stay.from_ms);
        let width = (stayed as f64 * scale).max(STRIP_LEAST);
        let length = span(Duration::from_millis(stayed));
        parts.push(StripPart {
            mood: mood(stay.state),
            x: format!("{:.1}", x.min(f64::from(STRIP) - STRIP_LEAST)),
            width: format!("{width:.1}"),
            title: format!("{} for {length} from {}", stay.state, time(stay.from_ms)),
        });
    }
    let now = stays.last().map_or("Unknown", |stay| stay.state);
    let begin = time(begin);
    Strip {
        width: STRIP,
        label: format!("{now} now; {} states since {begin}", stays.len()),
        since: begin,
        parts,
    }
}

pub(super) fn plots(samples: &[Sample]) -> Vec<Plot> {
    let values = |value: fn(&Sample) -> Option<f64>| samples.iter().map(value).collect::<Vec<_>>();
    let percent = |value: f64| format!("{value:.0} % of a processor");
    let mib = |value: f64| format!("{:.0} MiB", value / f64::from(1 << 20));
    let seconds = |value: f64| format!("{value:.0} s");
    let resident = |it: &Sample| it.resident_bytes.map(|bytes| bytes as f64);
    let all = [
        plot("Processor time", &values(|it| it.cpu_percent), percent),
        plot("Memory", &values(resident), mib),
        plot("Heartbeat age", &values(|it| it.heartbeat_age), seconds),
    ];
    all.into_iter().flatten().collect()
}

/// The name of a value in the API.
fn word(value: &impl Serialize) -> String {
    let value = serde_json::to_value(value).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

/// RFC 3339 with seconds.
fn time(ms: u64) -> String {
    let ms = i64::try_from(ms).unwrap_or(i64::MAX);
    Timestamp::from_millisecond(ms).map_or_else(|_| ms.to_string(), |it| format!("{it:.0}"))
}

fn ago(age: Duration) -> String {
    format!("{} ago", span(age))
}

/// A span in its two largest units.
fn span(span: Duration) -> String {
    let seconds = span.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, _, _) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_their_two_largest_units() {
        let spans = [0, 59, 60, 3600, 90_061].map(|it| span(Duration::from_secs(it)));
        assert_eq!(spans, ["0 s", "59 s", "1 min 0 s", "1 h 0 min", "1 d 1 h"]);
    }

    #[test]
    fn a_short_state_is_seen_in_a_long_strip() {
        let stay = |state, from_ms, to_ms| Stay {
            state,
            from_ms,
            to_ms,
        };
        let stays = [
            stay("Ready", 0, 86_000_000),
            stay("Ended", 86_000_000, 86_000_001),
        ];
        let strip = strip(&stays);
        assert_eq!(
            (&*strip.parts[1].x, &*strip.parts[1].width),
            ("598.0", "2.0")
        );
        assert_eq!(
            strip.label,
            "Ended now; 2 states since 1970-01-01T00:00:00Z"
        );
    }
}
