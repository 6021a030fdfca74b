//! Decides what the guest agent does next to bring the guest to its goal. Pure.
//!
//! A goal is level-triggered and whole: whatever was done for an earlier one, the planner
//! compares what is wanted with what is done and names the next effect. An effect that
//! failed is tried again after a delay, unless its failure cannot pass in this boot. The
//! status that the host gets follows from the same facts, so that nothing is reported as
//! applied before it is.

use std::time::{Duration, Instant};

use vmbus::message::{ExpectedState, Goal, MAX_DETAIL, RoleState, Status};
use vmbus::text::clip;

use crate::backoff::Backoff;
use crate::bootstrapper::Role;
use crate::failure::Failure;

/// Longest description of a failure, in characters: within `MAX_DETAIL` with what is added.
const MAX_FAILURE: usize = MAX_DETAIL - 100;
/// Delay after the first failure, and the longest.
const FIRST_DELAY: Duration = Duration::from_secs(1);
const LONGEST_DELAY: Duration = Duration::from_secs(60);

/// One step towards a goal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Stop the role of an earlier goal, with its bootstrapper.
    Stop,
    /// Disks, user, local storage, names.
    SetUp,
    /// Tunnels of endpoints, environment of `exec`.
    Serve,
    /// Start a bootstrapper with the role.
    Start,
}

/// What to do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// This, for this goal; its result goes to [`Planner::finished`].
    Do(Effect, Box<Goal>),
    /// Nothing, until something happens or this time comes.
    Wait(Option<Instant>),
}

/// What is wanted, what is done, what failed. An incarnation of 0 is that of no goal.
#[derive(Debug)]
pub struct Planner {
    wanted: Option<Box<Goal>>,
    set_up: u64,
    served: u64,
    running: Option<Running>,
    applied: u64,
    /// The effect that is being performed.
    busy: Option<(Effect, Box<Goal>)>,
    failed: Option<Failed>,
    backoff: Backoff,
}

/// A bootstrapper that runs.
#[derive(Debug)]
struct Running {
    goal: Box<Goal>,
    since: Instant,
}

/// The last attempt failed.
#[derive(Debug)]
struct Failed {
    state: RoleState,
    detail: String,
    /// The next attempt; none when the failure is permanent.
    retry: Option<Retry>,
}

#[derive(Debug)]
struct Retry {
    at: Instant,
    delay: Duration,
}

impl Planner {
    /// No goal is known and nothing runs.
    pub const fn new() -> Self {
        Self {
            wanted: None,
            set_up: 0,
            served: 0,
            running: None,
            applied: 0,
            busy: None,
            failed: None,
            backoff: Backoff::new(FIRST_DELAY, LONGEST_DELAY),
        }
    }

    /// A bootstrapper of an earlier guest agent runs the role of `goal`.
    pub fn adopted(&mut self, goal: Box<Goal>, now: Instant) {
        self.set_up = goal.incarnation;
        self.applied = goal.incarnation;
        self.wanted = Some(goal.clone());
        self.running = Some(Running { goal, since: now });
    }

    /// The host sent a goal. False if it is known already, or older than what is wanted.
    pub fn goal(&mut self, goal: Goal) -> bool {
        if goal.incarnation <= self.wanted.as_ref().map_or(0, |wanted| wanted.incarnation) {
            return false;
        }
        self.wanted = Some(Box::new(goal));
        self.failed = None;
        self.backoff.reset();
        self.note_applied();
        true
    }

    /// What to do now. [`Next::Do`] counts as begun.
    pub fn next(&mut self, now: Instant) -> Next {
        let Some(wanted) = &self.wanted else {
            return Next::Wait(None);
        };
        if self.busy.is_some() {
            return Next::Wait(None);
        }
        let Some(effect) = self.missing(wanted) else {
            return Next::Wait(None);
        };
        match &self.failed {
            Some(Failed { retry: None, .. }) => return Next::Wait(None),
            Some(Failed {
                retry: Some(retry), ..
            }) if retry.at > now => {
                return Next::Wait(Some(retry.at));
            }
            _ => {}
        }
        let goal = wanted.clone();
        self.busy = Some((effect, goal.clone()));
        Next::Do(effect, goal)
    }

    /// The first step that is missing on the way to `wanted`.
    fn missing(&self, wanted: &Goal) -> Option<Effect> {
        let incarnation = wanted.incarnation;
        let running = self
            .running
            .as_ref()
            .map(|running| running.goal.incarnation);
        if running.is_some_and(|running| running != incarnation) {
            return Some(Effect::Stop);
        }
        match wanted.expected {
            ExpectedState::Stopped => None,
            ExpectedState::Started if self.set_up != incarnation => Some(Effect::SetUp),
            ExpectedState::Started if self.served != incarnation => Some(Effect::Serve),
            ExpectedState::Started => running.is_none().then_some(Effect::Start),
        }
    }

