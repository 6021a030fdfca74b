//! Makes the guest ready for its role: disks, user, local storage, names.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::MsFlags;
use vmbus::message::Goal;
use vmbus::role::{EntryPoint, InstanceValue, VariableValue};
use vmbus::text::chain;

use crate::failure::Failure;
use crate::os::disk::{self, DiskError};
use crate::os::{quota, user};

/// Search path of everything that the agents start.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Where the resource disk is mounted.
pub const RESOURCE: &str = "/mnt/resource";
/// Directory of temporary files and local storage.
const RESOURCES: &str = "/mnt/resource/Resources";
/// Where the application disk is mounted: the role's root.
pub const ROLE_ROOT: &str = "/mnt/e";
/// Quota of the role's temporary directory in MiB (role model, section 3.4).
const TEMP_MIB: u64 = 100;
/// Most time to wait for a disk before the set-up fails, to be tried again.
const DISK_LIMIT: Duration = Duration::from_secs(5);
/// Quota project of the temporary directory; those of local storage follow.
const FIRST_PROJECT: u32 = 999;

/// Why the guest could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// A disk.
    #[error("disk")]
    Disk(#[from] DiskError),
    /// A directory or file.
    #[error("cannot {what} {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl SetupError {
    /// Whether another attempt may succeed.
    pub fn failure(&self) -> Failure {
        match self {
            Self::Disk(error) => error.failure(),
            Self::File { source, .. } => Failure::of_setup(chain(self), source),
        }
    }
}

/// How a goal's role is started, and the directories that it has. Follows from the goal
/// alone, so that guest agent and bootstrapper need not exchange it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Launch {
    /// Program and arguments; the program is an absolute path.
    pub command: Vec<String>,
    /// The whole environment of the role (role model, section 3.5).
    pub environment: BTreeMap<String, String>,
    /// Directories to empty before each start.
    pub clean: Vec<PathBuf>,
    /// Every directory of the role with its quota in MiB.
    pub directories: Vec<(PathBuf, u64)>,
}

impl Launch {
    /// The launch of `goal`.
    pub fn of(goal: &Goal) -> Self {
        let role = &goal.role;
        let temp = temp_path(goal);
        let mut clean = vec![temp.clone()];
        let mut directories = vec![(temp, TEMP_MIB)];
        for storage in &role.local_storage {
            let path = storage_path(goal, &storage.name);
            if storage.clean_on_role_recycle {
                clean.push(path.clone());
            }
            directories.push((path, storage.size_mib));
        }
        let EntryPoint::Program { command, .. } = &role.entry_point;
        let mut command = command.clone();
        if let Some(program) = command.first_mut() {
            *program = format!("{ROLE_ROOT}/approot/{program}");
        }
        Self {
            command,
            environment: environment(goal),
            clean,
            directories,
        }
    }
}

/// Performs the set-up. Blocking. Can be repeated: steps that are done already change
/// nothing. `done` is called with the name of each stage at its end, so that the log shows
/// where the time went.
pub fn prepare(goal: &Goal, done: impl Fn(&str)) -> Result<(), SetupError> {
    let resource = disk::by_serial(&goal.resource_disk, DISK_LIMIT)?;
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    disk::mount_resource(&resource, RESOURCE, safe)?;
    done("resource disk is mounted");
    let application = disk::by_serial(&goal.application_disk, DISK_LIMIT)?;
    let read_only = safe | MsFlags::MS_RDONLY;
    disk::mount_at(&application, ROLE_ROOT, "squashfs", read_only, None)?;
    done("disks mounted");

    let file = |what, path: &Path| {
        let path = path.to_owned();
        move |source| SetupError::File { what, path, source }
    };
    user::create(ROLE_ROOT).map_err(file("add the role's user to", Path::new("/etc/passwd")))?;
    let hosts = Path::new("/etc/hosts");
    fs::write(hosts, host_names(&goal.instance)).map_err(file("write", hosts))?;
    let hostname = Path::new("/proc/sys/kernel/hostname");
    fs::write(hostname, host_name(&goal.instance)).map_err(file("write", hostname))?;

    let directories = Launch::of(goal).directories;
    for (project, (path, mib)) in (FIRST_PROJECT..).zip(&directories) {
        fs::create_dir_all(path).map_err(file("make", path))?;
        chown(path, Some(user::ROLE_ID), Some(user::ROLE_ID)).map_err(file("own", path))?;
        let mode = fs::Permissions::from_mode(0o700);
        fs::set_permissions(path, mode).map_err(file("protect", path))?;
        quota::set_project(path, project).map_err(file("set the quota project of", path))?;
        quota::limit(&resource, project, *mib).map_err(file("limit", path))?;
    }
    done("local storage ready");
    Ok(())
}

/// The role's temporary directory.
fn temp_path(goal: &Goal) -> PathBuf {
    let role = format!("{}.{}", goal.deployment_id, goal.role.name);
    Path::new(RESOURCES)
        .join("temp")
        .join(role)
        .join("RoleTemp")
}

/// The directory of the local storage called `name`.
fn storage_path(goal: &Goal, name: &str) -> PathBuf {
    let storage = format!("{}.{}.{name}", goal.deployment_id, goal.role.name);
    Path::new(RESOURCES).join("directory").join(storage)
}

