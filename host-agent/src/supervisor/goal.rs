//! From a role of the model to the goal state of one of its instances. Pure.

use vmbus::message::{Endpoint, EntryPoint, EnvironmentValue, ExpectedState, Goal, LocalStorage};

use crate::service::model::{InstanceValue, Role, Value};

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
    format!("{}_IN_{number}", role.name)
}

/// The goal of instance `number` of `role`.
pub fn goal(
    role: &Role,
    number: u32,
    deployment_id: &str,
    incarnation: u64,
    stop_timeout_ms: u64,
) -> Goal {
    let environment = role
        .environment
        .iter()
        .map(|(name, value)| (name.clone(), resolve(value, role, number, deployment_id)))
        .collect();
    Goal {
        incarnation,
        expected: ExpectedState::Started,
        deployment_id: deployment_id.to_owned(),
        instance: instance_name(role, number),
        role: role.name.clone(),
        entry_point: EntryPoint::Program {
            command: role.command.clone(),
            ready_on_start: role.ready_on_start,
        },
        elevated: role.elevated,
        settings: role.settings.clone(),
        environment,
        local_storage: role
            .local_storage
            .iter()
            .map(|storage| LocalStorage {
                name: storage.name.clone(),
                size_mib: storage.size_mib,
                clean_on_role_recycle: storage.clean_on_role_recycle,
            })
            .collect(),
        endpoints: role
            .endpoints
            .iter()
            .map(|endpoint| Endpoint {
                name: endpoint.name.clone(),
                protocol: "tcp".into(),
                local_port: endpoint.local_port,
            })
            .collect(),
        application_disk: APPLICATION_DISK.into(),
        resource_disk: RESOURCE_DISK.into(),
        stop_timeout_ms,
    }
}

fn resolve(value: &Value, role: &Role, number: u32, deployment_id: &str) -> EnvironmentValue {
    let text = match value {
        Value::Literal(text) => text.clone(),
        Value::Instance(value) => match value {
            InstanceValue::LocalStoragePath(name) => {
                return EnvironmentValue::LocalStoragePath(name.clone());
            }
            InstanceValue::DeploymentId => deployment_id.to_owned(),
            InstanceValue::Emulated => "false".into(),
            InstanceValue::InstanceId => instance_name(role, number),
            InstanceValue::RoleName => role.name.clone(),
            InstanceValue::UpdateDomain => (number % UPDATE_DOMAINS).to_string(),
            InstanceValue::FaultDomain => (number % FAULT_DOMAINS).to_string(),
            InstanceValue::Setting(name) => role.settings.get(name).cloned().unwrap_or_default(),
            InstanceValue::LocalStorageSize(name) => role
                .local_storage
                .iter()
                .find(|storage| storage.name == *name)
                .map(|storage| storage.size_mib.to_string())
                .unwrap_or_default(),
            InstanceValue::EndpointProtocol(_) => "tcp".into(),
            // The role listens on the guest's loopback; tunnels end there.
            InstanceValue::EndpointAddress(_) => "127.0.0.1".into(),
            InstanceValue::EndpointPort(name) => role
                .endpoints
                .iter()
                .find(|endpoint| endpoint.name == *name)
                .map(|endpoint| endpoint.local_port.to_string())
                .unwrap_or_default(),
        },
    };
    EnvironmentValue::Literal(text)
}
