//! Token buckets: how often may something happen? Pure: the caller passes the time.

use std::ops::Add;
use std::time::Duration;

/// Timeline events of one instance that its guest can cause.
pub const TIMELINE: Rate = Rate::new(20, Duration::from_millis(500));
/// Timeline events about one kind of misbehaviour of a guest.
pub const MISBEHAVIOUR: Rate = Rate::new(10, Duration::from_mins(1));
/// Connections that a guest opens to the host's channels, as events of its VMM
/// process. Agents dial seven channels again after a restart, with back-off.
pub const GUEST_CONNECTS: Rate = Rate::new(128, Duration::from_millis(50));
/// Log lines of a VMM process about one kind of error. A guest can cause them
/// for weeks, and nothing bounds the file that standard error may be.
pub const VMM_LOG: Rate = Rate::new(10, Duration::from_hours(1));

/// A rate with bursts.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    /// Time in which an empty bucket becomes full.
    window: Duration,
    /// Time in which one token is added.
    refill: Duration,
}

impl Rate {
    /// `burst` at once, then one per `refill`.
    pub const fn new(burst: u32, refill: Duration) -> Self {
        Self {
            window: refill.saturating_mul(burst),
            refill,
        }
    }
}

/// A token bucket on the clock `T`: an `Instant`, or the `Duration` since a
/// fixed point of a monotonic clock.
#[derive(Debug, Clone)]
pub struct TokenBucket<T> {
    rate: Rate,
    /// When the bucket is full again; `None` while it was never used.
    full_at: Option<T>,
}

impl<T: Copy + Ord + Add<Duration, Output = T>> TokenBucket<T> {
    /// A full bucket.
    pub const fn new(rate: Rate) -> Self {
        Self {
            rate,
            full_at: None,
        }
    }

    /// Takes a token at `now`, if there is one.
    pub fn take(&mut self, now: T) -> bool {
        let full_at = self.full_at.map_or(now, |at| at.max(now)) + self.rate.refill;
        let allowed = full_at <= now + self.rate.window;
        if allowed {
            self.full_at = Some(full_at);
        }
        allowed
    }
}

/// Limits one kind of log line or event, and counts those that it suppresses.
/// One per kind, so that a flood of one kind hides no other.
#[derive(Debug, Clone)]
pub struct LogLimit<T> {
    bucket: TokenBucket<T>,
    suppressed: u64,
}

impl<T: Copy + Ord + Add<Duration, Output = T>> LogLimit<T> {
    /// Nothing is logged yet.
    pub const fn new(rate: Rate) -> Self {
        Self {
            bucket: TokenBucket::new(rate),
            suppressed: 0,
        }
    }

    /// A line at `now`: if it may be logged, how many were suppressed since the
    /// last that was.
    pub fn allow(&mut self, now: T) -> Option<u64> {
        if self.bucket.take(now) {
            return Some(std::mem::take(&mut self.suppressed));
        }
        self.suppressed = self.suppressed.saturating_add(1);
        None
    }

    /// Lines suppressed since the last that was logged.
    pub const fn suppressed(&self) -> u64 {
        self.suppressed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Instant;

    proptest! {
        #[test]
        fn no_pattern_exceeds_the_burst_and_the_rate(
            pauses in proptest::collection::vec(0u64..2_000, 1..400)
        ) {
            let start = Duration::from_secs(77);
            let mut bucket = TokenBucket::new(TIMELINE);
            let (mut now, mut taken) = (start, 0u128);
            for pause in pauses {
                now += Duration::from_millis(pause);
                taken += u128::from(bucket.take(now));
                let most = 20 + now.saturating_sub(start).as_millis() / 500;
                prop_assert!(taken <= most, "{taken} in {now:?}");
            }
            // After a refill time there is always a token.
            prop_assert!(bucket.take(now + TIMELINE.refill));
        }
    }

    #[test]
    fn suppressed_lines_are_counted_and_reported_with_the_next() {
        let start = Instant::now();
        let mut limit = LogLimit::new(MISBEHAVIOUR);
        let logged = (0..1000).filter_map(|_| limit.allow(start));
        assert_eq!(logged.collect::<Vec<_>>(), [0; 10]);
        assert_eq!(limit.suppressed(), 990);
        let refill = MISBEHAVIOUR.refill;
        let before = refill.saturating_sub(Duration::from_nanos(1));
        assert_eq!(limit.allow(start + before), None);
        assert_eq!(limit.allow(start + refill), Some(991));
        assert_eq!(limit.suppressed(), 0);
    }

    #[test]
    fn a_flood_of_a_month_logs_a_line_an_hour() {
        let mut limit = LogLimit::new(VMM_LOG);
        let logged = (0..30 * 24 * 3600)
            .filter(|second| limit.allow(Duration::from_secs(*second)).is_some())
            .count();
        assert!((720..740).contains(&logged), "{logged}");
    }
}
