//! Is the guest alive? Pure: silence accumulates in bounded ticks.
//!
//! Silence is never "now minus last seen". A tick adds at most two tick
//! lengths, and nothing while the vCPUs are stopped, so a host that slept, was
//! paused or starved, or whose clock was set, cannot condemn a guest.

use std::time::Duration;

use super::event::Verdict;

/// Most ticks' worth of silence that one tick may add.
const MOST_TICKS_PER_TICK: u32 = 2;
/// A tick later than this many ticks means that the monitor was stalled.
const LATE_TICKS: u32 = 5;
/// Growth of suspended time between two ticks that counts as a resume.
const SUSPEND_STEP: Duration = Duration::from_secs(1);
/// The longest tick.
const LONGEST_TICK: Duration = Duration::from_secs(1);
/// Ticks in a limit.
const TICKS_PER_LIMIT: u32 = 60;
/// A resume extends the limit by this part of it.
const GRACE_PART: u32 = 10;
/// A limit shorter than this many intervals would be noise.
const LEAST_INTERVALS: u32 = 4;

/// The rule's numbers, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeartbeatRule {
    interval: Duration,
    limit: Duration,
    boot_limit: Duration,
}

/// Why a rule is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("heartbeat limit {limit:?} is shorter than {LEAST_INTERVALS} intervals of {interval:?}")]
pub struct RuleError {
    limit: Duration,
    interval: Duration,
}

impl HeartbeatRule {
    /// Ask every 5 s; silent after 600 s; first contact within 600 s.
    pub const DEFAULT: Self = Self {
        interval: Duration::from_secs(5),
        limit: Duration::from_mins(10),
        boot_limit: Duration::from_mins(10),
    };

    /// A rule with `limit` at least four intervals.
    pub fn new(
        interval: Duration,
        limit: Duration,
        boot_limit: Duration,
    ) -> Result<Self, RuleError> {
        if interval.is_zero() || limit < interval * LEAST_INTERVALS {
            return Err(RuleError { limit, interval });
        }
        Ok(Self {
            interval,
            limit,
            boot_limit,
        })
    }

    /// A rule with this limit and the interval that goes with it: 5 s, or a
    /// quarter of a limit too short for that.
    pub fn with_limit(limit: Duration, boot_limit: Duration) -> Result<Self, RuleError> {
        let interval = Self::DEFAULT.interval.min(limit / LEAST_INTERVALS);
        Self::new(interval, limit, boot_limit)
    }

    /// Time between two questions.
    pub const fn interval(&self) -> Duration {
        self.interval
    }

    /// Silence that condemns a guest.
    pub const fn limit(&self) -> Duration {
        self.limit
    }

    /// How often [`Monitor::tick`] wants to be called.
    pub fn tick(&self) -> Duration {
        (self.limit / TICKS_PER_LIMIT).min(LONGEST_TICK)
    }
}

/// Two readings of the host's clocks, taken together. Wall time has no place
/// here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// `CLOCK_MONOTONIC`: stands still while the host sleeps.
    pub monotonic: Duration,
    /// `CLOCK_BOOTTIME`: goes on while the host sleeps.
    pub boottime: Duration,
}

/// What a tick found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finding {
    /// The monitor was stalled or the host slept.
    Resumed,
    /// The guest is to be restarted. Given once.
    Condemned(Verdict),
}

/// One guest's monitor.
#[derive(Debug, Clone)]
pub struct Monitor {
    rule: HeartbeatRule,
    phase: Phase,
    silence: Duration,
    grace: Duration,
    since_grace: Option<Duration>,
    last_tick: Option<Now>,
    asked: u64,
    heard: Option<Heard>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No heartbeat in this boot yet.
    Booting,
    /// Heartbeats came.
    Alive,
    /// Condemned, or not to be judged until the next boot.
    Settled,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Heard {
    boot_id: String,
    sequence: u64,
}

impl Monitor {
    /// A monitor of a guest that is about to boot, or that was adopted: either
    /// way its silence begins at zero.
    pub fn new(rule: HeartbeatRule) -> Self {
        Self {
            rule,
            phase: Phase::Booting,
            silence: Duration::ZERO,
            grace: Duration::ZERO,
            since_grace: None,
            last_tick: None,
            asked: 0,
            heard: None,
        }
    }

    /// The guest was reset or said that it is stopping: booting again.
    pub fn booting(&mut self) {
        self.phase = Phase::Booting;
        self.silence = Duration::ZERO;
        self.heard = None;
    }

    /// The guest is being taken down on purpose: no verdict until
    /// [`Monitor::booting`].
    pub fn settle(&mut self) {
        self.phase = Phase::Settled;
    }

