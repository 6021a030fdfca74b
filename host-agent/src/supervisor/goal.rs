//! From a role of the model to the goal state of one of its instances. Pure.

use vmbus::message::{ExpectedState, Goal, RoleState, Status};

use crate::service::model::Role;

/// Serial number of the OS disk.
pub const OS_DISK: &str = "os";
/// Serial number of the resource disk.
pub const RESOURCE_DISK: &str = "resource";
/// Serial number of the application disk.
pub const APPLICATION_DISK: &str = "app-e";

/// Update and fault domains of an instance: spread evenly over the classic
/// defaults (role model, section 4.5).
const UPDATE_DOMAINS: u32 = 5;
const FAULT_DOMAINS: u32 = 2;

/// `<Role>_IN_<n>`.
pub fn instance_name(role: &Role, number: u32) -> String {
    format!("{}_IN_{number}", role.definition.name)
}

/// The goal of instance `number` of `role`.
pub fn goal(
    role: &Role,
    number: u32,
    deployment_id: &str,
    incarnation: u64,
    stop_timeout_ms: u64,
) -> Goal {
    Goal {
        incarnation,
        expected: ExpectedState::Started,
        deployment_id: deployment_id.to_owned(),
        instance: instance_name(role, number),
        update_domain: number % UPDATE_DOMAINS,
        fault_domain: number % FAULT_DOMAINS,
        role: role.definition.clone(),
        application_disk: APPLICATION_DISK.into(),
        resource_disk: RESOURCE_DISK.into(),
        stop_timeout_ms,
    }
}

/// Whether `status` is a Ready of an earlier goal than `goal`: it must not bring the
/// instance into rotation. Other states of an earlier goal only take it out.
pub fn is_outdated(status: &Status, goal: &Goal) -> bool {
    status.state == RoleState::Ready && status.incarnation < goal.incarnation
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Progress;
    use crate::service;
    use std::path::Path;

    const REDIS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/services/redis");

    #[test]
    fn an_old_ready_is_outdated_and_nothing_else() {
        let service = service::load(Path::new(REDIS), None, &Progress::default()).unwrap();
        let goal = goal(&service.roles[0], 0, "d", 7, 1);
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
            is_outdated(&status, &goal)
        };
        assert!(outdated(6, RoleState::Ready) && outdated(0, RoleState::Ready));
        assert!(!outdated(7, RoleState::Ready) && !outdated(8, RoleState::Ready));
        for state in [RoleState::Stopped, RoleState::Busy, RoleState::Unknown] {
            assert!(!outdated(6, state), "{state:?}");
        }
    }

    #[test]
    fn instances_are_spread_over_update_and_fault_domains() {
        let service = service::load(Path::new(REDIS), None, &Progress::default()).unwrap();
        let role = &service.roles[0];
        let domains = |number| {
            let goal = goal(role, number, "d", 1, 1);
            (goal.update_domain, goal.fault_domain)
        };
        let all: Vec<_> = (0..6).map(domains).collect();
        assert_eq!(all, [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0), (0, 1)]);
    }
}
