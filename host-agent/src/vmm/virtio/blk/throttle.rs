//! Keeps log lines that a guest can cause to a bearable rate.

use std::time::{Duration, Instant};

/// Lets one event through per interval and counts the others.
#[derive(Debug)]
pub struct Throttle {
    interval: Duration,
    last: Option<Instant>,
    suppressed: u64,
}

impl Throttle {
    /// Lets the first event through, and later ones once per `interval`.
    pub fn new(interval: Duration) -> Self {
        Self {
            interval,
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
            self.last = Some(now);
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
        let mut throttle = Throttle::new(Duration::from_secs(1));
        assert_eq!(throttle.pass(start), Some(0));
        for ms in 0..1000 {
            assert_eq!(throttle.pass(start + Duration::from_millis(ms)), None);
        }
        assert_eq!(throttle.pass(start + Duration::from_secs(1)), Some(1000));
        assert_eq!(throttle.pass(start + Duration::from_secs(9)), Some(0));
    }
}