    /// Question `sequence` was put to the guest.
    pub fn asked(&mut self, sequence: u64) {
        self.asked = self.asked.max(sequence);
    }

    /// An answer arrived. It ends the silence only when it answers a question
    /// that was put, and one later than any answered before in the same boot.
    pub fn beat(&mut self, boot_id: &str, sequence: u64) -> bool {
        if self.phase == Phase::Settled || sequence > self.asked {
            return false;
        }
        let fresh = match &self.heard {
            None => true,
            Some(heard) => heard.boot_id == boot_id && sequence > heard.sequence,
        };
        if fresh {
            self.heard = Some(Heard {
                boot_id: boot_id.to_owned(),
                sequence,
            });
            self.phase = Phase::Alive;
            self.silence = Duration::ZERO;
        }
        fresh
    }

    /// Silence so far.
    pub const fn silence(&self) -> Duration {
        self.silence
    }

    /// Time passed. The caller has taken in all channel input before.
    /// `ran` says whether the vCPUs ran for the whole tick.
    pub fn tick(&mut self, now: Now, ran: bool) -> Option<Finding> {
        let last = self.last_tick.replace(now)?;
        let tick = self.rule.tick();
        let elapsed = now.monotonic.saturating_sub(last.monotonic);
        let slept = now
            .boottime
            .saturating_sub(last.boottime)
            .saturating_sub(elapsed);
        let counted = elapsed.min(tick * MOST_TICKS_PER_TICK);
        if let Some(since) = &mut self.since_grace {
            *since += counted;
        }
        let stalled = slept > SUSPEND_STEP || elapsed > tick * LATE_TICKS;
        if stalled
            && self
                .since_grace
                .is_none_or(|since| since >= self.rule.limit)
        {
            self.since_grace = Some(Duration::ZERO);
            self.grace = self.rule.limit / GRACE_PART;
            return Some(Finding::Resumed);
        }
        if self.phase == Phase::Settled || !ran {
            return None;
        }
        let forgiven = self.grace.min(counted);
        self.grace -= forgiven;
        self.silence += counted.saturating_sub(forgiven);
        let verdict = match self.phase {
            Phase::Alive if self.silence >= self.rule.limit => Verdict::Silent {
                silence_ms: whole_ms(self.silence),
            },
            Phase::Booting if self.silence >= self.rule.boot_limit => Verdict::NoContact {
                waited_ms: whole_ms(self.silence),
            },
            _ => return None,
        };
        self.phase = Phase::Settled;
        Some(Finding::Condemned(verdict))
    }
}

fn whole_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RULE: HeartbeatRule = HeartbeatRule::DEFAULT;

    struct Clock(Now);

    impl Clock {
        fn new() -> Self {
            Self(Now {
                monotonic: Duration::from_secs(1000),
                boottime: Duration::from_secs(5000),
            })
        }
        fn run(&mut self, time: Duration) -> Now {
            self.0.monotonic += time;
            self.0.boottime += time;
            self.0
        }
        fn sleep(&mut self, time: Duration) {
            self.0.boottime += time;
        }
    }

    fn alive(clock: &Clock) -> Monitor {
        let mut monitor = Monitor::new(RULE);
        assert_eq!(monitor.tick(clock.0, true), None);
        monitor.asked(1);
        assert!(monitor.beat("boot", 1));
        monitor
    }

    fn ticks_until_condemned(monitor: &mut Monitor, clock: &mut Clock) -> Option<u32> {
        (1..=5000).find(|_| {
            matches!(
                monitor.tick(clock.run(RULE.tick()), true),
                Some(Finding::Condemned(_))
            )
        })
    }

    #[test]
    fn a_silent_guest_is_condemned_at_the_limit_and_not_a_tick_before_and_once() {
        let mut clock = Clock::new();
        let mut monitor = alive(&clock);
        assert_eq!(ticks_until_condemned(&mut monitor, &mut clock), Some(600));
        assert_eq!(ticks_until_condemned(&mut monitor, &mut clock), None);
    }

    #[test]
    fn a_guest_that_never_speaks_is_condemned_at_the_boot_limit() {
        let mut clock = Clock::new();
        let mut monitor = Monitor::new(RULE);
        monitor.tick(clock.0, true);
        let mut verdict = None;
        for _ in 0..600 {
            assert_eq!(verdict, None);
            verdict = monitor.tick(clock.run(RULE.tick()), true);
        }
        assert!(matches!(
            verdict,
            Some(Finding::Condemned(Verdict::NoContact {
                waited_ms: 600_000
            }))
        ));
    }

