//! Control groups: processes that are ended together with all that they forked, and limited
//! together. No process id is involved, so a reused id does no harm.
//!
//! App agent and guest agent are in the root group, where each counts as much for the
//! scheduler as a whole group below it, and no limit leaves them without memory or processes:
//! they answer heartbeats whatever a role does.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::clock;

const ROOT: &str = "/sys/fs/cgroup";
/// Bootstrapper and role, each in a group of its own below.
pub const STACK: &str = "/sys/fs/cgroup/stack";
/// The bootstrapper.
pub const BOOTSTRAPPER: &str = "/sys/fs/cgroup/stack/bootstrapper";
/// The role.
pub const ROLE: &str = "/sys/fs/cgroup/stack/role";
/// Commands of operators.
pub const EXEC: &str = "/sys/fs/cgroup/exec";

/// Time between two reads of `cgroup.events` while processes end.
const POLL_EVERY: Duration = Duration::from_millis(5);

const MIB: u64 = 1 << 20;

/// Limits of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limits {
    group: &'static str,
    /// `memory.max`, in bytes.
    memory: u64,
    /// `pids.max`: processes and threads.
    tasks: u64,
    /// `cpu.weight`; that of one process in the root group is 100.
    weight: u64,
}

/// Limits of the groups in a guest with `memory` bytes in which `tasks` processes and threads
/// can exist. Pure.
fn limits(memory: u64, tasks: u64) -> [Limits; 3] {
    // What kernel and agents need.
    let reserve = (memory / 8).clamp(64 * MIB, 256 * MIB);
    let stack = memory.saturating_sub(reserve);
    [
        Limits {
            group: STACK,
            memory: stack,
            tasks: tasks / 2 + 16,
            weight: 100,
        },
        // Less than the stack, so that the bootstrapper can always go on. As many tasks as the
        // kernel's default limit for a user.
        Limits {
            group: ROLE,
            memory: stack.saturating_sub(16 * MIB),
            tasks: tasks / 2,
            weight: 100,
        },
        // An operator who looks into a busy guest is not to wait for its role.
        Limits {
            group: EXEC,
            memory: memory / 2,
            tasks: tasks / 8,
            weight: 200,
        },
    ]
}

/// Makes the groups with their limits. Can be repeated.
pub fn prepare() -> io::Result<()> {
    for group in [BOOTSTRAPPER, ROLE, EXEC] {
        fs::create_dir_all(group)?;
    }
    for group in [ROOT, STACK] {
        fs::write(
            format!("{group}/cgroup.subtree_control"),
            "+cpu +memory +pids",
        )?;
    }
    let memory = nix::sys::sysinfo::sysinfo()?.ram_total();
    let tasks = number("/proc/sys/kernel/threads-max")?.min(number("/proc/sys/kernel/pid_max")?);
    for limits in limits(memory, tasks) {
        let set =
            |file, value: u64| fs::write(format!("{}/{file}", limits.group), value.to_string());
        set("memory.max", limits.memory)?;
        set("pids.max", limits.tasks)?;
        set("cpu.weight", limits.weight)?;
    }
    Ok(())
}

fn number(path: &str) -> io::Result<u64> {
    let text = fs::read_to_string(path)?;
    text.trim().parse().map_err(io::Error::other)
}

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
        match clock::timeout(limit, empty).await {
            Ok(done) => done.map(|()| true),
            Err(_) => Ok(false),
        }
    }
}

fn populated(group: &Path) -> io::Result<bool> {
    let events = fs::read_to_string(group.join("cgroup.events"))?;
    Ok(events.lines().any(|line| line == "populated 1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_leave_the_agents_memory_and_tasks() {
        for memory in [512 * MIB, 768 * MIB, 14 << 30] {
            let [stack, role, exec] = limits(memory, 6000);
            let left = memory - stack.memory;
            assert!((64 * MIB..=256 * MIB).contains(&left), "{left}");
            assert!(role.memory < stack.memory && role.tasks < stack.tasks);
            assert!(role.memory > memory / 4 * 3 && exec.memory > memory / 4);
            assert!(stack.tasks + exec.tasks < 6000 * 3 / 4);
        }
    }
}
