//! What an operator changes about one instance.

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use utoipa::ToSchema;
use vmbus::message::RoleState;

use super::super::event::EventKind;
use super::super::lifecycle::{Input, Renewal};
use super::super::spec::InstanceSpec;
use super::super::status::{InstanceStatus, Phase};
use super::Instance;

/// A change of one instance. Each is idempotent in its meaning: asked for twice, the instance
/// ends up in the same state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Reboot the guest: OS disk and local storage are kept, the application disk is linked
    /// anew.
    Restart,
    /// Stop the role and start it again in its guest.
    Recycle,
    /// Reboot with a new OS and application disk: local storage is kept.
    Reimage,
    /// Reboot with new disks: nothing is kept.
    Rebuild,
}

impl Change {
    const fn name(self) -> &'static str {
        match self {
            Self::Restart => "restart",
            Self::Recycle => "recycle",
            Self::Reimage => "reimage",
            Self::Rebuild => "rebuild",
        }
    }
}

/// What was accepted, and recorded if the instance is durable. It is done when the
/// instance's status has at least these numbers and is Ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Accepted {
    /// Number of the guest's boot.
    pub generation: u64,
    /// Incarnation of the goal that the guest applies.
    pub incarnation: u64,
}

impl Accepted {
    /// Whether the change is done and the instance Ready, or will not become Ready without
    /// another change.
    pub fn is_settled(self, status: &InstanceStatus) -> bool {
        let reached = status.generation >= self.generation;
        match status.phase {
            Phase::Role(RoleState::Failed | RoleState::Cycling) | Phase::Faulted => reached,
            Phase::Stopped { .. } => true,
            _ => reached && status.applied >= self.incarnation && status.is_ready(),
        }
    }
}

/// Why a change was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// The instance is being removed.
    #[error("the instance is being removed")]
    Removed,
    /// The change could not be recorded. It may happen all the same.
    #[error("cannot record the change")]
    Record(#[source] std::io::Error),
}

/// Where the answer to a change goes.
pub(super) type ChangeAnswer = oneshot::Sender<Result<Accepted, ChangeError>>;

impl Instance {
    /// Begins `change`, and answers when the record on disk has it.
    pub(super) fn change(&mut self, change: Change, answer: ChangeAnswer) -> bool {
        if self.life.is_ending() {
            let _ = answer.send(Err(ChangeError::Removed));
            return true;
        }
        self.report(EventKind::Requested {
            change: change.name().to_owned(),
        });
        let more = match change {
            Change::Restart => self.feed(Input::Reboot(Renewal::APPLICATION)),
            Change::Reimage => self.feed(Input::Reboot(Renewal::ALL_BUT_RESOURCE)),
            Change::Rebuild => self.feed(Input::Reboot(Renewal::ALL)),
            Change::Recycle => {
                let more = self.feed(Input::NewRole);
                let mut spec = self.parts.spec.clone();
                spec.goal.incarnation += 1;
                self.want(spec);
                // A failure of the earlier goal does not answer this one.
                self.status.send_modify(|status| {
                    if matches!(status.phase, Phase::Role(_)) {
                        status.phase = Phase::Booted;
                    }
                });
                more
            }
        };
        self.record();
        let accepted = Accepted {
            generation: self.life.next_generation(),
            incarnation: self.parts.spec.goal.incarnation,
        };
        match self.records.as_ref().and_then(|records| records.last()) {
            // Written already, being written, or written here.
            Some(record) => drop(tokio::task::spawn_blocking(move || {
                let written = record.write().map_err(ChangeError::Record);
                let _ = answer.send(written.map(|()| accepted));
            })),
            None => drop(answer.send(Ok(accepted))),
        }
        more
    }

    /// Makes `spec` the one that is wanted: the guest gets its goal, and its next boot the
    /// rest.
    pub(super) fn want(&mut self, spec: InstanceSpec) {
        self.goal.send_replace(spec.goal.clone());
        self.wanted.send_replace(spec.clone().into());
        self.parts.spec = spec;
    }
}
