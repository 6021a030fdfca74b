//! The steps of an instance's start, from its timeline. Pure.

use std::time::Duration;

use vmbus::message::RoleState;

use super::{Outcome, StepReport};
use crate::supervisor::event::{EventKind, TimelineEvent};

/// The steps from the command to Ready. The image is verified once for all
/// instances.
const NAMES: [&str; 5] = ["image", "disks", "boot", "agent", "role"];

/// The steps of `instance` until it was Ready for the first time. If `failure`
/// came before that, the step in progress failed and later ones were skipped.
pub fn stages(
    events: &[TimelineEvent],
    instance: &str,
    failure: Option<&StageFailure>,
) -> Vec<StepReport> {
    let own = |event: &&TimelineEvent| {
        event.instance.as_deref() == Some(instance)
            || matches!(event.kind, EventKind::ImageVerified { .. })
    };
    let mut ends: Vec<Duration> = Vec::new();
    let mut last = Duration::ZERO;
    for event in events.iter().filter(own) {
        last = event.at;
        if ends.len() < NAMES.len() && ends_stage(&event.kind, ends.len()) {
            ends.push(event.at);
        }
    }
    let mut begin = Duration::ZERO;
    let mut steps = Vec::new();
    for (number, name) in NAMES.into_iter().enumerate() {
        let step = match (ends.get(number), failure) {
            (Some(end), _) => {
                let ms = millis(end.saturating_sub(begin));
                begin = *end;
                StepReport::new(name, Outcome::Ok, ms)
            }
            (None, Some(failure)) if number == ends.len() => StepReport {
                detail: Some(failure.detail.clone()),
                code: Some(failure.code.clone()),
                ..StepReport::new(name, Outcome::Fail, millis(last.saturating_sub(begin)))
            },
            (None, _) => StepReport::new(name, Outcome::Skip, 0),
        };
        steps.push(step);
    }
    steps
}

/// Why an instance is not Ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageFailure {
    /// A sentence.
    pub detail: String,
    /// `HA-nnnn`.
    pub code: String,
}

fn ends_stage(kind: &EventKind, stage: usize) -> bool {
    match stage {
        0 => matches!(kind, EventKind::ImageVerified { .. }),
        1 => matches!(kind, EventKind::DisksReady { .. }),
        2 => matches!(kind, EventKind::AgentConnected { .. }),
        3 => matches!(kind, EventKind::GuestAgent { error: None }),
        _ => matches!(
            kind,
            EventKind::Role {
                state: RoleState::Ready,
                ..
            }
        ),
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(ms: u64, instance: &str, kind: EventKind) -> TimelineEvent {
        TimelineEvent {
            at: Duration::from_millis(ms),
            deployment: None,
            instance: Some(instance.into()),
            kind,
        }
    }

    fn role(state: RoleState) -> EventKind {
        EventKind::Role {
            state,
            detail: String::new(),
            recycles: 0,
            last_exit: None,
            retry_in_ms: None,
        }
    }

    fn timeline() -> Vec<TimelineEvent> {
        vec![
            TimelineEvent {
                instance: None,
                ..event(
                    5,
                    "",
                    EventKind::ImageVerified {
                        image: "minimal".into(),
                        cached: true,
                    },
                )
            },
            event(20, "A_IN_0", EventKind::DisksReady { kept: false }),
            event(25, "B_IN_0", EventKind::DisksReady { kept: false }),
            event(
                1020,
                "A_IN_0",
                EventKind::AgentConnected {
                    init_ms: 900,
                    agent: "app-agent".into(),
                },
            ),
            event(1100, "A_IN_0", EventKind::GuestAgent { error: None }),
            event(1150, "A_IN_0", role(RoleState::Starting)),
            event(1200, "A_IN_0", role(RoleState::Ready)),
            event(3000, "B_IN_0", EventKind::Stopping),
            event(9000, "A_IN_0", role(RoleState::Ready)),
        ]
    }

    #[test]
    fn each_step_begins_at_the_end_of_the_one_before() {
        let steps = stages(&timeline(), "A_IN_0", None);
        let seen: Vec<_> = steps.iter().map(|s| (s.name.as_str(), s.ms)).collect();
        assert_eq!(
            seen,
            [
                ("image", 5),
                ("disks", 15),
                ("boot", 1000),
                ("agent", 80),
                ("role", 100)
            ]
        );
        assert!(steps.iter().all(|step| step.result == Outcome::Ok));
    }

    #[test]
    fn the_step_in_progress_fails_and_later_ones_are_skipped() {
        let failure = StageFailure {
            detail: "kernel panic".into(),
            code: "HA-0301".into(),
        };
        let steps = stages(&timeline(), "B_IN_0", Some(&failure));
        let seen: Vec<_> = steps.iter().map(|step| step.result).collect();
        assert_eq!(
            seen,
            [
                Outcome::Ok,
                Outcome::Ok,
                Outcome::Fail,
                Outcome::Skip,
                Outcome::Skip
            ]
        );
        assert_eq!(steps[2].ms, 2975);
        assert_eq!(steps[2].detail.as_deref(), Some("kernel panic"));
    }
}
