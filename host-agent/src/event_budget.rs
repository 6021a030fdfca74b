//! How many events may a guest cause in one boot, and from when on is that a flood?

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::token_bucket::{Rate, TokenBucket};

/// Events of one boot that its guest or its VMM process can cause, over the control socket
/// and all channels together. A guest that boots causes some dozens, and one whose agents
/// restart some more.
const EVENTS: Rate = Rate::new(512, Duration::from_millis(10));
/// Events beyond [`EVENTS`] until the guest floods: about ten seconds of nothing else.
const EXCESS: Rate = Rate::new(1000, Duration::from_secs(1));

/// Time for which a source whose event exceeded the budget is not read.
pub const PAUSE: Duration = Duration::from_millis(10);

/// The budget of one boot.
#[derive(Debug)]
pub struct EventBudget(Mutex<State>);

#[derive(Debug)]
struct State {
    events: TokenBucket<Instant>,
    excess: TokenBucket<Instant>,
    floods: bool,
}

impl Default for EventBudget {
    fn default() -> Self {
        Self::new(EVENTS, EXCESS)
    }
}

impl EventBudget {
    /// A full budget.
    pub const fn new(events: Rate, excess: Rate) -> Self {
        Self(Mutex::new(State {
            events: TokenBucket::new(events),
            excess: TokenBucket::new(excess),
            floods: false,
        }))
    }

    /// Counts an event at `now`. False if it exceeds the budget: its source is read again
    /// after [`PAUSE`].
    pub fn spend(&self, now: Instant) -> bool {
        let mut state = self.lock();
        let within = state.events.take(now);
        if !within && !state.excess.take(now) {
            state.floods = true;
        }
        within
    }

    /// Whether the guest has exceeded the budget for so long that it is to be ended.
    pub fn floods(&self) -> bool {
        self.lock().floods
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_no_flood_but_ten_seconds_of_excess_are() {
        let budget = EventBudget::default();
        let start = Instant::now();
        assert!((0..512).all(|_| budget.spend(start)));
        assert!(!budget.spend(start));
        assert!(!budget.floods());
        let mut now = start;
        let mut events = 0;
        while !budget.floods() {
            now += if budget.spend(now) {
                Duration::ZERO
            } else {
                PAUSE
            };
            events += 1;
        }
        let took = now - start;
        assert!((9..12).contains(&took.as_secs()), "{took:?}");
        assert!(events < 2500, "{events}");
    }

    #[test]
    fn a_guest_within_its_rate_never_floods() {
        let budget = EventBudget::default();
        let start = Instant::now();
        for tick in 0..24 * 3600 {
            let now = start + Duration::from_secs(tick);
            assert!((0..100).all(|_| budget.spend(now)));
        }
        assert!(!budget.floods());
    }
}
