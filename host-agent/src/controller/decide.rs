//! Decides the next step for a service. Pure.

use vmbus::message::RoleState;

use crate::store::services::{Expected, ServiceRecord};
use crate::supervisor::status::{InstanceStatus, Phase};

/// What is on the host of a service's deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    /// It runs.
    Running,
    /// It has files that this host agent has not adopted, and guests of it may run.
    Files,
    /// It has files, and no guest of it runs.
    Stopped,
    /// Nothing.
    Absent,
}

/// The next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Create the deployment of the newest revision.
    Deploy,
    /// Adopt what an earlier host agent left.
    Adopt,
    /// It is as wanted: wait for a change.
    Watch,
    /// Stop the deployment. Its files stay.
    Stop,
    /// It is stopped, as wanted: wait for a change.
    Rest,
    /// Stop the deployment and remove its files.
    Remove,
    /// Remove the files of a deployment that does not run.
    Discard,
    /// Nothing is left of a deleted service.
    Forget,
}

/// The next step for `service`, of whose deployment there is `presence`.
pub(super) const fn next_step(service: &ServiceRecord, presence: Presence) -> Step {
    match (service.expected, presence) {
        // Its guests may run: they are stopped only after they are adopted.
        (_, Presence::Files) | (Expected::Started, Presence::Stopped) => Step::Adopt,
        (Expected::Started, Presence::Absent) => Step::Deploy,
        (Expected::Started, Presence::Running) => Step::Watch,
        (Expected::Stopped, Presence::Running) => Step::Stop,
        (Expected::Stopped, Presence::Stopped | Presence::Absent) => Step::Rest,
        (Expected::Deleted, Presence::Running) => Step::Remove,
        (Expected::Deleted, Presence::Stopped) => Step::Discard,
        (Expected::Deleted, Presence::Absent) => Step::Forget,
    }
}

/// What the states of a deployment's instances, each with its name, say about the operation
/// that started them: `None` while they start.
pub(super) fn outcome(instances: &[(&str, InstanceStatus)]) -> Option<Result<(), String>> {
    let failed = instances.iter().find(|(_, status)| {
        matches!(
            status.phase,
            Phase::Failed
                | Phase::Faulted
                | Phase::Stopped { .. }
                | Phase::Role(RoleState::Failed | RoleState::Cycling)
        )
    });
    if let Some((name, status)) = failed {
        return Some(Err(format!("{name} is {}", status.word())));
    }
    let ready = instances.iter().all(|(_, status)| status.is_ready());
    ready.then_some(Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(expected: Expected) -> ServiceRecord {
        ServiceRecord {
            name: "shop".into(),
            expected,
            generation: 1,
            deployment: None,
        }
    }

    #[test]
    fn what_is_wanted_and_what_is_there_decide_the_step() {
        use Presence::{Absent, Files, Running, Stopped};
        for (expected, presence, step) in [
            (Expected::Started, Absent, Step::Deploy),
            (Expected::Started, Files, Step::Adopt),
            (Expected::Started, Running, Step::Watch),
            (Expected::Started, Stopped, Step::Adopt),
            (Expected::Stopped, Running, Step::Stop),
            // A host agent that died while it stopped the guests has left some.
            (Expected::Stopped, Files, Step::Adopt),
            (Expected::Stopped, Stopped, Step::Rest),
            (Expected::Stopped, Absent, Step::Rest),
            (Expected::Deleted, Running, Step::Remove),
            (Expected::Deleted, Files, Step::Adopt),
            (Expected::Deleted, Stopped, Step::Discard),
            (Expected::Deleted, Absent, Step::Forget),
        ] {
            assert_eq!(next_step(&service(expected), presence), step);
        }
    }

    #[test]
    fn an_operation_ends_when_all_are_ready_or_one_has_failed() {
        let status = |phase| InstanceStatus {
            phase,
            ..InstanceStatus::default()
        };
        let ready = || status(Phase::Role(RoleState::Ready));
        assert_eq!(
            outcome(&[("a", ready()), ("b", status(Phase::Booting))]),
            None
        );
        assert_eq!(outcome(&[("a", ready()), ("b", ready())]), Some(Ok(())));
        let cycling = status(Phase::Role(RoleState::Cycling));
        let failed = outcome(&[("a", status(Phase::Booting)), ("b", cycling)]);
        assert_eq!(failed, Some(Err("b is Cycling".into())));
        let full = InstanceStatus {
            no_space: Some("full".into()),
            ..ready()
        };
        assert_eq!(outcome(&[("a", full)]), None);
    }
}