    #[test]
    fn a_replayed_an_older_a_foreign_and_an_unasked_answer_do_not_end_silence() {
        let mut clock = Clock::new();
        let mut monitor = alive(&clock);
        monitor.asked(5);
        assert!(monitor.beat("boot", 4));
        for _ in 0..10 {
            monitor.tick(clock.run(RULE.tick()), true);
        }
        for (boot, sequence) in [("boot", 4), ("boot", 3), ("other", 5), ("boot", 6)] {
            assert!(!monitor.beat(boot, sequence), "{boot} {sequence}");
        }
        assert_eq!(monitor.silence(), Duration::from_secs(10));
        assert!(monitor.beat("boot", 5));
        assert_eq!(monitor.silence(), Duration::ZERO);
    }

    #[test]
    fn stopped_vcpus_sleep_and_a_stalled_monitor_condemn_nobody() {
        let mut clock = Clock::new();
        let mut monitor = alive(&clock);
        for _ in 0..2000 {
            assert_eq!(monitor.tick(clock.run(RULE.tick()), false), None);
        }
        clock.sleep(Duration::from_hours(8));
        assert_eq!(
            monitor.tick(clock.run(RULE.tick()), true),
            Some(Finding::Resumed)
        );
        monitor.tick(clock.run(Duration::from_mins(15)), true);
        assert!(monitor.silence() <= RULE.tick() * 2);
    }

    #[test]
    fn a_monitor_that_is_always_late_still_finds_a_dead_guest() {
        let mut clock = Clock::new();
        let mut monitor = alive(&clock);
        let found = (0..10_000).find(|_| {
            matches!(
                monitor.tick(clock.run(RULE.tick() * 6), true),
                Some(Finding::Condemned(_))
            )
        });
        assert!(found.is_some());
    }

    #[test]
    fn a_resume_extends_the_limit_by_a_tenth_once_per_limit() {
        let mut clock = Clock::new();
        let mut monitor = alive(&clock);
        clock.sleep(Duration::from_secs(10));
        assert_eq!(
            monitor.tick(clock.run(RULE.tick()), true),
            Some(Finding::Resumed)
        );
        clock.sleep(Duration::from_secs(10));
        assert_eq!(monitor.tick(clock.run(RULE.tick()), true), None);
        let rest = ticks_until_condemned(&mut monitor, &mut clock);
        assert_eq!(rest, Some(659));
    }

    #[test]
    fn a_reboot_is_never_silence() {
        let mut clock = Clock::new();
        let mut monitor = alive(&clock);
        for round in 0..50u64 {
            for _ in 0..599 {
                assert_eq!(monitor.tick(clock.run(RULE.tick()), true), None);
            }
            monitor.booting();
            monitor.asked(round + 2);
            assert!(monitor.beat(&format!("boot {round}"), round + 2));
        }
    }

    #[test]
    fn a_limit_under_four_intervals_is_refused() {
        let second = Duration::from_secs(1);
        assert!(HeartbeatRule::new(second, second * 3, second).is_err());
        assert!(HeartbeatRule::new(second, second * 4, second).is_ok());
        let short = HeartbeatRule::with_limit(second, second).unwrap();
        assert_eq!(short.interval(), second / 4);
    }

    proptest! {
        /// A guest that stands still, for want of disk space, is not silent: it
        /// is condemned when it has run for the limit, whenever it stood still
        /// and however long.
        #[test]
        fn only_ticks_in_which_the_guest_ran_count_as_silence(
            stands in proptest::collection::vec((0u32..300, 1u32..3_000), 1..20)
        ) {
            let mut clock = Clock::new();
            let mut monitor = alive(&clock);
            let mut ran = 0;
            for (runs, stands) in stands {
                for _ in 0..runs.min(599 - ran) {
                    ran += 1;
                    prop_assert_eq!(monitor.tick(clock.run(RULE.tick()), true), None);
                }
                for _ in 0..stands {
                    prop_assert_eq!(monitor.tick(clock.run(RULE.tick()), false), None);
                }
                prop_assert_eq!(monitor.silence(), RULE.tick() * ran);
            }
            let rest = ticks_until_condemned(&mut monitor, &mut clock);
            prop_assert_eq!(rest, Some(600 - ran));
        }

        #[test]
        fn no_clock_condemns_a_guest_that_answers(
            steps in proptest::collection::vec(
                (0u64..4_000, 0u64..100_000_000, any::<bool>()), 1..400)
        ) {
            let mut clock = Clock::new();
            let mut monitor = alive(&clock);
            for (sequence, (run, sleep, ran)) in (2u64..).zip(steps) {
                clock.sleep(Duration::from_millis(sleep));
                monitor.asked(sequence);
                let found = monitor.tick(clock.run(Duration::from_millis(run)), ran);
                prop_assert!(!matches!(found, Some(Finding::Condemned(_))));
                prop_assert!(monitor.beat("boot", sequence));
            }
        }
    }
}
