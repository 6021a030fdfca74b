//! When may a guest be started again? Pure: a budget of delays.

use std::time::Duration;

/// First delay after the free restart.
const FIRST_DELAY: Duration = Duration::from_secs(10);
/// Longest delay.
const LONGEST_DELAY: Duration = Duration::from_mins(15);
/// Health for this long forgets every earlier restart.
const FORGIVEN_AFTER: Duration = Duration::from_mins(30);
/// Boots in a row without one heartbeat that make a guest faulted.
const FRUITLESS_BOOTS: u32 = 5;
/// Delay between tries of a faulted guest.
const FAULTED_DELAY: Duration = Duration::from_hours(1);

/// One guest's restart budget.
#[derive(Debug, Clone, Default)]
pub struct RestartBudget {
    restarts: u32,
    fruitless: u32,
}

/// What the budget allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Start again after this delay.
    After(Duration),
    /// Faulted: try once after this delay, and tell the operator.
    Faulted(Duration),
}

impl RestartBudget {
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
        if self.fruitless >= FRUITLESS_BOOTS {
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
    fn a_healthy_guest_restarts_at_once_then_after_doubling_delays_to_fifteen_minutes() {
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
    fn five_boots_without_a_heartbeat_fault_the_guest_until_one_comes() {
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
