//! What the bootstrapper has to send to the guest agent that is connected. Pure.

use std::time::Instant;

use vmbus::message::Goal;

use super::{BootstrapperEvent, Role};
use crate::log::RECORD_OVERHEAD;
use crate::log::backlog::Backlog;

/// Bytes of the role's lines that wait while no guest agent takes them. A role never
/// waits for a guest agent: the oldest lines are lost instead, and counted.
const LIMIT: usize = 1 << 20;

/// The queue and the present state.
#[derive(Debug)]
pub struct Outbox {
    goal: Option<Box<Goal>>,
    role: Role,
    role_since: Instant,
    waiting: Backlog<BootstrapperEvent>,
    attached: bool,
    /// The event taken last may not be sent yet.
    sending: bool,
}

impl Outbox {
    /// No order came, no guest agent is attached.
    pub fn new(now: Instant) -> Self {
        Self {
            goal: None,
            role: Role::unknown(),
            role_since: now,
            waiting: Backlog::new(LIMIT),
            attached: false,
            sending: false,
        }
    }

    /// The order to run this goal's role came.
    pub fn ordered(&mut self, goal: Goal) {
        self.goal = Some(Box::new(goal));
    }

    /// The role's state is this one since `now`.
    pub fn state(&mut self, role: Role, now: Instant) {
        // The hello of a later connection has the present state.
        if self.attached {
            self.waiting.push(BootstrapperEvent::State(role.clone()), 0);
        }
        self.role = role;
        self.role_since = now;
    }

    /// The role wrote a line.
    pub fn line(&mut self, stream: &str, uptime_ms: u64, text: String) {
        let bytes = stream.len() + text.len() + RECORD_OVERHEAD;
        let line = BootstrapperEvent::Line {
            stream: stream.to_owned(),
            uptime_ms,
            dropped: 0,
            text,
        };
        self.waiting.push(line, bytes);
    }

    /// A guest agent is attached from `now` on; its hello.
    pub fn attach(&mut self, now: Instant) -> BootstrapperEvent {
        self.detach();
        self.attached = true;
        self.sending = true;
        let mut role = self.role.clone();
        if let Some(wait) = &mut role.retry_in_ms {
            let gone = now.saturating_duration_since(self.role_since).as_millis();
            *wait = wait.saturating_sub(u64::try_from(gone).unwrap_or(u64::MAX));
        }
        BootstrapperEvent::Hello {
            goal: self.goal.clone(),
            role,
        }
    }

    /// No guest agent is attached any more: lines wait, states are dropped, since the next
    /// hello has the present one.
    pub fn detach(&mut self) {
        self.attached = false;
        self.sending = false;
        self.waiting
            .retain(|event| matches!(event, BootstrapperEvent::Line { .. }));
    }

    /// The next event to send. The one before it was sent.
    pub fn pop(&mut self) -> Option<BootstrapperEvent> {
        self.sending = !self.waiting.is_empty();
        let mut event = self.waiting.pop()?;
        if let BootstrapperEvent::Line { dropped, .. } = &mut event {
            *dropped = self.waiting.take_lost();
        }
        Some(event)
    }

    /// Whether a guest agent is attached and something is left to send.
    pub fn has_unsent(&self) -> bool {
        self.attached && (self.sending || !self.waiting.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use vmbus::message::RoleState;

    fn role(state: RoleState) -> Role {
        Role {
            state,
            retry_in_ms: Some(5000),
            ..Role::unknown()
        }
    }

    #[test]
    fn a_second_guest_agent_gets_present_state_then_missed_lines() {
        let start = Instant::now();
        let mut outbox = Outbox::new(start);
        outbox.attach(start);
        outbox.state(role(RoleState::Starting), start);
        outbox.line("out", 1, "first".into());
        let starting = BootstrapperEvent::State(role(RoleState::Starting));
        assert_eq!(outbox.pop(), Some(starting));
        // The first guest agent dies here: states that it did not get are stale.
        outbox.state(role(RoleState::Busy), start);
        outbox.detach();
        assert!(!outbox.has_unsent());
        outbox.state(role(RoleState::Recycling), start);
        outbox.line("err", 2, "second".into());
        let hello = outbox.attach(start + Duration::from_secs(2));
        let BootstrapperEvent::Hello { role, .. } = hello else {
            panic!("not a hello: {hello:?}");
        };
        assert_eq!(role.state, RoleState::Recycling);
        assert_eq!(role.retry_in_ms, Some(3000));
        let lines: Vec<BootstrapperEvent> = std::iter::from_fn(|| outbox.pop()).collect();
        assert!(
            matches!(
                &lines[..],
                [
                    BootstrapperEvent::Line { text: first, .. },
                    BootstrapperEvent::Line { text: second, .. }
                ] if first == "first" && second == "second"
            ),
            "{lines:?}"
        );
    }

    #[test]
    fn a_flood_without_a_reader_keeps_the_last_mebibyte() {
        let mut outbox = Outbox::new(Instant::now());
        for number in 0..100_000_u32 {
            outbox.line("out", 0, format!("{number:>1000}"));
        }
        outbox.attach(Instant::now());
        let Some(BootstrapperEvent::Line { dropped, text, .. }) = outbox.pop() else {
            panic!("no line");
        };
        assert_eq!(text.trim().parse(), Ok(dropped));
        let mut kept = 1;
        while let Some(BootstrapperEvent::Line { dropped, .. }) = outbox.pop() {
            assert_eq!(dropped, 0);
            kept += 1;
        }
        assert_eq!(dropped + kept, 100_000);
        assert!((800..1048).contains(&kept), "{kept}");
    }
}
