//! How long has the guest been silent? Pure: silence accumulates in bounded
//! ticks.
//!
//! Silence is never "now minus last beat". A tick adds at most two tick
//! lengths, and nothing if the guest was paused for space, so a host that slept
//! or was starved, or whose clock was set, cannot condemn a guest.

use std::time::Duration;

use crate::supervisor::event::Verdict;

/// Tick lengths of silence that one tick may add at most.
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

/// The numbers of the rule, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeartbeatRule {
    interval: Duration,
    limit: Duration,
    boot_limit: Duration,
}

/// The limit is too short for the interval.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("heartbeat limit {limit:?} is shorter than {LEAST_INTERVALS} intervals of {interval:?}")]
pub struct RuleError {
    limit: Duration,
    interval: Duration,
}

impl HeartbeatRule {
    /// A question every 5 s; 600 s of silence; first contact within 600 s.
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

    /// Time between two calls of [`Monitor::tick`].
    pub fn tick(&self) -> Duration {
        (self.limit / TICKS_PER_LIMIT).min(LONGEST_TICK)
    }
}

/// Two clocks of the host, read together. Wall time is not used: it can be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// `CLOCK_MONOTONIC`: does not advance while the host sleeps.
    pub monotonic: Duration,
    /// `CLOCK_BOOTTIME`: advances while the host sleeps.
    pub boottime: Duration,
}

/// What a tick found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finding {
    /// The monitor was stalled or the host slept.
    Resumed,
    /// The guest has been silent for the limit. Once until the next boot.
    Condemned(Verdict),
}

/// The monitor of one guest's heartbeats.
#[derive(Debug, Clone)]
pub(super) struct Monitor {
    rule: HeartbeatRule,
    phase: Phase,
    silence: Duration,
    grace: Duration,
    since_grace: Option<Duration>,
    last_tick: Option<Now>,
    asked: u64,
    last_answer: Option<Answer>,
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
struct Answer {
    boot_id: String,
    sequence: u64,
}

impl Monitor {
    /// The monitor of a guest that boots or was adopted: its silence is zero.
    pub(super) fn new(rule: HeartbeatRule) -> Self {
        Self {
            rule,
            phase: Phase::Booting,
            silence: Duration::ZERO,
            grace: Duration::ZERO,
            since_grace: None,
            last_tick: None,
            asked: 0,
            last_answer: None,
        }
    }

    /// The guest was reset or begins to shut down: silence starts again at zero.
    pub(super) fn booting(&mut self) {
        self.phase = Phase::Booting;
        self.silence = Duration::ZERO;
        self.last_answer = None;
    }

    /// The guest is being taken down on purpose: no verdict until
    /// [`Monitor::booting`].
    pub(super) fn settle(&mut self) {
        self.phase = Phase::Settled;
    }

    /// Question `sequence` was sent to the guest.
    pub(super) fn asked(&mut self, sequence: u64) {
        self.asked = self.asked.max(sequence);
    }

    /// An answer arrived. It ends the silence only if it answers a question that
    /// was sent, later than any question answered before in the same boot.
    pub(super) fn beat(&mut self, boot_id: &str, sequence: u64) -> bool {
        if self.phase == Phase::Settled || sequence > self.asked {
            return false;
        }
        let fresh = match &self.last_answer {
            None => true,
            Some(last) => last.boot_id == boot_id && sequence > last.sequence,
        };
        if fresh {
            self.last_answer = Some(Answer {
                boot_id: boot_id.to_owned(),
                sequence,
            });
            self.phase = Phase::Alive;
            self.silence = Duration::ZERO;
        }
        fresh
    }

    /// Silence so far.
    #[cfg(test)]
    const fn silence(&self) -> Duration {
        self.silence
    }

    /// Time passed. The caller has taken in all channel input before. `ran`:
    /// the guest was not paused for space in this tick.
    pub(super) fn tick(&mut self, now: Now, ran: bool) -> Option<Finding> {
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
mod tests;
