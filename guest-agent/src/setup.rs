//! Makes the guest ready for its role: disks, user, local storage, names.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use nix::mount::MsFlags;
use vmbus::message::{EnvironmentValue, Goal};

use crate::os::disk::{self, DiskError};
use crate::os::{quota, user};

/// Search path of everything that the agents start.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Where the resource disk is mounted.
pub const RESOURCE: &str = "/mnt/resource";
/// Where the application disk is mounted: the role's root.
pub const ROLE_ROOT: &str = "/mnt/e";
/// Quota of the role's temporary directory in MiB (role model, section 3.4).
const TEMP_MIB: u64 = 100;
/// First project id of local storage; the temporary directory has the one
/// before it.
const FIRST_PROJECT: u32 = 1000;

/// What kept the guest from being ready.
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

/// What the bootstrapper needs to know.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Prepared {
    /// Program and arguments; the program is an absolute path.
    pub command: Vec<String>,
    /// The whole environment of the role.
    pub environment: BTreeMap<String, String>,
    /// Directories to empty before each start.
    pub clean: Vec<PathBuf>,
    /// Runs as root.
    pub elevated: bool,
    /// Ready when the process runs.
    pub ready_on_start: bool,
    /// Milliseconds that the role may take to stop.
    pub stop_timeout_ms: u64,
}

/// Performs the set-up. Blocking. What is done already is left. Each stage is told
/// to `done` at its end, so that the log shows where the time went.
pub fn prepare(goal: &Goal, done: impl Fn(&str)) -> Result<Prepared, SetupError> {
    let resource = disk::by_serial(&goal.resource_disk)?;
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    disk::mount_resource(&resource, RESOURCE, safe)?;
    done("resource disk is mounted");
    let application = disk::by_serial(&goal.application_disk)?;
    let read_only = safe | MsFlags::MS_RDONLY;
    disk::mount_at(&application, ROLE_ROOT, "squashfs", read_only, None)?;
    done("disks mounted");

    let file = |what, path: &Path| {
        let path = path.to_owned();
        move |source| SetupError::File { what, path, source }
    };
    let resources = Path::new(RESOURCE).join("Resources");
    let temp = resources.join(format!(
        "temp/{}.{}/RoleTemp",
        goal.deployment_id, goal.role
    ));
    user::create(ROLE_ROOT).map_err(file("add the role's user to", Path::new("/etc/passwd")))?;
    let hosts = Path::new("/etc/hosts");
    fs::write(hosts, host_names(&goal.instance)).map_err(file("write", hosts))?;
    let hostname = Path::new("/proc/sys/kernel/hostname");
    fs::write(hostname, host_name(&goal.instance)).map_err(file("write", hostname))?;

    let mut storage = vec![(temp.clone(), TEMP_MIB)];
    let mut paths = BTreeMap::new();
    let mut clean = vec![temp.clone()];
    for local in &goal.local_storage {
        let path = resources.join(format!(
            "directory/{}.{}.{}",
            goal.deployment_id, goal.role, local.name
        ));
        if local.clean_on_role_recycle {
            clean.push(path.clone());
        }
        paths.insert(local.name.clone(), path.clone());
        storage.push((path, local.size_mib));
    }
    for (project, (path, mib)) in (FIRST_PROJECT - 1..).zip(&storage) {
        fs::create_dir_all(path).map_err(file("make", path))?;
        chown(path, Some(user::ROLE_ID), Some(user::ROLE_ID)).map_err(file("own", path))?;
        let mode = fs::Permissions::from_mode(0o700);
        fs::set_permissions(path, mode).map_err(file("protect", path))?;
        quota::set_project(path, project).map_err(file("set the quota project of", path))?;
        quota::limit(&resource, project, *mib).map_err(file("limit", path))?;
    }
    done("local storage ready");
    let environment = environment(goal, &paths, &temp);
    let mut command = goal_command(goal);
    if let Some(program) = command.first_mut() {
        *program = format!("{ROLE_ROOT}/approot/{program}");
    }
    let vmbus::message::EntryPoint::Program { ready_on_start, .. } = goal.entry_point;
    Ok(Prepared {
        command,
        environment,
        clean,
        elevated: goal.elevated,
        ready_on_start,
        stop_timeout_ms: goal.stop_timeout_ms,
    })
}

/// The guest's table of names: its own, in both spellings.
fn host_names(instance: &str) -> String {
    let host = host_name(instance);
    format!("127.0.0.1 localhost {host} {instance}\n::1 localhost\n")
}

/// The instance's name in the characters of a host name.
fn host_name(instance: &str) -> String {
    instance.replace('_', "-")
}

fn goal_command(goal: &Goal) -> Vec<String> {
    let vmbus::message::EntryPoint::Program { command, .. } = &goal.entry_point;
    command.clone()
}

/// The environment of tasks and role (role model, section 3.5).
fn environment(
    goal: &Goal,
    storage: &BTreeMap<String, PathBuf>,
    temp: &Path,
) -> BTreeMap<String, String> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let mut variables = BTreeMap::from([
        ("PATH".to_owned(), PATH.to_owned()),
        ("HOME".to_owned(), text(temp)),
        ("RoleRoot".to_owned(), ROLE_ROOT.to_owned()),
        ("RdRoleRoot".to_owned(), format!("{ROLE_ROOT}/")),
        ("RoleName".to_owned(), goal.role.clone()),
        ("RoleInstanceID".to_owned(), goal.instance.clone()),
        ("RoleDeploymentID".to_owned(), goal.deployment_id.clone()),
        (
            "RdRoleId".to_owned(),
            format!("{}.{}", goal.deployment_id, goal.instance),
        ),
        (
            "RdRoleLogRootPath".to_owned(),
            format!("{RESOURCE}/Resources/"),
        ),
        ("COMPUTERNAME".to_owned(), host_name(&goal.instance)),
        (
            "RdRoleResourcesRootPath".to_owned(),
            format!("{RESOURCE}/Resources/"),
        ),
        ("TEMP".to_owned(), text(temp)),
        ("TMP".to_owned(), text(temp)),
        ("TMPDIR".to_owned(), text(temp)),
    ]);
    for (name, path) in storage {
        variables.insert(name.clone(), format!("{}/", text(path)));
    }
    for (name, value) in &goal.environment {
        let value = match value {
            EnvironmentValue::Literal(value) => value.clone(),
            EnvironmentValue::LocalStoragePath(name) => storage
                .get(name)
                .map(|path| format!("{}/", text(path)))
                .unwrap_or_default(),
        };
        variables.insert(name.clone(), value);
    }
    variables
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_finds_itself_by_its_host_name_and_by_its_instances() {
        let table = host_names("Cache_IN_0");
        let names: Vec<&str> = table.split_whitespace().collect();
        assert!(names.contains(&host_name("Cache_IN_0").as_str()), "{table}");
        assert!(names.contains(&"Cache_IN_0"), "{table}");
    }
}
