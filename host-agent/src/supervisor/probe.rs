//! What answers of a guest whose agent need not? Pure: pings of its VMM process
//! all the time, and a probe of its kernel before a verdict.

use std::time::Duration;

use super::event::Verdict;
use crate::vmm::control::DialOutcome;

/// Pings without an answer that make a VMM process hung.
const PINGS_MISSED: u32 = 3;

/// The pings of one boot.
#[derive(Debug, Clone, Default)]
pub struct Pings {
    unanswered: u32,
}

impl Pings {
    /// The next ping is due: what was seen, if the process is hung.
    pub fn due(&mut self) -> Option<Seen> {
        if self.unanswered < PINGS_MISSED {
            return None;
        }
        self.unanswered = 0;
        Some(Seen {
            verdict: Verdict::VmmHung,
            evidence: "three pings of its control socket unanswered",
            kernel_alive: false,
        })
    }

    /// One is due an answer.
    pub fn sent(&mut self) {
        self.unanswered = self.unanswered.saturating_add(1);
    }

    /// The process answered.
    pub fn answered(&mut self) {
        self.unanswered = 0;
    }
}

/// A verdict and what it rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// The verdict.
    pub verdict: Verdict,
    /// What was seen, in words.
    pub evidence: &'static str,
    /// Whether the guest's kernel answered.
    pub kernel_alive: bool,
}

impl Seen {
    /// Of a guest that cannot answer.
    pub const fn stopped(verdict: Verdict) -> Self {
        Self {
            verdict,
            evidence: "its vCPUs are stopped",
            kernel_alive: false,
        }
    }
}

/// A question to the guest's kernel, on the way to a verdict.
#[derive(Debug, Clone)]
pub struct Probe {
    verdict: Verdict,
    id: u64,
    ticks_left: u128,
}

impl Probe {
    /// The probe `id` on the way to `verdict`. It may take `limit`, in ticks: so
    /// many, however late each is, since then its answer is late to be read.
    pub fn new(verdict: Verdict, id: u64, limit: Duration, tick: Duration) -> Self {
        Self {
            verdict,
            id,
            ticks_left: limit.as_nanos().div_ceil(tick.as_nanos().max(1)).max(1),
        }
    }

    /// A dial was answered: what was seen, if it was this one.
    pub fn answered(&self, id: u64, outcome: DialOutcome) -> Option<Seen> {
        if id != self.id {
            return None;
        }
        match outcome {
            DialOutcome::Connected | DialOutcome::Refused => Some(Seen {
                verdict: self.verdict,
                evidence: "the guest's kernel answers: its agent is dead or hung",
                kernel_alive: true,
            }),
            DialOutcome::TimedOut | DialOutcome::Unavailable => Some(self.silence()),
        }
    }

    /// A tick passed: what was seen, if it was the last.
    pub fn tick(&mut self) -> Option<Seen> {
        self.ticks_left = self.ticks_left.saturating_sub(1);
        (self.ticks_left == 0).then(|| self.silence())
    }

    const fn silence(&self) -> Seen {
        Seen {
            verdict: self.verdict,
            evidence: "the guest's kernel does not answer a probe",
            kernel_alive: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SILENT: Verdict = Verdict::Silent {
        silence_ms: 600_000,
    };

    #[test]
    fn three_pings_in_a_row_without_an_answer_make_a_process_hung_once() {
        let mut pings = Pings::default();
        for _ in 0..10 {
            for _ in 0..2 {
                assert_eq!(pings.due(), None);
                pings.sent();
            }
            pings.answered();
        }
        for _ in 0..3 {
            assert_eq!(pings.due(), None);
            pings.sent();
        }
        assert_eq!(pings.due().map(|seen| seen.verdict), Some(Verdict::VmmHung));
        assert_eq!(pings.due(), None);
    }

    #[test]
    fn a_kernel_that_accepts_or_refuses_lives_and_one_that_does_neither_in_time_does_not() {
        let tick = Duration::from_secs(1);
        let probe = || Probe::new(SILENT, 7, tick * 3, tick);
        for (outcome, alive) in [
            (DialOutcome::Connected, true),
            (DialOutcome::Refused, true),
            (DialOutcome::TimedOut, false),
            (DialOutcome::Unavailable, false),
        ] {
            assert_eq!(probe().answered(6, outcome), None);
            let seen = probe().answered(7, outcome).unwrap();
            assert_eq!((seen.verdict, seen.kernel_alive), (SILENT, alive));
        }
        let mut probe = probe();
        let seen: Vec<_> = (0..3).map(|_| probe.tick()).collect();
        assert_eq!(seen[..2], [None, None]);
        assert!(seen[2].is_some_and(|seen| !seen.kernel_alive));
        // A limit shorter than a tick is one tick.
        assert!(Probe::new(SILENT, 7, tick / 9, tick).tick().is_some());
    }
}
