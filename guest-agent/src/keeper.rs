//! What PID 1 knows of the guest agent: its starts, its deaths, its last
//! report; and from that what heartbeats tell. Pure.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use vmbus::message::{AgentState, Beat, Health, RoleState};

use crate::report::{self, Report};

/// This many deaths within the window are critical.
const CRITICAL_DEATHS: usize = 3;
const DEATH_WINDOW: Duration = Duration::from_secs(300);
/// This many ticks without a word from a guest agent that runs mean that it
/// hangs: a minute. They are counted and no clock is read, since clocks go on
/// while the guest stands still, and the guest agent does not.
const SILENT_TICKS: u32 = 60 / TICK.as_secs() as u32;
/// How often [`Keeper::tick`] is to be called.
pub const TICK: Duration = report::EVERY;
/// Wait before the guest agent is started again, then, when critical.
const RESTART_WAIT: Duration = Duration::from_millis(500);
const CRITICAL_WAIT: Duration = Duration::from_secs(30);

/// The guest agent, as PID 1 sees it.
#[derive(Debug, Default)]
pub struct Keeper {
    life: Life,
    starts: u32,
    deaths: VecDeque<Instant>,
    report: Option<(Report, Instant)>,
    silent_ticks: u32,
    leaving: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Life {
    /// Not started in this boot.
    #[default]
    None,
    /// It runs and has said nothing.
    Started,
    /// It runs and has reported.
    Heard,
    /// It runs and has said nothing for too long.
    Hung,
    /// It ended, or could not be started.
    Down,
}

impl Keeper {
    /// It runs.
    pub fn started(&mut self) {
        self.life = Life::Started;
        self.silent_ticks = 0;
        self.starts = self.starts.saturating_add(1);
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

    /// It said how it is.
    pub fn reported(&mut self, report: Report, now: Instant) {
        if self.life == Life::Started && report.role != RoleState::Unknown {
            self.life = Life::Heard;
        }
        self.silent_ticks = 0;
        self.report = Some((report, now));
    }

    /// Time went on. True, once, when the guest agent hangs: it is to be killed.
    pub fn tick(&mut self) -> bool {
        self.silent_ticks = self.silent_ticks.saturating_add(1);
        let hangs =
            matches!(self.life, Life::Started | Life::Heard) && self.silent_ticks > SILENT_TICKS;
        if hangs {
            self.life = Life::Hung;
        }
        hangs
    }

    /// Whether it hung and has not ended yet.
    pub fn hung(&self) -> bool {
        self.life == Life::Hung
    }

    /// The guest is on its way down.
    pub fn leave(&mut self) {
        self.leaving = true;
    }

    /// Whether the guest is on its way down.
    pub const fn leaving(&self) -> bool {
        self.leaving
    }

    /// The answer to the host's question. While the guest agent is down its
    /// last report stands and grows old.
    pub fn beat(&self, sequence: u64, boot_id: String, now: Instant) -> Beat {
        let report = self.report.map(|(report, _)| report);
        Beat {
            sequence,
            boot_id,
            health: self.health(now),
            applied_incarnation: report.map_or(0, |report| report.incarnation),
            agent: report.map(|report| AgentState {
                role: report.role,
                starts: self.starts,
            }),
            agent_age_ms: self.report.map_or(0, |(_, at)| {
                let age = now.saturating_duration_since(at);
                u64::try_from(age.as_millis()).unwrap_or(u64::MAX)
            }),
        }
    }

    fn health(&self, now: Instant) -> Health {
        match self.life {
            _ if self.leaving => Health::Stopped,
            _ if self.keeps_dying(now) => Health::Critical,
            Life::Down | Life::Hung => Health::Critical,
            Life::Heard => Health::Healthy,
            Life::None | Life::Started => Health::Unknown,
        }
    }

    fn keeps_dying(&self, now: Instant) -> bool {
        let recent = |at: &&Instant| now.saturating_duration_since(**at) <= DEATH_WINDOW;
        self.deaths.iter().filter(recent).count() >= CRITICAL_DEATHS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(role: RoleState) -> Report {
        Report {
            incarnation: 7,
            role,
        }
    }

    #[test]
    fn a_death_is_told_at_once_and_the_last_report_grows_old_until_the_next() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut keeper = Keeper::default();
        assert_eq!(keeper.beat(1, "b".into(), at(0)).health, Health::Unknown);
        keeper.started();
        assert_eq!(keeper.beat(2, "b".into(), at(1)).agent, None);
        keeper.reported(report(RoleState::Ready), at(10));
        let beat = keeper.beat(3, "b".into(), at(12));
        assert_eq!((beat.health, beat.agent_age_ms), (Health::Healthy, 2000));

        assert_eq!(keeper.ended(at(13)), RESTART_WAIT);
        let beat = keeper.beat(4, "b".into(), at(20));
        assert_eq!((beat.health, beat.agent_age_ms), (Health::Critical, 10_000));
        assert_eq!(beat.agent.map(|agent| agent.role), Some(RoleState::Ready));
        keeper.started();
        let beat = keeper.beat(5, "b".into(), at(21));
        assert_eq!((beat.health, beat.agent_age_ms), (Health::Unknown, 11_000));
        keeper.reported(report(RoleState::Ready), at(22));
        let beat = keeper.beat(6, "b".into(), at(22));
        assert_eq!((beat.health, beat.agent_age_ms), (Health::Healthy, 0));
        assert_eq!(beat.agent.map(|agent| agent.starts), Some(2));
        keeper.leave();
        assert_eq!(keeper.beat(7, "b".into(), at(23)).health, Health::Stopped);
    }

    #[test]
    fn a_guest_agent_that_says_nothing_for_a_minute_is_killed_once() {
        let now = Instant::now();
        let mut keeper = Keeper::default();
        let silence = |keeper: &mut Keeper| (0..12).any(|_| keeper.tick());
        assert!(!silence(&mut keeper) && !keeper.tick(), "none runs");
        // One that hangs before its first word, and one after that.
        for words in 0..=1 {
            keeper.started();
            for _ in 0..words {
                assert!(!silence(&mut keeper));
                keeper.reported(report(RoleState::Ready), now);
            }
            assert!(!silence(&mut keeper));
            assert!(!keeper.hung() && keeper.health(now) != Health::Critical);
            assert!(keeper.tick());
            // What it sent before is not taken for life.
            keeper.reported(report(RoleState::Ready), now);
            assert!(keeper.hung() && keeper.health(now) == Health::Critical);
            assert!(!silence(&mut keeper) && !keeper.tick(), "killed twice");
            keeper.ended(now);
            assert!(!keeper.hung());
            assert!(!silence(&mut keeper) && !keeper.tick(), "none runs");
        }
    }

    #[test]
    fn three_deaths_in_five_minutes_are_critical_until_one_of_them_is_older() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut keeper = Keeper::default();
        let mut waits = Vec::new();
        for second in [0, 200, 250] {
            keeper.started();
            keeper.reported(report(RoleState::Ready), at(second));
            waits.push(keeper.ended(at(second)));
        }
        assert_eq!(waits, [RESTART_WAIT, RESTART_WAIT, CRITICAL_WAIT]);
        keeper.started();
        keeper.reported(report(RoleState::Ready), at(281));
        assert_eq!(keeper.health(at(300)), Health::Critical);
        assert_eq!(keeper.health(at(301)), Health::Healthy);
        assert_eq!(keeper.ended(at(600)), RESTART_WAIT);
    }
}
