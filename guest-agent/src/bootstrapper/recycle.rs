//! How long a role that ended waits for its next start. Pure.

use std::time::Duration;

use vmbus::message::RoleState;

/// Second delay; the first start again is at once.
const FIRST_DELAY: Duration = Duration::from_secs(5);
/// Longest delay.
const LONGEST_DELAY: Duration = Duration::from_secs(5 * 60);
/// A role that was Ready for this long starts with the first delay again.
const FORGIVEN_AFTER: Duration = Duration::from_secs(10 * 60);
/// From this end on the role's state is Cycling.
const CYCLING_FROM: u32 = 3;

/// The role's record.
#[derive(Debug, Clone, Copy, Default)]
pub struct Recycling {
    failures: u32,
    total: u32,
}

impl Recycling {
    /// The role ended by itself after being Ready for `ready_for`, if it was.
    /// The delay before the next start, and what the role is until then.
    pub fn ended(&mut self, ready_for: Option<Duration>) -> (Duration, RoleState) {
        if ready_for.is_some_and(|time| time >= FORGIVEN_AFTER) {
            self.failures = 0;
        }
        self.failures = self.failures.saturating_add(1);
        self.total = self.total.saturating_add(1);
        let delay = match self.failures {
            1 => Duration::ZERO,
            n => FIRST_DELAY
                .saturating_mul(1 << (n - 2).min(16))
                .min(LONGEST_DELAY),
        };
        let state = if self.failures >= CYCLING_FROM {
            RoleState::Cycling
        } else {
            RoleState::Recycling
        };
        (delay, state)
    }

    /// How often the role has ended by itself.
    pub const fn total(&self) -> u32 {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_between_recycles_double_to_five_minutes() {
        let mut recycling = Recycling::default();
        let seen: Vec<(u64, RoleState)> = (0..9)
            .map(|_| recycling.ended(Some(Duration::from_secs(1))))
            .map(|(delay, state)| (delay.as_secs(), state))
            .collect();
        let delays: Vec<u64> = seen.iter().map(|(delay, _)| *delay).collect();
        assert_eq!(delays, [0, 5, 10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(seen[1].1, RoleState::Recycling);
        assert_eq!(seen[2].1, RoleState::Cycling);
        let (delay, state) = recycling.ended(Some(FORGIVEN_AFTER));
        assert_eq!((delay, state), (Duration::ZERO, RoleState::Recycling));
        assert_eq!(recycling.total(), 10);
    }
}
