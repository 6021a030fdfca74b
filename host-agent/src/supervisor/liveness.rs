//! Is the guest alive, and its VMM process? Pure: each input gives at most one
//! effect; nothing here sends, reads a clock or waits.
//!
//! The app agent answers heartbeat questions ([`heartbeat`]). When it has been
//! silent for the limit, a probe of the guest's kernel, which needs no user
//! space, gives the evidence for the verdict. The VMM process answers pings.
//!
//! A pause by the operator counts as silence: it is a way to try the rule, and
//! a paused guest looks like a frozen one. A pause for space (`ENOSPC`) does
//! not: the guest cannot answer and is not at fault.

pub mod heartbeat;

use std::time::Duration;

use super::event::Verdict;
use crate::vmm::control::DialOutcome;
use heartbeat::{Finding, HeartbeatRule, Monitor, Now};

/// Consecutive unanswered pings that make a VMM process hung.
const HUNG_PINGS: u32 = 3;

/// What the actor does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LivenessEffect {
    /// Send the VMM process a probe of the guest's kernel with this id.
    SendProbe {
        /// Goes to [`Liveness::dial_answered`] with the outcome.
        id: u64,
    },
    /// Send the VMM process a ping with this id.
    SendPing {
        /// Repeated in the answer.
        id: u64,
    },
    /// Report that the host slept or this process was stalled.
    ReportResumed,
    /// The guest is to be restarted. At most once a boot.
    Condemn(LivenessEvidence),
}

/// A verdict and what it rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LivenessEvidence {
    /// The verdict.
    pub verdict: Verdict,
    /// What was observed, in words.
    pub evidence: &'static str,
    /// Whether the guest's kernel answered.
    pub kernel_alive: bool,
}

/// The liveness of one instance, over its boots.
#[derive(Debug, Clone)]
pub struct Liveness {
    rule: HeartbeatRule,
    probe_limit: Duration,
    monitor: Monitor,
    /// Unanswered pings in a row.
    unanswered_pings: u32,
    probe: Option<KernelProbe>,
    has_process: bool,
    paused_by_operator: bool,
    /// Since when the guest is paused for space (`CLOCK_MONOTONIC`).
    paused_for_space: Option<Duration>,
    ran_whole_tick: bool,
    condemned: bool,
}

impl Liveness {
    /// An instance without a VMM process. A probe may take `probe_limit`.
    pub fn new(rule: HeartbeatRule, probe_limit: Duration) -> Self {
        Self {
            rule,
            probe_limit,
            monitor: Monitor::new(rule),
            unanswered_pings: 0,
            probe: None,
            has_process: false,
            paused_by_operator: false,
            paused_for_space: None,
            ran_whole_tick: false,
            condemned: false,
        }
    }

    /// A VMM process was started: a new boot.
    pub fn spawned(&mut self) {
        *self = Self {
            has_process: true,
            ..Self::new(self.rule, self.probe_limit)
        };
    }

    /// A running VMM process was attached at `now` (`CLOCK_MONOTONIC`), in the
    /// state that it reports. The silence of its guest begins at zero.
    pub fn adopted(&mut self, paused_by_operator: bool, paused_for_space: bool, now: Duration) {
        self.spawned();
        self.paused_by_operator = paused_by_operator;
        self.paused_for_space = paused_for_space.then_some(now);
    }

    /// The VMM process ended.
    pub fn ended(&mut self) {
        self.unanswered_pings = 0;
        self.probe = None;
        self.has_process = false;
        self.paused_by_operator = false;
        self.paused_for_space = None;
        self.ran_whole_tick = false;
    }

    /// The guest was reset or begins to shut down: its next boot, or the end of
    /// its VMM process, is due within the boot limit.
    pub fn booting_again(&mut self) {
        self.monitor.booting();
    }

    /// The guest is being taken down on purpose: its silence is not judged.
    pub fn taken_down(&mut self) {
        self.monitor.settle();
        self.probe = None;
    }

    /// Heartbeat question `sequence` was sent to the guest.
    pub fn asked(&mut self, sequence: u64) {
        self.monitor.asked(sequence);
    }

    /// A heartbeat answer arrived; whether it is fresh and ends the silence.
    pub fn beat(&mut self, boot_id: &str, sequence: u64) -> bool {
        self.monitor.beat(boot_id, sequence)
    }

    /// The operator paused or resumed the vCPUs; whether this is a change.
    pub fn paused(&mut self, paused: bool) -> bool {
        std::mem::replace(&mut self.paused_by_operator, paused) != paused
    }

    /// Whether the operator paused the vCPUs.
    pub const fn is_paused_by_operator(&self) -> bool {
        self.paused_by_operator
    }

    /// The guest is paused at `now` (`CLOCK_MONOTONIC`) because the host has no
    /// space for its writes.
    pub fn no_space(&mut self, now: Duration) {
        self.paused_for_space.get_or_insert(now);
        // A tick in which it ran for a part only does not count.
        self.ran_whole_tick = false;
        if let Some(probe) = &mut self.probe {
            probe.interrupted = true;
        }
    }

