//! Deadlines that count the time in which the guest ran.
//!
//! The guest's clocks go on while it is paused: `CLOCK_MONOTONIC` counts a pause for host disk
//! space (`kvm-clock` includes it), and no process in the guest makes progress meanwhile. A
//! deadline by the clock would end with the pause. So a deadline is a sum of short ticks, and
//! one that comes late adds at most [`MOST`].

use std::time::{Duration, Instant};

/// Time between two looks at the clock while a deadline runs.
const TICK: Duration = Duration::from_millis(100);
/// Most that the time between two looks adds: more for a guest that is busy than a tick, far
/// less than a pause lasts.
const MOST: Duration = Duration::from_millis(500);

/// A time in which the guest runs. Pure.
#[derive(Debug, Clone)]
pub struct Deadline {
    left: Duration,
    seen: Instant,
}

impl Deadline {
    /// The end of `limit` from `now` on.
    pub const fn new(limit: Duration, now: Instant) -> Self {
        Self {
            left: limit,
            seen: now,
        }
    }

    /// What is left at `now`. To be called every [`Deadline::next_look`].
    pub fn left(&mut self, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.seen).min(MOST);
        self.seen = now;
        self.left = self.left.saturating_sub(passed);
        self.left
    }

    /// The time until the next call of [`Deadline::left`] at the latest.
    pub fn next_look(&self) -> Duration {
        self.left.min(TICK)
    }

    /// Waits for the end.
    pub async fn passed(&mut self) {
        while !self.left(now()).is_zero() {
            tokio::time::sleep(self.next_look()).await;
        }
    }
}

/// The limit passed before the future was complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Elapsed;

/// Waits for `future`, for at most `limit` in which the guest runs.
pub fn timeout<T>(
    limit: Duration,
    future: impl Future<Output = T>,
) -> impl Future<Output = Result<T, Elapsed>> {
    let mut future = Box::pin(future);
    async move { timeout_at(&mut deadline(limit), &mut future).await }
}

/// Waits for `future` until `deadline`.
pub fn timeout_at<T>(
    deadline: &mut Deadline,
    future: impl Future<Output = T>,
) -> impl Future<Output = Result<T, Elapsed>> {
    // Boxed, so that futures around this one do not hold it twice.
    let mut future = Box::pin(future);
    async move {
        tokio::select! {
            biased;
            result = &mut future => Ok(result),
            () = deadline.passed() => Err(Elapsed),
        }
    }
}

/// The end of `limit` from now on.
pub fn deadline(limit: Duration) -> Deadline {
    Deadline::new(limit, now())
}

/// Calls `condition` every `pause` until it is true, for at most `limit` in which the guest
/// runs; whether it was. Blocking.
pub fn eventually(limit: Duration, pause: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let mut deadline = Deadline::new(limit, Instant::now());
    while !condition() {
        if deadline.left(Instant::now()).is_zero() {
            return false;
        }
        std::thread::sleep(pause);
    }
    true
}

/// The clock of the runtime, which tests set.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);
    const PAUSE: Duration = Duration::from_secs(3600);

    #[test]
    fn a_pause_shortens_a_deadline_by_one_look() {
        let start = Instant::now();
        let mut deadline = Deadline::new(LIMIT, start);
        let mut now = start;
        for _ in 0..10 {
            now += TICK;
            deadline.left(now);
        }
        assert_eq!(deadline.left(now) + 10 * TICK, LIMIT);
        now += PAUSE;
        assert_eq!(deadline.left(now) + 10 * TICK + MOST, LIMIT);
        // A clock that goes back adds nothing.
        assert_eq!(deadline.left(start) + 10 * TICK + MOST, LIMIT);
    }

    #[tokio::test(flavor = "current_thread", start_paused = true)]
    async fn a_limit_passes_only_while_the_guest_runs() {
        let start = now();
        let never = timeout(LIMIT, std::future::pending::<()>());
        assert_eq!(never.await, Err(Elapsed));
        let took = now().duration_since(start);
        assert!(took >= LIMIT && took < LIMIT * 2, "{took:?}");

        let pause = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            tokio::time::advance(PAUSE).await;
            // More than half of the limit is left.
            tokio::time::sleep(Duration::from_secs(3)).await;
        };
        assert_eq!(timeout(LIMIT, pause).await, Ok(()));
        assert_eq!(timeout(Duration::ZERO, async { 7 }).await, Ok(7));
    }
}