    /// The effect that [`Planner::next`] named last was performed.
    pub fn finished(&mut self, result: Result<(), Failure>, now: Instant) {
        let Some((effect, goal)) = self.busy.take() else {
            return;
        };
        match result {
            Ok(()) => self.succeeded(effect, goal, now),
            // The failure of an earlier goal says nothing of the one wanted now.
            Err(failure) if self.is_wanted(&goal) => {
                let state = match effect {
                    Effect::Stop => RoleState::Stopping,
                    _ if self.applied == goal.incarnation => RoleState::Recycling,
                    _ => RoleState::Creating,
                };
                self.fail(failure, state, now);
            }
            Err(_) => {}
        }
    }

    fn succeeded(&mut self, effect: Effect, goal: Box<Goal>, now: Instant) {
        self.failed = None;
        match effect {
            Effect::Stop => self.running = None,
            Effect::SetUp => self.set_up = goal.incarnation,
            Effect::Serve => self.served = goal.incarnation,
            Effect::Start => self.running = Some(Running { goal, since: now }),
        }
        self.note_applied();
    }

    /// The bootstrapper ended without being asked to.
    pub fn bootstrapper_ended(&mut self, now: Instant) {
        let Some(Running { goal, since }) = self.running.take() else {
            return;
        };
        if now.saturating_duration_since(since) >= LONGEST_DELAY {
            self.backoff.reset();
        }
        if self.is_wanted(&goal) {
            let failure = Failure::passing("bootstrapper ended by itself".into());
            self.fail(failure, RoleState::Recycling, now);
        }
        self.note_applied();
    }

    fn is_wanted(&self, goal: &Goal) -> bool {
        self.wanted
            .as_ref()
            .is_some_and(|wanted| wanted.incarnation == goal.incarnation)
    }

    fn fail(&mut self, failure: Failure, state: RoleState, now: Instant) {
        let Failure { detail, permanent } = failure;
        let detail = clip(detail, MAX_FAILURE);
        self.failed = Some(if permanent {
            Failed {
                state: RoleState::Failed,
                detail,
                retry: None,
            }
        } else {
            let delay = self.backoff.failed();
            Failed {
                state,
                detail: format!("{detail}; next attempt in {} s", delay.as_secs()),
                retry: Some(Retry {
                    at: now + delay,
                    delay,
                }),
            }
        });
    }

    fn note_applied(&mut self) {
        // An effect in progress may start what is not wanted any more.
        if let Some(wanted) = &self.wanted
            && self.busy.is_none()
            && self.missing(wanted).is_none()
        {
            self.applied = wanted.incarnation;
        }
    }

    /// The bootstrapper's goal, while one runs.
    pub fn running(&self) -> Option<&Goal> {
        self.running.as_ref().map(|running| &*running.goal)
    }

    /// Why the last attempt failed and what follows, if it failed.
    pub fn failure(&self) -> Option<&str> {
        self.failed.as_ref().map(|failed| failed.detail.as_str())
    }

    /// The status for the host; `role` is what the bootstrapper reported last.
    pub fn status(&self, role: &Role) -> Status {
        let mut status = Status {
            incarnation: 0,
            applied: self.applied,
            state: role.state,
            detail: role.detail.clone(),
            recycles: role.recycles,
            last_exit: role.last_exit,
            retry_in_ms: role.retry_in_ms,
            killed: role.killed,
        };
        let Some(wanted) = &self.wanted else {
            return status;
        };
        status.incarnation = wanted.incarnation;
        if let Some(failed) = &self.failed {
            status.state = failed.state;
            status.detail.clone_from(&failed.detail);
            let delay = failed.retry.as_ref().map(|retry| retry.delay.as_millis());
            status.retry_in_ms = delay.and_then(|ms| u64::try_from(ms).ok());
            status.killed = false;
        } else if let Some(running) = &self.running {
            status.incarnation = running.goal.incarnation;
        } else if wanted.expected == ExpectedState::Started {
            status.state = RoleState::Creating;
            status.detail = String::new();
            status.retry_in_ms = None;
            status.killed = false;
        } else {
            status.state = RoleState::Stopped;
            status.retry_in_ms = None;
        }
        status
    }
}

impl Default for Planner {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests;
