//! The state of an instance: the one type that CLI, API, reports and timeline
//! read. Pure: events change it, nothing else.

use std::fmt;

use serde::{Deserialize, Serialize};
use vmbus::message::RoleState;

use super::event::{EventKind, state_name};

/// An instance as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceStatus {
    /// Where it is in its life.
    pub phase: Phase,
    /// Number of the boot, 0 before the first.
    pub generation: u64,
    /// Process id of the VMM, while one runs.
    pub vmm_pid: Option<u32>,
    /// Incarnation of the goal that the guest has applied in this boot, 0 before one.
    pub applied: u64,
    /// Times that the role ended by itself in this boot.
    pub recycles: u32,
    /// The operator stopped the vCPUs.
    pub paused: bool,
    /// Why the guest is paused for disk space, if it is.
    pub no_space: Option<String>,
}

/// Where an instance is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", content = "role", rename_all = "kebab-case")]
pub enum Phase {
    /// Accepted, nothing runs yet.
    Accepted,
    /// A VMM process runs.
    Booting,
    /// PID 1 of the guest has connected.
    Booted,
    /// The guest agent reports this state of the role.
    Role(RoleState),
    /// The guest ended.
    Ended,
    /// The guest is started again after a delay.
    Restarting,
    /// Too many boots failed; the next try is after a long delay.
    Faulted,
    /// The instance is asked to stop.
    Stopping,
    /// Down by request, and whether nothing was cut off.
    Stopped {
        /// The role and the guest ended by themselves, or had not begun.
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
                    ..Self::default()
                };
            }
            EventKind::AgentConnected { .. } => self.phase = Phase::Booted,
            EventKind::Role {
                state, recycles, ..
            } => {
                self.phase = Phase::Role(*state);
                self.recycles = *recycles;
            }
            EventKind::Paused { paused } => self.paused = *paused,
            EventKind::NoSpace { .. } => self.no_space = Some(event.to_string()),
            EventKind::SpaceBack { .. } => self.no_space = None,
            EventKind::GuestExited { .. } => {
                *self = Self {
                    phase: Phase::Ended,
                    generation: self.generation,
                    ..Self::default()
                };
            }
            EventKind::Restarting { .. } => self.phase = Phase::Restarting,
            EventKind::Faulted { .. } => self.phase = Phase::Faulted,
            EventKind::Stopping => self.phase = Phase::Stopping,
            EventKind::Stopped { clean } => self.phase = Phase::Stopped { clean: *clean },
            EventKind::Failed { .. } => self.phase = Phase::Failed,
            _ => {}
        }
    }
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
    fn a_new_boot_forgets_what_the_last_one_reported() {
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
            ..InstanceStatus::default()
        };
        assert_eq!(status, ended);
    }
}