    /// The guest is no longer paused for space; for how long it was.
    pub fn space_back(&mut self, now: Duration) -> Option<Duration> {
        let since = self.paused_for_space.take()?;
        Some(now.saturating_sub(since))
    }

    /// Whether the guest is paused for space.
    pub const fn is_paused_for_space(&self) -> bool {
        self.paused_for_space.is_some()
    }

    /// The VMM process answered a ping.
    pub fn pong(&mut self) {
        self.unanswered_pings = 0;
    }

    /// The next ping of the VMM process is due; `id` is unused so far.
    pub fn ping_due(&mut self, id: u64) -> Option<LivenessEffect> {
        if !self.has_process {
            return None;
        }
        if self.unanswered_pings >= HUNG_PINGS {
            self.unanswered_pings = 0;
            return self.condemn(LivenessEvidence {
                verdict: Verdict::VmmHung,
                evidence: "three pings of its control socket unanswered",
                kernel_alive: false,
            });
        }
        // A ping that the socket does not take is unanswered as well.
        self.unanswered_pings += 1;
        Some(LivenessEffect::SendPing { id })
    }

    /// A dial was answered. Only the outcome of the current probe counts.
    pub fn dial_answered(&mut self, id: u64, outcome: DialOutcome) -> Option<LivenessEffect> {
        let probe = self.probe.as_ref().filter(|probe| probe.id == id)?;
        let evidence = probe.answered(outcome)?;
        self.condemn(evidence)
    }

    /// Time passed; `id` is unused so far. The actor has taken in all channel
    /// input before.
    pub fn tick(&mut self, now: Now, id: u64) -> Option<LivenessEffect> {
        if let Some(effect) = self.tick_probe(id) {
            return Some(effect);
        }
        let runs = self.has_process && !self.is_paused_for_space();
        let ran = std::mem::replace(&mut self.ran_whole_tick, runs);
        match self.monitor.tick(now, ran)? {
            Finding::Resumed => Some(LivenessEffect::ReportResumed),
            Finding::Condemned(verdict) => self.look_closer(verdict, id),
        }
    }

    fn tick_probe(&mut self, id: u64) -> Option<LivenessEffect> {
        // While the guest is paused for space its kernel cannot answer.
        let probe = self
            .probe
            .as_mut()
            .filter(|_| self.paused_for_space.is_none())?;
        if probe.interrupted {
            *probe = KernelProbe::new(probe.verdict, id, self.probe_limit, self.rule.tick());
            return Some(LivenessEffect::SendProbe { id });
        }
        let evidence = probe.tick()?;
        self.condemn(evidence)
    }

    /// Before a verdict: does the guest's kernel answer? The answer, or its
    /// absence, is the evidence.
    fn look_closer(&mut self, verdict: Verdict, id: u64) -> Option<LivenessEffect> {
        if self.condemned || !self.has_process {
            return None;
        }
        if self.paused_by_operator {
            return self.condemn(LivenessEvidence {
                verdict,
                evidence: "its vCPUs are stopped",
                kernel_alive: false,
            });
        }
        let probe = KernelProbe::new(verdict, id, self.probe_limit, self.rule.tick());
        self.probe = Some(probe);
        Some(LivenessEffect::SendProbe { id })
    }

    fn condemn(&mut self, evidence: LivenessEvidence) -> Option<LivenessEffect> {
        self.probe = None;
        let first = !std::mem::replace(&mut self.condemned, true);
        first.then_some(LivenessEffect::Condemn(evidence))
    }
}

/// A question to the guest's kernel, on the way to a verdict.
#[derive(Debug, Clone)]
struct KernelProbe {
    verdict: Verdict,
    id: u64,
    ticks_left: u128,
    /// The guest was paused for space since the probe was sent: no answer means
    /// nothing, and the probe is sent again when the guest runs.
    interrupted: bool,
}

impl KernelProbe {
    /// The probe may take `limit`, counted in ticks however late each comes: a
    /// late tick also reads the answer late.
    fn new(verdict: Verdict, id: u64, limit: Duration, tick: Duration) -> Self {
        Self {
            verdict,
            id,
            ticks_left: limit.as_nanos().div_ceil(tick.as_nanos().max(1)).max(1),
            interrupted: false,
        }
    }

    fn answered(&self, outcome: DialOutcome) -> Option<LivenessEvidence> {
        match outcome {
            DialOutcome::Connected | DialOutcome::Refused => Some(LivenessEvidence {
                verdict: self.verdict,
                evidence: "the guest's kernel answers: its agent is dead or hung",
                kernel_alive: true,
            }),
            DialOutcome::TimedOut | DialOutcome::Unavailable => {
                (!self.interrupted).then(|| self.no_answer())
            }
        }
    }

    /// A tick passed; what is known if it was the last.
    fn tick(&mut self) -> Option<LivenessEvidence> {
        self.ticks_left = self.ticks_left.saturating_sub(1);
        (self.ticks_left == 0).then(|| self.no_answer())
    }

    const fn no_answer(&self) -> LivenessEvidence {
        LivenessEvidence {
            verdict: self.verdict,
            evidence: "the guest's kernel does not answer a probe",
            kernel_alive: false,
        }
    }
}

#[cfg(test)]
mod tests;