/// Content of /etc/hosts: the instance name, and the host name made of it.
fn host_names(instance: &str) -> String {
    let host = host_name(instance);
    format!("127.0.0.1 localhost {host} {instance}\n::1 localhost\n")
}

/// The host name: the instance name without underscores.
fn host_name(instance: &str) -> String {
    instance.replace('_', "-")
}

/// The environment of tasks and role (role model, section 3.5).
fn environment(goal: &Goal) -> BTreeMap<String, String> {
    let role = &goal.role;
    let temp = temp_path(goal).to_string_lossy().into_owned();
    let logs = format!("{RESOURCES}/");
    let fixed = [
        ("PATH", PATH.to_owned()),
        ("HOME", temp.clone()),
        ("RoleRoot", ROLE_ROOT.to_owned()),
        ("RdRoleRoot", format!("{ROLE_ROOT}/")),
        ("RoleName", role.name.clone()),
        ("RoleInstanceID", goal.instance.clone()),
        ("RoleDeploymentID", goal.deployment_id.clone()),
        (
            "RdRoleId",
            format!("{}.{}", goal.deployment_id, goal.instance),
        ),
        ("RdRoleLogRootPath", logs.clone()),
        ("COMPUTERNAME", host_name(&goal.instance)),
        ("RdRoleResourcesRootPath", logs),
        ("TEMP", temp.clone()),
        ("TMP", temp.clone()),
        ("TMPDIR", temp),
    ]
    .map(|(name, value)| (name.to_owned(), value));
    let mut variables = BTreeMap::from(fixed);
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
    variables
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
mod tests {
    use super::*;
    use vmbus::message::ExpectedState;
    use vmbus::role::{Endpoint, LocalStorage, RoleDefinition};

    fn goal(environment: &[(&str, VariableValue)]) -> Goal {
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
    fn no_launch_is_longer_than_the_host_computed() {
        use InstanceValue as V;
        let long = "n".repeat(64);
        let values = [
            V::DeploymentId,
            V::Emulated,
            V::InstanceId,
            V::RoleName,
            V::UpdateDomain,
            V::FaultDomain,
            V::Setting(long.clone()),
            V::LocalStoragePath(long.clone()),
            V::LocalStorageSize(long.clone()),
            V::EndpointProtocol(long.clone()),
            V::EndpointAddress(long.clone()),
            V::EndpointPort(long.clone()),
        ];
        for value in values {
            // So many that the allowance for the platform's variables hides no error.
            let variable = |n| (format!("v{n:03}"), VariableValue::Instance(value.clone()));
            let mut goal = goal(&[]);
            goal.deployment_id = "d".repeat(32);
            goal.instance = format!("{long}_IN_{}", u32::MAX);
            (goal.update_domain, goal.fault_domain) = (u32::MAX, u32::MAX);
            goal.role.name.clone_from(&long);
            goal.role.settings = [(long.clone(), "s".repeat(99))].into();
            goal.role.local_storage[0].name.clone_from(&long);
            goal.role.local_storage[0].size_mib = u64::from(u32::MAX);
            goal.role.endpoints[0].name.clone_from(&long);
            goal.role.endpoints[0].local_port = u16::MAX;
            goal.role.environment = (0..900).map(variable).collect();
            let limit = vmbus::launch::check(&goal.role).unwrap();
            let launch = Launch::of(&goal);
            let variables = launch.environment.iter();
            let variables: usize = variables
                .map(|(name, value)| name.len() + value.len() + 10)
                .sum();
            let program = 3 * (launch.command[0].len() + 9);
            let arguments = launch.command[1..]
                .iter()
                .map(|argument| argument.len() + 9);
            let length = variables + program + arguments.sum::<usize>();
            assert!(length <= limit, "{value:?}: {length} > {limit}");
        }
    }

    #[test]
    fn a_guest_knows_its_host_name_and_its_instance_name() {
        let table = host_names("Cache_IN_0");
        let names: Vec<&str> = table.split_whitespace().collect();
        assert!(names.contains(&host_name("Cache_IN_0").as_str()), "{table}");
        assert!(names.contains(&"Cache_IN_0"), "{table}");
    }

    #[test]
    fn a_launch_has_absolute_program_and_directories() {
        let launch = Launch::of(&goal(&[]));
        assert_eq!(launch.command, ["/mnt/e/approot/bin/run", "-v"]);
        let paths = [
            "/mnt/resource/Resources/temp/d1.Cache/RoleTemp",
            "/mnt/resource/Resources/directory/d1.Cache.Data",
            "/mnt/resource/Resources/directory/d1.Cache.Scratch",
        ]
        .map(PathBuf::from);
        assert_eq!(launch.clean, [paths[0].clone(), paths[2].clone()]);
        let sizes = [TEMP_MIB, 256, 8];
        let directories: Vec<_> = paths.into_iter().zip(sizes).collect();
        assert_eq!(launch.directories, directories);
        assert_eq!(
            launch.environment["Data"],
            "/mnt/resource/Resources/directory/d1.Cache.Data/"
        );
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
            let environment = environment(&goal(&[("X", value.clone())]));
            assert_eq!(environment["X"], expected, "{value:?}");
        }
        let literal = VariableValue::Literal("mine".into());
        let environment = environment(&goal(&[("PATH", literal)]));
        assert_eq!(environment["PATH"], "mine");
    }
}
