//! The state of an instance: the one type that CLI, API and reports read. Pure.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmbus::message::{RoleState, Status};

use super::agents::RunningAgent;
use super::event::{EventKind, Verdict, state_name};

/// The current state of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceStatus {
    /// Its phase.
    pub phase: Phase,
    /// Number of the boot, 0 before the first.
    pub generation: u64,
    /// Process id of the VMM, while one runs.
    pub vmm_pid: Option<u32>,
    /// Incarnation of the goal that the guest has applied in this boot, 0 before one.
    pub applied: u64,
    /// Times that the role ended by itself in this boot.
    pub recycles: u32,
    /// Paused by the operator.
    pub paused: bool,
    /// Why the guest is paused for disk space, if it is.
    pub no_space: Option<String>,
    /// Why the role or the guest is not well: the event that said so, for people.
    #[serde(default)]
    pub cause: Option<String>,
    /// When the last heartbeat of this boot arrived (`CLOCK_MONOTONIC` of this host).
    #[serde(skip)]
    pub last_heartbeat: Option<Duration>,
    /// Guests that ended since this host agent started, by cause: the verdict if the guest
    /// was condemned, else the reason of its exit.
    #[serde(default)]
    pub exits: BTreeMap<String, u64>,
    /// The guest agent of this boot, as far as the guest has said.
    #[serde(default)]
    pub agent: Option<RunningAgent>,
    /// The verdict of this boot, if its guest is condemned.
    #[serde(skip)]
    pub verdict: Option<Verdict>,
}

/// Phase of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "phase", content = "role", rename_all = "kebab-case")]
pub enum Phase {
    /// Created; no guest has been started.
    Accepted,
    /// A VMM process runs.
    Booting,
    /// PID 1 of the guest has connected.
    Booted,
    /// The guest agent reports this state of the role.
    Role(RoleState),
    /// The guest has ended.
    Ended,
    /// The guest is restarted after a delay.
    Restarting,
    /// Too many boots failed; the guest is restarted after a long delay.
    Faulted,
    /// The instance is stopping.
    Stopping,
    /// The instance was stopped.
    Stopped {
        /// Role and guest ended by themselves, or had not started.
        clean: bool,
    },
    /// The host cannot run the instance.
    Failed,
}

impl Default for InstanceStatus {
    fn default() -> Self {
        Self {
            phase: Phase::Accepted,
            generation: 0,
            vmm_pid: None,
            applied: 0,
            recycles: 0,
            paused: false,
            no_space: None,
            cause: None,
            last_heartbeat: None,
            exits: BTreeMap::new(),
            agent: None,
            verdict: None,
        }
    }
}

impl InstanceStatus {
    /// Whether the instance takes connections: its role is Ready and its guest runs.
    pub fn is_ready(&self) -> bool {
        self.phase == Phase::Role(RoleState::Ready) && self.no_space.is_none()
    }

    /// The state in one word.
    pub fn word(&self) -> &'static str {
        if self.no_space.is_some() {
            return "NoSpace";
        }
        self.phase.word()
    }

    /// Takes in an event of the instance.
    pub fn apply(&mut self, event: &EventKind) {
        match event {
            EventKind::GuestStarting { generation, pid }
            | EventKind::GuestAdopted { generation, pid } => {
                *self = Self {
                    phase: Phase::Booting,
                    generation: *generation,
                    vmm_pid: Some(*pid),
                    exits: std::mem::take(&mut self.exits),
                    ..Self::default()
                };
            }
            EventKind::Verdict { verdict, .. } => self.verdict = Some(*verdict),
            EventKind::AgentConnected { .. } => self.phase = Phase::Booted,
            EventKind::Role {
                state, recycles, ..
            } => {
                self.phase = Phase::Role(*state);
                let is_failure = matches!(
                    state,
                    RoleState::Failed | RoleState::Cycling | RoleState::Recycling
                );
                self.cause = is_failure.then(|| event.to_string());
                self.recycles = *recycles;
            }
            EventKind::Paused { paused } => self.paused = *paused,
            EventKind::NoSpace { .. } => self.no_space = Some(event.to_string()),
            EventKind::SpaceBack { .. } => self.no_space = None,
            EventKind::GuestExited { reason, .. } => {
                let cause = self.verdict.map_or(reason.name(), Verdict::name);
                *self.exits.entry(cause.to_owned()).or_default() += 1;
                *self = Self {
                    phase: Phase::Ended,
                    generation: self.generation,
                    exits: std::mem::take(&mut self.exits),
                    cause: Some(event.to_string()),
                    ..Self::default()
                };
            }
            EventKind::Restarting { .. } => self.phase = Phase::Restarting,
            EventKind::Faulted { .. } => {
                self.phase = Phase::Faulted;
                self.cause = Some(event.to_string());
            }
            EventKind::Stopping => self.phase = Phase::Stopping,
            EventKind::Stopped { clean } => self.phase = Phase::Stopped { clean: *clean },
            EventKind::Failed { .. } => {
                self.phase = Phase::Failed;
                self.cause = Some(event.to_string());
            }
            _ => {}
        }
    }
}

