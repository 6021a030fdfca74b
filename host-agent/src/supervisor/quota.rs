//! How many lines may a guest cause? Pure: a bucket that fills with time.

use std::time::Duration;

/// Lines at once.
const BURST: u32 = 20;
/// Time in which one more is allowed: two lines a second and source.
const REFILL: Duration = Duration::from_millis(500);

/// One source of lines.
#[derive(Debug, Clone)]
pub struct Quota {
    left: u32,
    filled: Duration,
}

impl Quota {
    /// A full bucket at `now` (monotonic).
    pub const fn new(now: Duration) -> Self {
        Self {
            left: BURST,
            filled: now,
        }
    }

    /// Whether one more line is allowed at `now`, which then counts.
    pub fn take(&mut self, now: Duration) -> bool {
        let passed = now.saturating_sub(self.filled).as_nanos() / REFILL.as_nanos();
        let more = u32::try_from(passed).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(more).min(BURST);
        if self.left == BURST {
            self.filled = now;
        } else {
            self.filled += REFILL.saturating_mul(more);
        }
        let allowed = self.left > 0;
        self.left = self.left.saturating_sub(1);
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_pattern_gets_more_than_the_burst_and_two_a_second(
            pauses in proptest::collection::vec(0u64..2_000, 1..400)
        ) {
            let start = Duration::from_secs(77);
            let mut quota = Quota::new(start);
            let (mut now, mut taken) = (start, 0u128);
            for pause in pauses {
                now += Duration::from_millis(pause);
                taken += u128::from(quota.take(now));
                let most = u128::from(BURST) + now.saturating_sub(start).as_millis() / 500;
                prop_assert!(taken <= most, "{taken} in {now:?}");
            }
            // And whoever waits long enough gets a line.
            prop_assert!(quota.take(now + REFILL));
        }
    }
}
