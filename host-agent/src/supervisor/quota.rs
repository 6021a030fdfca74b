//! How many lines may a guest cause? Pure: a bucket that fills with time.

use std::time::Duration;

/// Lines at once.
const BURST: u32 = 20;
/// Time in which one more is allowed: two lines a second and source.
const REFILL: Duration = Duration::from_millis(500);
/// Lines of trouble of one kind at once.
const TROUBLE_BURST: u32 = 10;
/// Time in which one more is allowed. What goes on for hours is still told.
const TROUBLE_REFILL: Duration = Duration::from_mins(1);

/// One source of lines.
#[derive(Debug, Clone)]
pub struct Quota {
    burst: u32,
    refill: Duration,
    left: u32,
    filled: Duration,
}

impl Quota {
    /// A full bucket at `now` (monotonic).
    pub const fn new(now: Duration) -> Self {
        Self::of(BURST, REFILL, now)
    }

    const fn of(burst: u32, refill: Duration, now: Duration) -> Self {
        Self {
            burst,
            refill,
            left: burst,
            filled: now,
        }
    }

    /// Whether one more line is allowed at `now`, which then counts.
    pub fn take(&mut self, now: Duration) -> bool {
        let passed = now.saturating_sub(self.filled).as_nanos() / self.refill.as_nanos();
        let more = u32::try_from(passed).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(more).min(self.burst);
        if self.left == self.burst {
            self.filled = now;
        } else {
            self.filled += self.refill.saturating_mul(more);
        }
        let allowed = self.left > 0;
        self.left = self.left.saturating_sub(1);
        allowed
    }
}

/// Trouble of one kind, which a guest may be able to cause at will: a bucket of
/// its own, so that it hides no other kind, and a count of what was not told.
#[derive(Debug, Clone)]
pub struct Trouble {
    quota: Quota,
    untold: u64,
}

impl Trouble {
    /// None so far.
    pub const fn new(now: Duration) -> Self {
        Self {
            quota: Quota::of(TROUBLE_BURST, TROUBLE_REFILL, now),
            untold: 0,
        }
    }

    /// Something of this kind happened. If it may be told: how much was not
    /// since the last that was.
    pub fn tell(&mut self, now: Duration) -> Option<u64> {
        if self.quota.take(now) {
            return Some(std::mem::take(&mut self.untold));
        }
        self.untold = self.untold.saturating_add(1);
        None
    }

    /// How much was not told since the last that was.
    pub const fn untold(&self) -> u64 {
        self.untold
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

    #[test]
    fn trouble_beyond_the_burst_is_counted_and_the_count_told_with_the_next() {
        let start = Duration::from_secs(77);
        let mut trouble = Trouble::new(start);
        let told: u64 = (0..1000)
            .map(|_| u64::from(trouble.tell(start).is_some()))
            .sum();
        assert_eq!(told, u64::from(TROUBLE_BURST));
        assert_eq!(trouble.untold(), 1000 - told);
        assert_eq!(trouble.tell(start + TROUBLE_REFILL), Some(1000 - told));
        assert_eq!(trouble.untold(), 0);
    }
}
