//! What the bootstrapper has to say, to whichever guest agent listens. Pure.

use std::time::Instant;

use vmbus::message::Goal;

use super::{Role, Said};
use crate::log::RECORD_OVERHEAD;
use crate::log::backlog::Backlog;

/// Bytes of the role's lines that wait while no guest agent takes them. A role
/// never waits for a guest agent: then the oldest lines are lost, and counted.
const LIMIT: usize = 1 << 20;

/// The queue and the present state.
#[derive(Debug)]
pub struct Outbox {
    goal: Option<Box<Goal>>,
    role: Role,
    role_since: Instant,
    waiting: Backlog<Said>,
    attached: bool,
    /// What was taken last may not be sent yet.
    sending: bool,
}

impl Outbox {
    /// Nothing was ordered, nobody listens.
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

    /// This is what runs from now on.
    pub fn ordered(&mut self, goal: Goal) {
        self.goal = Some(Box::new(goal));
    }

    /// The role's state is this one since `now`.
    pub fn state(&mut self, role: Role, now: Instant) {
        // Who attaches later is told the present state.
        if self.attached {
            self.waiting.push(Said::State(role.clone()), 0);
        }
        self.role = role;
        self.role_since = now;
    }

    /// The role wrote a line.
    pub fn line(&mut self, stream: &str, uptime_ms: u64, text: String) {
        let bytes = stream.len() + text.len() + RECORD_OVERHEAD;
        let line = Said::Line {
            stream: stream.to_owned(),
            uptime_ms,
            dropped: 0,
            text,
        };
        self.waiting.push(line, bytes);
    }

    /// A guest agent listens from `now` on; the first thing to tell it.
    pub fn attach(&mut self, now: Instant) -> Said {
        self.detach();
        self.attached = true;
        self.sending = true;
        let mut role = self.role.clone();
        if let Some(wait) = &mut role.retry_in_ms {
            let gone = now.saturating_duration_since(self.role_since).as_millis();
            *wait = wait.saturating_sub(u64::try_from(gone).unwrap_or(u64::MAX));
        }
        Said::Hello {
            goal: self.goal.clone(),
            role,
        }
    }

    /// Nobody listens any more: lines wait, states are for the next hello.
    pub fn detach(&mut self) {
        self.attached = false;
        self.sending = false;
        self.waiting
            .retain(|said| matches!(said, Said::Line { .. }));
    }

    /// The next thing to tell, after the one before it was sent.
    pub fn pop(&mut self) -> Option<Said> {
        self.sending = !self.waiting.is_empty();
        let mut said = self.waiting.pop()?;
        if let Said::Line { dropped, .. } = &mut said {
            *dropped = self.waiting.take_lost();
        }
        Some(said)
    }

    /// Whether somebody listens to whom something is left to tell.
    pub fn owes(&self) -> bool {
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
    fn a_second_guest_agent_hears_the_present_state_first_then_the_lines_made_meanwhile() {
        let start = Instant::now();
        let mut outbox = Outbox::new(start);
        outbox.attach(start);
        outbox.state(role(RoleState::Starting), start);
        outbox.line("out", 1, "first".into());
        assert_eq!(outbox.pop(), Some(Said::State(role(RoleState::Starting))));
        // The first guest agent dies here: states it did not hear are stale.
        outbox.state(role(RoleState::Busy), start);
        outbox.detach();
        assert!(!outbox.owes());
        outbox.state(role(RoleState::Recycling), start);
        outbox.line("err", 2, "second".into());
        let hello = outbox.attach(start + Duration::from_secs(2));
        let Said::Hello { role, .. } = hello else {
            panic!("not a hello: {hello:?}");
        };
        assert_eq!(role.state, RoleState::Recycling);
        assert_eq!(role.retry_in_ms, Some(3000));
        let lines: Vec<Said> = std::iter::from_fn(|| outbox.pop()).collect();
        assert!(
            matches!(&lines[..], [Said::Line { text: a, .. }, Said::Line { text: b, .. }]
                if a == "first" && b == "second"),
            "{lines:?}"
        );
    }

    #[test]
    fn a_flood_while_nobody_listens_keeps_the_last_mebibyte_and_counts_the_rest() {
        let mut outbox = Outbox::new(Instant::now());
        for number in 0..100_000_u32 {
            outbox.line("out", 0, format!("{number:>1000}"));
        }
        outbox.attach(Instant::now());
        let Some(Said::Line { dropped, text, .. }) = outbox.pop() else {
            panic!("no line");
        };
        assert_eq!(text.trim().parse(), Ok(dropped));
        let mut kept = 1;
        while let Some(Said::Line { dropped, .. }) = outbox.pop() {
            assert_eq!(dropped, 0);
            kept += 1;
        }
        assert_eq!(dropped + kept, 100_000);
        assert!((800..1048).contains(&kept), "{kept}");
    }
}
