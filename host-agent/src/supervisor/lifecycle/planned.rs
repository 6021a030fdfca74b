//! What an operator changes: the guest ends cleanly and boots again, which does not count
//! as a failure.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmbus::message::PowerAction;

use super::{Effect, Lifecycle, State, Wait};
use crate::supervisor::event::EventKind;
use crate::supervisor::restart::RestartBudget;
use crate::vmm::control::ExitReason;

/// Why host-agent ends a guest whose end an operator wants.
const BECAUSE: &str = "an operator asked for it";

/// Disks that are made anew before a boot. They stay recorded until that boot's VMM process
/// starts, so that a host agent that dies in between makes them again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Renewal {
    /// The OS disk: an empty diff over the base.
    pub os: bool,
    /// The resource disk with the local storage.
    pub resource: bool,
    /// The active application disk.
    pub application: bool,
}

impl Renewal {
    /// Every disk is kept.
    pub const NONE: Self = Self {
        os: false,
        resource: false,
        application: false,
    };
    /// After a power cycle of the node.
    pub const OS: Self = Self {
        os: true,
        ..Self::NONE
    };
    /// For a restart.
    pub const APPLICATION: Self = Self {
        application: true,
        ..Self::NONE
    };
    /// For a reimage.
    pub const ALL_BUT_RESOURCE: Self = Self {
        resource: false,
        ..Self::ALL
    };
    /// For a rebuild.
    pub const ALL: Self = Self {
        os: true,
        resource: true,
        application: true,
    };

    /// The disks of both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self {
            os: self.os || other.os,
            resource: self.resource || other.resource,
            application: self.application || other.application,
        }
    }
}

impl Lifecycle {
    /// Whether the instance is stopping for good, or has stopped.
    pub const fn is_ending(&self) -> bool {
        matches!(self.state, State::Stopping | State::Finished)
    }

    pub(super) fn reboot(&mut self, renew: Renewal, state: &State, effects: &mut Vec<Effect>) {
        if self.is_ending() {
            return;
        }
        self.renew = self.renew.and(renew);
        // The operator has seen to what failed before.
        self.budget = RestartBudget::default();
        match state {
            State::Running => self.end_planned(effects),
            // It is being ended already: the next boot follows at once.
            State::Ending { .. } => self.planned = true,
            State::Waiting => self.boot_planned(effects),
            State::Idle | State::Stopping | State::Finished => {}
        }
    }

    /// Begins to end the guest that runs, for the operator.
    pub(super) fn end_planned(&mut self, effects: &mut Vec<Effect>) {
        self.planned = true;
        self.state = State::Ending {
            because: BECAUSE.into(),
            // The role has its whole time to stop.
            asked: false,
        };
        self.end_cleanly(effects);
    }

    /// A boot that is not wanted any more has not started a VMM process.
    pub(super) fn cancelled(
        &mut self,
        state: State,
        now: Duration,
        jitter: f64,
        effects: &mut Vec<Effect>,
    ) {
        match state {
            State::Stopping => self.finish(true, None, effects),
            State::Ending { .. } if self.planned => self.boot_planned(effects),
            State::Ending { because, .. } => self.plan_restart(because, now, jitter, effects),
            _ => {}
        }
    }

    /// Number of the boot that runs when what was asked for is done.
    pub fn next_generation(&self) -> u64 {
        match self.state {
            State::Ending { .. } | State::Waiting => self.generation + 1,
            _ => self.generation,
        }
    }

    /// The guest has ended for the operator.
    pub(super) fn boot_planned(&mut self, effects: &mut Vec<Effect>) {
        effects.push(Effect::Report(EventKind::Restarting {
            because: BECAUSE.into(),
            generation: self.generation + 1,
            delay_ms: 0,
        }));
        self.boot(effects);
    }

    /// Asks the role and then the guest to end, each within its limit.
    pub(super) fn end_cleanly(&mut self, effects: &mut Vec<Effect>) {
        self.rotate(false, effects);
        effects.push(Effect::Report(EventKind::Stopping));
        if self.connected {
            effects.push(Effect::AskShutdown {
                then: PowerAction::PowerOff,
                deadline: self.limits.role_stop,
            });
            let limit = self.limits.role_stop + self.limits.power_off;
            effects.push(Effect::Wait(Wait::Shutdown, limit));
        } else {
            self.stop_vmm(effects);
        }
    }

    /// Whether a guest that was asked to end did so by itself. Before the app agent connects
    /// there is no role to stop.
    pub(super) fn is_clean(&self, reason: &ExitReason) -> bool {
        match reason {
            ExitReason::PowerOff => !self.status.as_ref().is_some_and(|it| it.killed),
            ExitReason::Stopped => !self.connected,
            _ => false,
        }
    }
}
