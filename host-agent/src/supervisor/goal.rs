//! From a role of the model to the goal state of one of its instances. Pure.

use vmbus::message::{ExpectedState, Goal};

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
