//! The names of environment variables that belong to the platform. The host refuses a
//! definition that uses one, and the guest sets each after those of the definition.

/// Variables that describe the role. Commands of `exec` have them too.
pub const DESCRIPTIVE: [&str; 9] = [
    "COMPUTERNAME",
    "RdRoleId",
    "RdRoleLogRootPath",
    "RdRoleResourcesRootPath",
    "RdRoleRoot",
    "RoleDeploymentID",
    "RoleInstanceID",
    "RoleName",
    "RoleRoot",
];

/// Variables of the role's process alone: a command of `exec` has none of them, or one with
/// another value, since it runs as root and the role can write to these directories.
pub const OWN: [&str; 6] = ["HOME", "NOTIFY_SOCKET", "PATH", "TEMP", "TMP", "TMPDIR"];

/// Whether a definition may not use `name` for a variable or a local storage.
pub fn is_reserved(name: &str) -> bool {
    DESCRIPTIVE.contains(&name) || OWN.contains(&name)
}
