//! What PID 1 knows of the guest agent: its starts, its deaths, its last report; and from
//! that the health that heartbeats report. Pure.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use vmbus::message::{Beat, Health, RoleState};

use crate::report;

/// This many deaths within the window are critical.
const CRITICAL_DEATHS: usize = 3;
const DEATH_WINDOW: Duration = Duration::from_secs(300);
/// A guest agent hangs when it sends no report for more ticks than these: a minute. Ticks
/// are counted instead of reading a clock, since clocks advance while the guest is paused
/// and the guest agent does not.
const SILENT_TICKS: u32 = 60 / TICK.as_secs() as u32;
/// A new guest agent is given up if it reports no state of the role for more ticks than these:
/// a minute.
const UNHEALTHY_TICKS: u32 = SILENT_TICKS;
/// A new guest agent has proven itself when it has worked for this many ticks: five minutes,
/// the window in which deaths count.
const PROOF_TICKS: u32 = (DEATH_WINDOW.as_secs() / TICK.as_secs()) as u32;
/// How often [`AgentMonitor::tick`] is to be called.
pub const TICK: Duration = report::EVERY;
/// Wait before the guest agent is started again, and the wait while it is critical.
const RESTART_WAIT: Duration = Duration::from_millis(500);
const CRITICAL_WAIT: Duration = Duration::from_secs(30);

/// The guest agent, as PID 1 sees it.
#[derive(Debug, Default)]
pub struct AgentMonitor {
    life: Life,
    deaths: VecDeque<Instant>,
    silent_ticks: u32,
    /// Since the start.
    ticks: u32,
    /// It is new.
    watched: bool,
    leaving: bool,
}

/// What is to be done after a tick.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tick {
    /// Nothing.
    Nothing,
    /// Kill it: it hangs.
    Kill,
    /// The new guest agent has proven itself.
    Proven,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Life {
    /// Not started in this boot.
    #[default]
    None,
    /// It runs and has not reported a state of the role.
    Started,
    /// It runs and has reported a state of the role.
    Reporting,
    /// It runs and has sent no report for too long.
    Hung,
    /// It ended, or could not be started.
    Down,
}

impl AgentMonitor {
    /// It runs; a new one is `watched`.
    pub fn started(&mut self, watched: bool) {
        self.life = Life::Started;
        self.silent_ticks = 0;
        self.ticks = 0;
        self.watched = watched;
    }

    /// Another one is started next, to which the deaths of this one do not count.
    pub fn replaced(&mut self) {
        self.life = Life::None;
        self.deaths.clear();
    }

    /// It ended, or could not be started. The wait before the next start.
    pub fn ended(&mut self, now: Instant) -> Duration {
        self.life = Life::Down;
        self.deaths.push_back(now);
        if self.deaths.len() > CRITICAL_DEATHS {
            self.deaths.pop_front();
        }
        if self.keeps_dying(now) {
            CRITICAL_WAIT
        } else {
            RESTART_WAIT
        }
    }

    /// It sent a report.
    pub fn reported(&mut self, role: RoleState) {
        if self.life == Life::Started && role != RoleState::Unknown {
            self.life = Life::Reporting;
        }
        self.silent_ticks = 0;
    }

    /// One [`TICK`] passed. A kill or a proof is asked for once.
    pub fn tick(&mut self) -> Tick {
        self.silent_ticks = self.silent_ticks.saturating_add(1);
        self.ticks = self.ticks.saturating_add(1);
        let runs = matches!(self.life, Life::Started | Life::Reporting);
        let silent = self.silent_ticks > SILENT_TICKS;
        let unhealthy = self.watched && self.life == Life::Started && self.ticks > UNHEALTHY_TICKS;
        if runs && (silent || unhealthy) {
            self.life = Life::Hung;
            return Tick::Kill;
        }
        if self.watched && self.life == Life::Reporting && self.ticks > PROOF_TICKS {
            self.watched = false;
            return Tick::Proven;
        }
        Tick::Nothing
    }

