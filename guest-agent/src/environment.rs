//! The environments of the role and of the commands of operators (role model, section 3.5).
//! Pure.
//!
//! Commands run as root and get only what the platform names. A variable of the definition
//! would give the role root's rights: a loader reads `LD_LIBRARY_PATH`, a shell `BASH_ENV`, an
//! interpreter `PYTHONPATH`, and each may name a directory that the role can write.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use vmbus::environment::DESCRIPTIVE;
use vmbus::message::Goal;
use vmbus::role::{InstanceValue, VariableValue};

use crate::names::host_name;

/// Search path of everything that the agents start.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Directory of temporary files and local storage.
const RESOURCES: &str = "/mnt/resource/Resources";
/// Where the application disk is mounted: the role's root.
pub const ROLE_ROOT: &str = "/mnt/e";

/// Variables by name.
pub type Variables = BTreeMap<String, String>;

/// The whole environment of tasks and role, except for `NOTIFY_SOCKET`.
pub fn of_role(goal: &Goal) -> Variables {
    let role = &goal.role;
    let mut variables = Variables::new();
    for storage in &role.local_storage {
        variables.insert(storage.name.clone(), directory(goal, &storage.name));
    }
    for (name, value) in &role.environment {
        let value = match value {
            VariableValue::Literal(value) => value.clone(),
            VariableValue::Instance(value) => instance_value(goal, value),
        };
        variables.insert(name.clone(), value);
    }
    // Last: a name of the platform has the platform's value, whatever the definition says.
    variables.extend(platform(goal));
    variables
}

/// The environment of a command of an operator; `goal` is absent before the first set-up.
pub fn of_command(goal: Option<&Goal>) -> Variables {
    let mut variables = goal.map(platform).unwrap_or_default();
    variables.retain(|name, _| DESCRIPTIVE.contains(&name.as_str()));
    variables.insert("PATH".to_owned(), PATH.to_owned());
    variables.insert("HOME".to_owned(), "/root".to_owned());
    variables
}

