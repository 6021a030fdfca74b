//! When may a guest be started again? Pure: a budget of delays.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// First delay after the free restart.
const FIRST_DELAY: Duration = Duration::from_secs(10);
/// Longest delay of a guest that is not faulted.
const LONGEST_DELAY: Duration = Duration::from_mins(15);
/// Heartbeats for this long reset the delays.
const FORGIVEN_AFTER: Duration = Duration::from_mins(30);
/// Boots in a row without a heartbeat after which a guest is faulted.
const FRUITLESS_BOOTS: u32 = 5;
/// Delay between tries of a faulted guest.
const FAULTED_DELAY: Duration = Duration::from_hours(1);

/// One guest's restart budget.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RestartBudget {
    /// Restarts since the delays were last reset.
    restarts: u32,
    /// Boots in a row without a heartbeat.
    fruitless: u32,
}

/// What the budget allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Start again after this delay.
    After(Duration),
    /// The guest is faulted: report that, and start again after this delay.
    Faulted(Duration),
}

impl RestartBudget {
    /// Whether the guest is faulted: its last boots had no heartbeat.
    pub const fn is_faulted(&self) -> bool {
        self.fruitless >= FRUITLESS_BOOTS
    }

    /// A boot ended. `healthy_for` is how long heartbeats came, if any came;
    /// `jitter` in 0..=1 spreads delays by a quarter each way.
    pub fn boot_ended(&mut self, healthy_for: Option<Duration>, jitter: f64) -> Decision {
        match healthy_for {
            None => self.fruitless = self.fruitless.saturating_add(1),
            Some(time) => {
                self.fruitless = 0;
                if time >= FORGIVEN_AFTER {
                    self.restarts = 0;
                }
            }
        }
        if self.is_faulted() {
            return Decision::Faulted(FAULTED_DELAY);
        }
        let delay = match self.restarts {
            // A guest that was healthy gets one restart at once.
            0 if healthy_for.is_some() => Duration::ZERO,
            0 => FIRST_DELAY,
            n => FIRST_DELAY
                .saturating_mul(1 << (n - 1).min(16))
                .min(LONGEST_DELAY),
        };
        self.restarts = self.restarts.saturating_add(1);
        Decision::After(delay.mul_f64(0.75 + jitter.clamp(0.0, 1.0) / 2.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIDDLE: f64 = 0.5;

    #[test]
    fn delays_double_from_none_to_fifteen_minutes() {
        let mut budget = RestartBudget::default();
        let healthy = Some(Duration::from_secs(60));
        let delays: Vec<u64> = (0..10)
            .map(|_| match budget.boot_ended(healthy, MIDDLE) {
                Decision::After(delay) => delay.as_secs(),
                Decision::Faulted(_) => panic!("a guest with heartbeats is not faulted"),
            })
            .collect();
        assert_eq!(delays, [0, 10, 20, 40, 80, 160, 320, 640, 900, 900]);
        let forgiven = budget.boot_ended(Some(Duration::from_mins(30)), MIDDLE);
        assert_eq!(forgiven, Decision::After(Duration::ZERO));
    }

    #[test]
    fn five_boots_without_a_heartbeat_fault_the_guest() {
        let mut budget = RestartBudget::default();
        for _ in 0..4 {
            assert!(matches!(
                budget.boot_ended(None, MIDDLE),
                Decision::After(_)
            ));
        }
        for _ in 0..2 {
            let decision = budget.boot_ended(None, MIDDLE);
            assert_eq!(decision, Decision::Faulted(FAULTED_DELAY));
            assert!(budget.is_faulted());
        }
        let beat = budget.boot_ended(Some(Duration::from_secs(1)), MIDDLE);
        assert!(matches!(beat, Decision::After(_)));
    }

    #[test]
    fn jitter_stays_within_a_quarter() {
        for jitter in [0.0, 1.0, 7.0, -3.0] {
            let mut budget = RestartBudget::default();
            let Decision::After(delay) = budget.boot_ended(None, jitter) else {
                panic!("first boot");
            };
            assert!(delay >= Duration::from_millis(7500) && delay <= Duration::from_millis(12500));
        }
    }
}