/// Whether `status` is a Ready of an earlier goal than `incarnation`: it must not bring
/// the instance into rotation. Other states of an earlier goal only take it out.
pub fn is_outdated(status: &Status, incarnation: u64) -> bool {
    status.state == RoleState::Ready && status.incarnation < incarnation
}

impl Phase {
    /// The phase in one word.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Accepted => "Accepted",
            Self::Booting => "Booting",
            Self::Booted => "Booted",
            Self::Role(state) => state_name(state),
            Self::Ended => "Ended",
            Self::Restarting => "Restarting",
            Self::Faulted => "Faulted",
            Self::Stopping => "Stopping",
            Self::Stopped { .. } => "Stopped",
            Self::Failed => "Failed",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::control::ExitReason;

    fn role(state: RoleState) -> EventKind {
        EventKind::Role {
            state,
            detail: String::new(),
            recycles: 2,
            last_exit: None,
            retry_in_ms: None,
        }
    }

    #[test]
    fn only_a_ready_role_in_a_running_guest_is_ready() {
        let mut status = InstanceStatus::default();
        let starting = EventKind::GuestStarting {
            generation: 3,
            pid: 7,
        };
        status.apply(&starting);
        assert!(!status.is_ready());
        status.apply(&role(RoleState::Ready));
        assert!(status.is_ready());
        status.apply(&EventKind::NoSpace {
            disk: "os".into(),
            file: "/d".into(),
            mount: "/".into(),
            needed_bytes: 1,
            free_bytes: None,
            quota: false,
        });
        assert_eq!((status.is_ready(), status.word()), (false, "NoSpace"));
        status.apply(&EventKind::SpaceBack { paused_ms: 1 });
        assert!(status.is_ready());
        status.apply(&role(RoleState::Busy));
        assert!(!status.is_ready());
    }

    #[test]
    fn only_a_ready_of_an_earlier_goal_is_outdated() {
        let outdated = |incarnation, state| {
            let status = Status {
                incarnation,
                applied: incarnation,
                state,
                detail: String::new(),
                recycles: 0,
                last_exit: None,
                retry_in_ms: None,
                killed: false,
            };
            is_outdated(&status, 7)
        };
        assert!(outdated(6, RoleState::Ready) && outdated(0, RoleState::Ready));
        assert!(!outdated(7, RoleState::Ready) && !outdated(8, RoleState::Ready));
        for state in [RoleState::Stopped, RoleState::Busy, RoleState::Unknown] {
            assert!(!outdated(6, state), "{state:?}");
        }
    }

    #[test]
    fn the_end_of_a_boot_resets_the_status() {
        let mut status = InstanceStatus::default();
        status.apply(&EventKind::GuestStarting {
            generation: 1,
            pid: 7,
        });
        status.apply(&role(RoleState::Ready));
        status.apply(&EventKind::Paused { paused: true });
        status.apply(&EventKind::GuestExited {
            reason: ExitReason::PowerOff,
            because: None,
        });
        let ended = InstanceStatus {
            phase: Phase::Ended,
            generation: 1,
            exits: BTreeMap::from([("power-off".to_owned(), 1)]),
            cause: Some("guest ended: power-off".to_owned()),
            ..InstanceStatus::default()
        };
        assert_eq!(status, ended);
    }

    #[test]
    fn ends_of_guests_are_counted_by_cause_over_boots() {
        let mut status = InstanceStatus::default();
        for (generation, verdict, reason) in [
            (1, None, ExitReason::Panic),
            (2, Some(Verdict::VmmHung), ExitReason::Killed),
            (3, None, ExitReason::Panic),
        ] {
            status.apply(&EventKind::GuestStarting { generation, pid: 7 });
            if let Some(verdict) = verdict {
                let evidence = String::new();
                status.apply(&EventKind::Verdict { verdict, evidence });
            }
            let because = None;
            status.apply(&EventKind::GuestExited { reason, because });
        }
        let exits: Vec<_> = status.exits.iter().collect();
        assert_eq!(exits, [(&"panic".into(), &2), (&"vmm-hung".into(), &1)]);
    }
}
