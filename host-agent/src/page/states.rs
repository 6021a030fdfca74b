//! The states that an instance had, from its stored events. Pure.

use serde_json::Value;

use crate::store::events::StoredEvent;
use crate::supervisor::event::state_name;

/// Longest time that is shown.
const WINDOW_MS: u64 = 24 * 60 * 60 * 1000;

/// A time in one state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stay {
    /// The state, as [`crate::supervisor::status::InstanceStatus::word`].
    pub(super) state: &'static str,
    /// Milliseconds since 1970.
    pub(super) from_ms: u64,
    /// The same.
    pub(super) to_ms: u64,
}

/// The states of an instance until `now_ms`, the oldest first, from its `events` in their
/// order. The last one is that which the instance has `now`.
pub(super) fn stays(events: &[StoredEvent], now: &'static str, now_ms: u64) -> Vec<Stay> {
    let mut stays: Vec<Stay> = Vec::new();
    // What a disk without space hides.
    let mut hidden = "Booting";
    for event in events {
        // The host's clock may have been set back.
        let at = event.record.at_ms.min(now_ms);
        let Ok(json) = serde_json::from_str(&event.record.event) else {
            continue;
        };
        let state = match change(&json) {
            Some(Change::To(state)) => {
                hidden = state;
                state
            }
            Some(Change::NoSpace) => "NoSpace",
            Some(Change::SpaceBack) => hidden,
            None => continue,
        };
        enter(&mut stays, state, at);
    }
    if stays.last().is_none_or(|last| last.state != now) {
        let from = stays.last().map_or(now_ms, |last| last.from_ms);
        // The event of the change is not stored yet.
        enter(&mut stays, now, from.max(now_ms));
    }
    if let Some(last) = stays.last_mut() {
        last.to_ms = now_ms;
    }
    let begin = now_ms.saturating_sub(WINDOW_MS);
    stays.retain(|stay| stay.to_ms >= begin);
    for stay in &mut stays {
        stay.from_ms = stay.from_ms.max(begin);
    }
    stays
}

fn enter(stays: &mut Vec<Stay>, state: &'static str, at: u64) {
    if let Some(last) = stays.last_mut() {
        last.to_ms = at.max(last.from_ms);
        if last.state == state {
            return;
        }
    }
    stays.push(Stay {
        state,
        from_ms: at,
        to_ms: at,
    });
}

/// What an event changes.
enum Change {
    To(&'static str),
    NoSpace,
    SpaceBack,
}

/// What a stored event changes, as
/// [`crate::supervisor::status::InstanceStatus::apply`] does with the event itself.
fn change(event: &Value) -> Option<Change> {
    let state = match event["event"].as_str()? {
        "guest-starting" | "guest-adopted" => "Booting",
        "agent-connected" => "Booted",
        "role" => state_name(serde_json::from_value(event["state"].clone()).ok()?),
        "guest-exited" => "Ended",
        "restarting" => "Restarting",
        "faulted" => "Faulted",
        "stopping" => "Stopping",
        "stopped" => "Stopped",
        "failed" => "Failed",
        "no-space" => return Some(Change::NoSpace),
        "space-back" => return Some(Change::SpaceBack),
        _ => return None,
    };
    Some(Change::To(state))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::events::EventRecord;
    use crate::supervisor::event::EventKind;
    use crate::supervisor::status::InstanceStatus;
    use crate::vmm::control::ExitReason;
    use vmbus::message::RoleState;

    fn stored(at_ms: u64, kind: &EventKind) -> StoredEvent {
        StoredEvent {
            number: at_ms,
            record: EventRecord {
                at_ms,
                service: None,
                deployment: None,
                instance: None,
                text: kind.to_string(),
                event: serde_json::to_string(kind).unwrap(),
            },
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

    #[test]
    fn stored_events_give_the_states_that_the_instance_had() {
        let no_space = EventKind::NoSpace {
            disk: "os".into(),
            file: "/d".into(),
            mount: "/".into(),
            needed_bytes: 1,
            free_bytes: None,
            quota: false,
        };
        let kinds = [
            EventKind::DisksReady { kept: false },
            EventKind::GuestStarting {
                generation: 1,
                pid: 7,
            },
            EventKind::AgentConnected {
                init_ms: 1,
                agent: "a".into(),
            },
            role(RoleState::Starting),
            role(RoleState::Ready),
            no_space,
            EventKind::SpaceBack { paused_ms: 1 },
            role(RoleState::Recycling),
            EventKind::GuestExited {
                reason: ExitReason::Panic,
                because: None,
            },
            EventKind::Restarting {
                because: "x".into(),
                generation: 2,
                delay_ms: 1,
            },
            EventKind::Faulted {
                because: "x".into(),
                retry_in_ms: 1,
            },
            EventKind::Failed { error: "x".into() },
            EventKind::Stopping,
            EventKind::Stopped { clean: true },
        ];
        let mut status = InstanceStatus::default();
        let mut events = Vec::new();
        for (at, kind) in (100..).zip(&kinds) {
            status.apply(kind);
            events.push(stored(at, kind));
            if at == 100 {
                continue;
            }
            let stays = stays(&events, status.word(), at);
            assert_eq!(stays.last().unwrap().from_ms, at, "{kind:?}: {stays:?}");
            assert_eq!(stays.last().unwrap().state, status.word(), "{kind:?}");
        }
        let all = stays(&events, "Stopped", 1000);
        assert_eq!(all.len(), 13);
        assert_eq!(all[12].to_ms, 1000);
        for pair in all.windows(2) {
            assert_eq!(pair[0].to_ms, pair[1].from_ms);
        }
    }

    #[test]
    fn a_day_is_shown_and_a_clock_set_back_gives_no_negative_time() {
        let day = 24 * 60 * 60 * 1000;
        let events = [
            stored(5, &role(RoleState::Ready)),
            stored(3 * day, &role(RoleState::Busy)),
            stored(7, &role(RoleState::Ready)),
        ];
        let stays = stays(&events, "Ready", 2 * day);
        assert_eq!(stays.first().unwrap().from_ms, day);
        assert!(stays.iter().all(|stay| stay.from_ms <= stay.to_ms));
        assert_eq!(super::stays(&[], "Accepted", 9).len(), 1);
    }
}
