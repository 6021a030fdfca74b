//! Makes the guest ready for its role: disks, user, local storage, names.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::MsFlags;
use vmbus::message::Goal;
use vmbus::role::EntryPoint;
use vmbus::text::chain;

use crate::environment::{self, ROLE_ROOT, Variables, storage_path, temp_path};
use crate::failure::Failure;
use crate::names::{host_name, hosts_table};
use crate::os::disk::{self, DiskError};
use crate::os::{quota, user};

/// Where the resource disk is mounted.
pub const RESOURCE: &str = "/mnt/resource";
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
    /// The whole environment of the role.
    pub environment: Variables,
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
            environment: environment::of_role(goal),
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
    fs::write(hosts, hosts_table(&goal.instance)).map_err(file("write", hosts))?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::tests::goal;
    use vmbus::role::{InstanceValue, VariableValue};

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
}
