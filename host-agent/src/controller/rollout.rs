//! Decides the next step of a rollout: first the instances that are not Ready, then one
//! upgrade domain after the other. Pure.

use std::time::Duration;

use crate::store::rollouts::{OnFailure, Rollout, RolloutPolicy, Stage};

/// An instance, as seen from the revision to which the rollout leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    /// `<Role>_IN_<n>`.
    pub(super) name: String,
    /// Its upgrade domain.
    pub(super) domain: u32,
    /// What it is.
    pub(super) state: SeenState,
}

/// What an instance is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum SeenState {
    /// The revision has it, and it does not exist.
    Missing,
    /// It exists, and the revision does not have it.
    Surplus,
    /// It is the same in both revisions.
    Same,
    /// It is to be changed.
    Old {
        /// It takes connections.
        ready: bool,
    },
    /// It was changed.
    New(Progress),
}

/// How far an instance is that was changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Progress {
    /// It has this state, and is not Ready yet.
    Starting(&'static str),
    /// It is Ready for this long.
    Ready(Duration),
    /// It has failed: its state.
    Failed(&'static str),
}

/// The next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Take these instances to the revision, all at the same time.
    Change(Vec<String>),
    /// Remove these instances.
    Retire(Vec<String>),
    /// Wait for a change of an instance, or for this time.
    Wait(Option<Duration>),
    /// The cursor moves.
    Move(Rollout, Moved),
    /// Every instance is as the revision says.
    Finish,
    /// Wait for the operator.
    Rest,
}

/// Why the cursor moves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Moved {
    /// To the next stage.
    On,
    /// An upgrade domain is done, and the rollout pauses.
    Paused,
    /// An instance failed: the rollout waits for a decision.
    Halted(String),
    /// An instance failed: every instance is taken back.
    Back(String),
}

impl Rollout {
    /// The next step, for these instances and a stage that has lasted for `lasted`.
    pub(super) fn next(&self, seen: &[Seen], lasted: Duration) -> Step {
        if self.paused || self.halted.is_some() {
            return Step::Rest;
        }
        let names = |wanted: &dyn Fn(&Seen) -> bool| {
            let found = seen.iter().filter(|it| wanted(it));
            found.map(|it| it.name.clone()).collect::<Vec<_>>()
        };
        // They take no connections, so changing them takes none away.
        let down = names(&|it| match it.state {
            SeenState::Missing => true,
            SeenState::Old { ready } => !ready && self.stage == Stage::First,
            _ => false,
        });
        if !down.is_empty() {
            return Step::Change(down);
        }
        if let Stage::Domain(domain) = self.stage {
            let old = names(&|it| it.domain == domain && matches!(it.state, SeenState::Old { .. }));
            if !old.is_empty() {
                return Step::Change(old);
            }
        }
        match judge(&self.policy, seen, lasted) {
            Judgement::Failed(why) => self.failed(why),
            Judgement::Wait(due) => Step::Wait(due),
            Judgement::Ready => self.on(seen),
        }
    }

    /// Every instance that was changed is Ready.
    fn on(&self, seen: &[Seen]) -> Step {
        let is_old = |it: &&Seen| matches!(it.state, SeenState::Old { .. });
        let next = seen.iter().filter(is_old).map(|it| it.domain).min();
        let done = self.done + u32::from(matches!(self.stage, Stage::Domain(_)));
        if let Some(domain) = next {
            let every = self.policy.pause_after.filter(|every| *every > 0);
            let every = every.filter(|_| self.rolling_back.is_none());
            let paused = done > self.done && every.is_some_and(|every| done.is_multiple_of(every));
            let next = Self {
                stage: Stage::Domain(domain),
                done,
                paused,
                ..self.clone()
            };
            let moved = if paused { Moved::Paused } else { Moved::On };
            return Step::Move(next, moved);
        }
        if self.stage != Stage::Last {
            let last = Self {
                stage: Stage::Last,
                done,
                ..self.clone()
            };
            return Step::Move(last, Moved::On);
        }
        let surplus = seen.iter().filter(|it| it.state == SeenState::Surplus);
        let surplus: Vec<_> = surplus.map(|it| it.name.clone()).collect();
        if surplus.is_empty() {
            Step::Finish
        } else {
            Step::Retire(surplus)
        }
    }

    /// An instance failed, or could not be changed.
    pub(super) fn failed(&self, why: String) -> Step {
        let back = self.policy.on_failure == OnFailure::Rollback && self.from != self.to;
        if back && self.rolling_back.is_none() {
            let back = Self {
                to: self.from,
                incarnation: self.incarnation + 1,
                stage: Stage::First,
                done: 0,
                rolling_back: Some(why.clone()),
                ..self.clone()
            };
            return Step::Move(back, Moved::Back(why));
        }
        let halted = Self {
            halted: Some(why.clone()),
            ..self.clone()
        };
        Step::Move(halted, Moved::Halted(why))
    }
}

enum Judgement {
    Ready,
    Wait(Option<Duration>),
    Failed(String),
}

/// What the instances that were changed say together.
fn judge(policy: &RolloutPolicy, seen: &[Seen], lasted: Duration) -> Judgement {
    let limit = Duration::from_millis(policy.limit_ms);
    let stable = Duration::from_millis(policy.stable_ms);
    let mut due: Option<Duration> = None;
    let mut waits = false;
    for instance in seen {
        let SeenState::New(progress) = &instance.state else {
            continue;
        };
        let name = &instance.name;
        let rest = match progress {
            Progress::Failed(state) => return Judgement::Failed(format!("{name} is {state}")),
            Progress::Starting(state) if lasted >= limit => {
                let limit = limit.as_secs_f64();
                return Judgement::Failed(format!("{name} is {state} after {limit} s"));
            }
            Progress::Starting(_) => limit.saturating_sub(lasted),
            Progress::Ready(since) if *since < stable => stable.saturating_sub(*since),
            Progress::Ready(_) => continue,
        };
        waits = true;
        due = Some(due.map_or(rest, |due| due.min(rest)));
    }
    if waits {
        Judgement::Wait(due)
    } else {
        Judgement::Ready
    }
}

#[cfg(test)]
mod tests;