/// What the platform sets for the role.
fn platform(goal: &Goal) -> Variables {
    let role = &goal.role;
    let temp = temp_path(goal).to_string_lossy().into_owned();
    let resources = format!("{RESOURCES}/");
    let id = format!("{}.{}", goal.deployment_id, goal.instance);
    [
        ("PATH", PATH.to_owned()),
        ("HOME", temp.clone()),
        ("RoleRoot", ROLE_ROOT.to_owned()),
        ("RdRoleRoot", format!("{ROLE_ROOT}/")),
        ("RoleName", role.name.clone()),
        ("RoleInstanceID", goal.instance.clone()),
        ("RoleDeploymentID", goal.deployment_id.clone()),
        ("RdRoleId", id),
        ("RdRoleLogRootPath", resources.clone()),
        ("COMPUTERNAME", host_name(&goal.instance)),
        ("RdRoleResourcesRootPath", resources),
        ("TEMP", temp.clone()),
        ("TMP", temp.clone()),
        ("TMPDIR", temp),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// The role's temporary directory.
pub fn temp_path(goal: &Goal) -> PathBuf {
    let role = format!("{}.{}", goal.deployment_id, goal.role.name);
    Path::new(RESOURCES)
        .join("temp")
        .join(role)
        .join("RoleTemp")
}

/// The directory of the local storage called `name`.
pub fn storage_path(goal: &Goal, name: &str) -> PathBuf {
    let storage = format!("{}.{}.{name}", goal.deployment_id, goal.role.name);
    Path::new(RESOURCES).join("directory").join(storage)
}

/// Path of a local storage as the role sees it: with `/` at its end.
fn directory(goal: &Goal, storage: &str) -> String {
    format!("{}/", storage_path(goal, storage).display())
}

/// What a `RoleInstanceValue` is in this guest. The host refuses a definition that names
/// what the role does not have; such a name is empty here.
fn instance_value(goal: &Goal, value: &InstanceValue) -> String {
    let role = &goal.role;
    match value {
        InstanceValue::DeploymentId => goal.deployment_id.clone(),
        InstanceValue::Emulated => "false".into(),
        InstanceValue::InstanceId => goal.instance.clone(),
        InstanceValue::RoleName => role.name.clone(),
        InstanceValue::UpdateDomain => goal.update_domain.to_string(),
        InstanceValue::FaultDomain => goal.fault_domain.to_string(),
        InstanceValue::Setting(name) => role.settings.get(name).cloned().unwrap_or_default(),
        InstanceValue::LocalStoragePath(name) => role
            .storage(name)
            .map(|storage| directory(goal, &storage.name))
            .unwrap_or_default(),
        InstanceValue::LocalStorageSize(name) => role
            .storage(name)
            .map(|storage| storage.size_mib.to_string())
            .unwrap_or_default(),
        InstanceValue::EndpointProtocol(name) => role
            .endpoint(name)
            .map(|endpoint| endpoint.protocol.clone())
            .unwrap_or_default(),
        // The role listens on the guest's loopback interface; tunnels end there.
        InstanceValue::EndpointAddress(_) => "127.0.0.1".into(),
        InstanceValue::EndpointPort(name) => role
            .endpoint(name)
            .map(|endpoint| endpoint.local_port.to_string())
            .unwrap_or_default(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use vmbus::environment::{OWN, is_reserved};
    use vmbus::message::ExpectedState;
    use vmbus::role::{Endpoint, EntryPoint, LocalStorage, RoleDefinition};

    /// The goal of a role with two local storages, one setting, one endpoint and these
    /// variables.
    pub(crate) fn goal(environment: &[(&str, VariableValue)]) -> Goal {
        let storage = |name: &str, size_mib, clean| LocalStorage {
            name: name.into(),
            size_mib,
            clean_on_role_recycle: clean,
        };
        let pair = |(name, value): &(&str, VariableValue)| ((*name).to_owned(), value.clone());
        Goal {
            incarnation: 1,
            expected: ExpectedState::Started,
            deployment_id: "d1".into(),
            instance: "Cache_IN_7".into(),
            update_domain: 2,
            fault_domain: 1,
            role: RoleDefinition {
                name: "Cache".into(),
                entry_point: EntryPoint::Program {
                    command: vec!["bin/run".into(), "-v".into()],
                    ready_on_start: true,
                },
                elevated: false,
                settings: [("Motto".to_owned(), "a=b".to_owned())].into(),
                environment: environment.iter().map(pair).collect(),
                local_storage: vec![storage("Data", 256, false), storage("Scratch", 8, true)],
                endpoints: vec![Endpoint {
                    name: "Redis".into(),
                    protocol: "tcp".into(),
                    local_port: 6379,
                }],
            },
            application_disk: "app".into(),
            resource_disk: "resource".into(),
            stop_timeout_ms: 1,
        }
    }

    #[test]
    fn every_instance_value_has_its_value_in_the_guest() {
        let name = |name: &str| name.to_owned();
        let values = [
            (InstanceValue::DeploymentId, "d1"),
            (InstanceValue::Emulated, "false"),
            (InstanceValue::InstanceId, "Cache_IN_7"),
            (InstanceValue::RoleName, "Cache"),
            (InstanceValue::UpdateDomain, "2"),
            (InstanceValue::FaultDomain, "1"),
            (InstanceValue::Setting(name("Motto")), "a=b"),
            (InstanceValue::Setting(name("Other")), ""),
            (
                InstanceValue::LocalStoragePath(name("Data")),
                "/mnt/resource/Resources/directory/d1.Cache.Data/",
            ),
            (InstanceValue::LocalStorageSize(name("Data")), "256"),
            (InstanceValue::EndpointProtocol(name("Redis")), "tcp"),
            (InstanceValue::EndpointAddress(name("Redis")), "127.0.0.1"),
            (InstanceValue::EndpointPort(name("Redis")), "6379"),
        ];
        for (value, expected) in values {
            let value = VariableValue::Instance(value);
            let variables = of_role(&goal(&[("X", value.clone())]));
            assert_eq!(variables["X"], expected, "{value:?}");
        }
    }

    /// A goal whose definition uses `names` for variables and for local storage.
    fn hostile(names: &[&str]) -> Goal {
        let value = VariableValue::Literal("/mnt/resource/planted".into());
        let variables: Vec<_> = names.iter().map(|name| (*name, value.clone())).collect();
        let mut goal = goal(&variables);
        let storage = goal.role.local_storage[0].clone();
        goal.role.local_storage = names
            .iter()
            .map(|name| LocalStorage {
                name: (*name).into(),
                ..storage.clone()
            })
            .collect();
        goal
    }

    #[test]
    fn a_definition_does_not_change_a_variable_of_the_platform() {
        let names = [&DESCRIPTIVE[..], &OWN].concat();
        let hostile = of_role(&hostile(&names));
        for (name, value) in of_role(&goal(&[])) {
            if is_reserved(&name) {
                assert_eq!(hostile[&name], value, "{name}");
            }
        }
        // The table of names is that of the variables; the bootstrapper sets the last one.
        let set: Vec<String> = platform(&goal(&[])).into_keys().collect();
        let mut reserved = names.clone();
        reserved.retain(|name| *name != "NOTIFY_SOCKET");
        reserved.sort_unstable();
        assert_eq!(set, reserved);
    }

    #[test]
    fn a_command_gets_no_variable_of_the_definition() {
        let names = [
            &[
                "LD_PRELOAD",
                "LD_LIBRARY_PATH",
                "GCONV_PATH",
                "BASH_ENV",
                "ENV",
                "IFS",
                "PYTHONPATH",
                "PERL5LIB",
                "NODE_OPTIONS",
                "Data",
            ],
            &DESCRIPTIVE[..],
            &OWN,
        ]
        .concat();
        let of_hostile = of_command(Some(&hostile(&names)));
        assert_eq!(of_hostile, of_command(Some(&goal(&[]))));
        let mut allowed = [&DESCRIPTIVE[..], &["PATH", "HOME"]].concat();
        allowed.sort_unstable();
        assert_eq!(of_hostile.keys().collect::<Vec<_>>(), allowed);
        assert!(!of_hostile.values().any(|value| value.contains("RoleTemp")));
        let before = of_command(None);
        assert_eq!((before.len(), before["HOME"].as_str()), (2, "/root"));
    }
}