    /// How it hung, if it did and has not ended yet.
    pub fn hung(&self) -> Option<&'static str> {
        let silent = self.silent_ticks > SILENT_TICKS;
        (self.life == Life::Hung).then_some(if silent {
            "sent no report for a minute"
        } else {
            "reported no state of the role for a minute"
        })
    }

    /// Whether it runs and has reported a state of the role.
    pub fn works(&self) -> bool {
        self.life == Life::Reporting
    }

    /// The guest is shutting down.
    pub fn leave(&mut self) {
        self.leaving = true;
    }

    /// Whether the guest is shutting down.
    pub const fn leaving(&self) -> bool {
        self.leaving
    }

    /// The answer to the host's question.
    pub fn beat(&self, sequence: u64, boot_id: String, now: Instant) -> Beat {
        Beat {
            sequence,
            boot_id,
            health: self.health(now),
        }
    }

    fn health(&self, now: Instant) -> Health {
        match self.life {
            _ if self.leaving => Health::Stopped,
            _ if self.keeps_dying(now) => Health::Critical,
            Life::Down | Life::Hung => Health::Critical,
            Life::Reporting => Health::Healthy,
            Life::None | Life::Started => Health::Unknown,
        }
    }

    /// Whether it died three times in five minutes.
    pub fn keeps_dying(&self, now: Instant) -> bool {
        let recent = |at: &&Instant| now.saturating_duration_since(**at) <= DEATH_WINDOW;
        self.deaths.iter().filter(recent).count() >= CRITICAL_DEATHS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_follows_starts_reports_and_deaths() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut monitor = AgentMonitor::default();
        let health = |monitor: &AgentMonitor, second| {
            let beat = monitor.beat(second, "b".into(), at(second));
            assert_eq!((beat.sequence, beat.boot_id.as_str()), (second, "b"));
            beat.health
        };
        assert_eq!(health(&monitor, 0), Health::Unknown);
        monitor.started(false);
        assert_eq!(health(&monitor, 1), Health::Unknown);
        monitor.reported(RoleState::Unknown);
        assert_eq!(health(&monitor, 2), Health::Unknown);
        monitor.reported(RoleState::Ready);
        assert_eq!(health(&monitor, 12), Health::Healthy);
        assert_eq!(monitor.ended(at(13)), RESTART_WAIT);
        assert_eq!(health(&monitor, 20), Health::Critical);
        monitor.started(false);
        assert_eq!(health(&monitor, 21), Health::Unknown);
        monitor.reported(RoleState::Ready);
        assert_eq!(health(&monitor, 22), Health::Healthy);
        monitor.leave();
        assert_eq!(health(&monitor, 23), Health::Stopped);
    }

    #[test]
    fn a_guest_agent_that_is_silent_for_a_minute_is_killed_once() {
        let now = Instant::now();
        let mut monitor = AgentMonitor::default();
        let silence = |monitor: &mut AgentMonitor| (0..12).any(|_| monitor.tick() == Tick::Kill);
        assert!(
            !silence(&mut monitor) && monitor.tick() == Tick::Nothing,
            "none runs"
        );
        // One that hangs before its first report, and one that hangs after it.
        for reports in 0..=1 {
            monitor.started(false);
            for _ in 0..reports {
                assert!(!silence(&mut monitor));
                monitor.reported(RoleState::Ready);
            }
            assert!(!silence(&mut monitor));
            assert!(monitor.hung().is_none() && monitor.health(now) != Health::Critical);
            assert_eq!(monitor.tick(), Tick::Kill);
            // A report that was on its way does not revive it.
            monitor.reported(RoleState::Ready);
            assert!(monitor.hung().is_some() && monitor.health(now) == Health::Critical);
            assert!(
                !silence(&mut monitor) && monitor.tick() == Tick::Nothing,
                "killed twice"
            );
            monitor.ended(now);
            assert!(monitor.hung().is_none());
            assert!(
                !silence(&mut monitor) && monitor.tick() == Tick::Nothing,
                "none runs"
            );
        }
    }

    #[test]
    fn three_deaths_within_five_minutes_are_critical() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut monitor = AgentMonitor::default();
        let mut waits = Vec::new();
        for second in [0, 200, 250] {
            monitor.started(false);
            monitor.reported(RoleState::Ready);
            waits.push(monitor.ended(at(second)));
        }
        assert_eq!(waits, [RESTART_WAIT, RESTART_WAIT, CRITICAL_WAIT]);
        monitor.started(false);
        monitor.reported(RoleState::Ready);
        assert_eq!(monitor.health(at(300)), Health::Critical);
        assert_eq!(monitor.health(at(301)), Health::Healthy);
        assert_eq!(monitor.ended(at(600)), RESTART_WAIT);
    }
    #[test]
    fn a_new_guest_agent_must_report_a_role_within_a_minute() {
        for watched in [false, true] {
            let mut monitor = AgentMonitor::default();
            monitor.started(watched);
            let mut killed = false;
            for _ in 0..40 {
                monitor.reported(RoleState::Unknown);
                killed |= monitor.tick() == Tick::Kill;
            }
            assert_eq!(killed, watched);
            assert_eq!(monitor.hung().is_some(), watched);
        }
    }

    #[test]
    fn a_new_guest_agent_that_works_for_five_minutes_is_proven_once() {
        let mut monitor = AgentMonitor::default();
        monitor.started(true);
        let mut proofs = Vec::new();
        for tick in 1..200 {
            monitor.reported(RoleState::Ready);
            match monitor.tick() {
                Tick::Nothing => {}
                Tick::Kill => panic!("it works"),
                Tick::Proven => proofs.push(tick),
            }
        }
        assert_eq!(proofs, [61]);
        // Deaths of the one before do not count to the one that follows.
        let now = Instant::now();
        for _ in 0..3 {
            monitor.ended(now);
        }
        assert!(monitor.keeps_dying(now));
        monitor.replaced();
        assert!(!monitor.keeps_dying(now));
    }
}
