//! Keeps log lines that a guest can cause to a bearable rate.

use std::time::{Duration, Instant};

/// The first interval.
const SHORTEST: Duration = Duration::from_secs(5);
/// The interval after a guest has kept at it.
const LONGEST: Duration = Duration::from_secs(3600);

/// Lets one event through per interval and counts the others. Each that passes
/// doubles the interval, up to an hour: a guest that goes on for weeks fills no
/// disk.
#[derive(Debug)]
pub struct Throttle {
    interval: Duration,
    last: Option<Instant>,
    suppressed: u64,
}

impl Throttle {
    /// Lets the first event through.
    pub const fn new() -> Self {
        Self {
            interval: SHORTEST,
            last: None,
            suppressed: 0,
        }
    }

    /// An event at `now`: how many were kept back before it if it may pass.
    pub fn pass(&mut self, now: Instant) -> Option<u64> {
        let due = self
            .last
            .is_none_or(|last| now.saturating_duration_since(last) >= self.interval);
        if due {
            if self.last.replace(now).is_some() {
                self.interval = (self.interval * 2).min(LONGEST);
            }
            Some(std::mem::take(&mut self.suppressed))
        } else {
            self.suppressed += 1;
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_event_per_interval_passes_with_the_count_of_the_others() {
        let start = Instant::now();
        let mut throttle = Throttle::new();
        assert_eq!(throttle.pass(start), Some(0));
        for ms in 0..5000 {
            assert_eq!(throttle.pass(start + Duration::from_millis(ms)), None);
        }
        assert_eq!(throttle.pass(start + Duration::from_secs(5)), Some(5000));
        assert_eq!(throttle.pass(start + Duration::from_secs(14)), None);
        assert_eq!(throttle.pass(start + Duration::from_secs(15)), Some(1));
    }

    #[test]
    fn a_guest_that_never_ends_gets_a_line_an_hour() {
        let start = Instant::now();
        let mut throttle = Throttle::new();
        let seconds = 30 * 24 * 3600;
        let passed = (0..seconds)
            .filter(|second| {
                let now = start + Duration::from_secs(*second);
                throttle.pass(now).is_some()
            })
            .count();
        assert!((720..740).contains(&passed), "{passed}");
    }
}
