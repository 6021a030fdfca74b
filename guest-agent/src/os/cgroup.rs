//! Control groups: processes that are ended together with all that they forked. No process id is involved, so a reused id does no harm.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The bootstrapper and, in a group of its own below, the role.
pub const STACK: &str = "/sys/fs/cgroup/stack";
/// The role.
pub const ROLE: &str = "/sys/fs/cgroup/stack/role";
/// Commands of operators.
pub const EXEC: &str = "/sys/fs/cgroup/exec";

/// Time between two reads of `cgroup.events` while processes end.
const POLL_EVERY: Duration = Duration::from_millis(5);

/// A control group of version 2.
#[derive(Debug, Clone)]
pub struct Group(PathBuf);

impl Group {
    /// The group at `path`, made if it is not there.
    pub fn at(path: &str) -> io::Result<Self> {
        fs::create_dir_all(path)?;
        Ok(Self(path.into()))
    }

    /// `cgroup.procs`: a process that writes `0` to it joins the group.
    pub fn procs_file(&self) -> io::Result<File> {
        OpenOptions::new()
            .write(true)
            .open(self.0.join("cgroup.procs"))
    }

    /// Kills every process of the group and of the groups below it, also those that are
    /// being forked.
    pub fn kill(&self) -> io::Result<()> {
        fs::write(self.0.join("cgroup.kill"), "1")
    }

    /// Kills like [`Group::kill`] and waits until no process is left, for at most `limit`;
    /// whether none is left.
    pub async fn clear(&self, limit: Duration) -> io::Result<bool> {
        self.kill()?;
        let empty = async {
            while populated(&self.0)? {
                tokio::time::sleep(POLL_EVERY).await;
            }
            Ok(())
        };
        match tokio::time::timeout(limit, empty).await {
            Ok(done) => done.map(|()| true),
            Err(_) => Ok(false),
        }
    }
}

fn populated(group: &Path) -> io::Result<bool> {
    let events = fs::read_to_string(group.join("cgroup.events"))?;
    Ok(events.lines().any(|line| line == "populated 1"))
}
