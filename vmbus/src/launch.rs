//! Bounds what a role's program is started with: its arguments and the variables that the
//! guest resolves, against what execve(2) accepts.
//!
//! The host checks each role with this before it sends a goal, because no later attempt
//! could start such a role.

use crate::role::{EntryPoint, InstanceValue, RoleDefinition, VariableValue};

/// Most bytes of one argument, or of one variable as `NAME=value`, with its NUL: Linux'
/// `MAX_ARG_STRLEN`.
pub const MAX_STRING: usize = 128 << 10;

/// Most bytes of all arguments and variables of a role. Linux accepts a quarter of the
/// stack's limit, 2 MiB in a guest; the other half is for the arguments of programs that
/// the role starts.
pub const MAX_TOTAL: usize = 1 << 20;

/// Counted for the variables that are the same for every role, and for the directories in
/// paths of the program.
const PLATFORM: usize = 8 << 10;

/// Longest deployment id.
const DEPLOYMENT_ID: usize = 32;

/// Longest `_IN_` and number of an instance.
const INSTANCE_SUFFIX: usize = 14;

/// Longest decimal number.
const NUMBER: usize = 20;

/// Longest directory of local storages, with the `/` and `.` of a storage's path.
const STORAGE_DIRECTORY: usize = 48;

/// Why a role's program could never be started.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// An argument.
    #[error(
        "argument {index} of the command line has {length} bytes, Linux accepts {}",
        MAX_STRING - 1
    )]
    Argument {
        /// Its index; the program is 0.
        index: usize,
        /// Its length in bytes.
        length: usize,
    },
    /// A variable.
    #[error(
        "variable \"{name}\" has {length} bytes with its name and value, Linux accepts {}",
        MAX_STRING - 1
    )]
    Variable {
        /// Its name.
        name: String,
        /// Its length in bytes as `NAME=value`.
        length: usize,
    },
    /// All arguments and variables together.
    #[error(
        "the arguments and variables have up to {length} bytes with all values filled in, \
         the limit is {MAX_TOTAL}"
    )]
    Total {
        /// Their length in bytes.
        length: usize,
    },
}

/// Most bytes of the arguments and variables with which the program of `role` is started,
/// counted as execve(2) counts them.
///
/// # Errors
/// The first limit that is exceeded.
pub fn check(role: &RoleDefinition) -> Result<usize, LaunchError> {
    let EntryPoint::Program { command, .. } = &role.entry_point;
    let mut total = PLATFORM;
    for (index, argument) in command.iter().enumerate() {
        let length = argument.len();
        if length >= MAX_STRING {
            return Err(LaunchError::Argument { index, length });
        }
        // The program counts three times: as file name, as argument 0, and for a script
        // once more as the argument of its interpreter.
        total += taken(length) * if index == 0 { 3 } else { 1 };
    }
    for storage in &role.local_storage {
        total += taken(storage.name.len() + 1 + storage_path(role, &storage.name));
    }
    for (name, value) in &role.environment {
        let value = match value {
            VariableValue::Literal(value) => value.len(),
            VariableValue::Instance(value) => longest(role, value),
        };
        let length = name.len() + 1 + value;
        if length >= MAX_STRING {
            let name = name.clone();
            return Err(LaunchError::Variable { name, length });
        }
        total += taken(length);
    }
    if total > MAX_TOTAL {
        return Err(LaunchError::Total { length: total });
    }
    Ok(total)
}

/// What a string of `length` bytes takes: its NUL and a pointer in addition.
const fn taken(length: usize) -> usize {
    length + 1 + size_of::<usize>()
}

/// Longest value in any guest of `role`.
fn longest(role: &RoleDefinition, value: &InstanceValue) -> usize {
    match value {
        InstanceValue::DeploymentId => DEPLOYMENT_ID,
        InstanceValue::Emulated => "false".len(),
        InstanceValue::InstanceId => role.name.len() + INSTANCE_SUFFIX,
        InstanceValue::RoleName => role.name.len(),
        InstanceValue::Setting(name) => role.settings.get(name).map_or(0, String::len),
        InstanceValue::LocalStoragePath(name) => storage_path(role, name),
        InstanceValue::EndpointProtocol(name) => role
            .endpoint(name)
            .map_or(0, |endpoint| endpoint.protocol.len()),
        InstanceValue::EndpointAddress(_) => "255.255.255.255".len(),
        InstanceValue::UpdateDomain
        | InstanceValue::FaultDomain
        | InstanceValue::LocalStorageSize(_)
        | InstanceValue::EndpointPort(_) => NUMBER,
    }
}

/// Longest path of the local storage `name`.
fn storage_path(role: &RoleDefinition, name: &str) -> usize {
    STORAGE_DIRECTORY + DEPLOYMENT_ID + role.name.len() + name.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role(arguments: &[usize], variables: &[VariableValue]) -> RoleDefinition {
        let command = arguments.iter().map(|length| "a".repeat(*length));
        let variable = |(n, value): (usize, &VariableValue)| (format!("V{n}"), value.clone());
        RoleDefinition {
            name: "Role".into(),
            entry_point: EntryPoint::Program {
                command: std::iter::once("run".into()).chain(command).collect(),
                ready_on_start: true,
            },
            elevated: false,
            settings: [("Big".to_owned(), "x".repeat(100_000))].into(),
            environment: variables.iter().enumerate().map(variable).collect(),
            local_storage: Vec::new(),
            endpoints: Vec::new(),
        }
    }

    #[test]
    fn a_string_over_the_limit_of_execve_is_refused() {
        check(&role(&[MAX_STRING - 1], &[])).unwrap();
        let error = check(&role(&[1, MAX_STRING], &[])).unwrap_err();
        let (index, length) = (2, MAX_STRING);
        assert_eq!(error, LaunchError::Argument { index, length });
        // "V0=" belongs to the string.
        let literal = |length| VariableValue::Literal("x".repeat(length));
        check(&role(&[], &[literal(MAX_STRING - 4)])).unwrap();
        let error = check(&role(&[], &[literal(MAX_STRING - 3)])).unwrap_err();
        let name = "V0".to_owned();
        assert_eq!(error, LaunchError::Variable { name, length });
    }

    #[test]
    fn values_count_as_often_as_they_are_named() {
        let named = |times| {
            let value = VariableValue::Instance(InstanceValue::Setting("Big".into()));
            check(&role(&[], &vec![value; times]))
        };
        named(10).unwrap();
        assert!(matches!(named(11), Err(LaunchError::Total { length }) if length > 1_100_000));
        assert!(matches!(named(5_500), Err(LaunchError::Total { .. })));
    }

    #[test]
    fn variables_of_local_storage_are_counted() {
        let mut with = role(&[], &[]);
        let before = check(&with).unwrap();
        with.local_storage = vec![crate::role::LocalStorage {
            name: "Data".into(),
            size_mib: 1,
            clean_on_role_recycle: true,
        }];
        assert!(check(&with).unwrap() > before + "Data=".len() + "/mnt/".len());
        with.local_storage = vec![with.local_storage[0].clone(); 20_000];
        assert!(matches!(check(&with), Err(LaunchError::Total { .. })));
    }
}
