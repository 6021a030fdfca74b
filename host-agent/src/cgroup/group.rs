//! Cgroups that are made, filled, read and removed.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::parent::{ParentCgroup, Preparation, cgroups_of};
use super::{NEEDED, WANTED};

/// Preparation part of the names of our cgroups.
const PREFIX: &str = "host-agent-";
/// The leaf for this process.
const SUPERVISOR: &str = "supervisor";

/// Memory of a VMM process beside its guest's, in MiB: the process itself (8),
/// buffers of 1,023 connections (64), and room for cached disk blocks, which
/// the kernel takes back when it must.
const OVERHEAD_MIB: u64 = 128;
/// The kernel's own tables for a guest's memory are a part of it: 8 bytes for
/// each page of 4 KiB twice, in shadow tables more.
const TABLES_PART: u64 = 64;
/// Threads of a VMM process: 8 vCPUs, a few per device, and as many again.
const MOST_THREADS: u64 = 64;
/// Period of the processor limit in microseconds (the kernel's default).
const PERIOD_US: u64 = 100_000;
/// Processors that the devices of a guest may use beside its vCPUs.
const DEVICE_CPUS: u64 = 1;

/// What could not be done to a cgroup.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}", path.display())]
pub struct GroupError {
    what: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// What the process of one guest may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestLimits {
    /// Bytes of memory, of the guest and of the process around it.
    pub memory: u64,
    /// Microseconds of processor time in every [`PERIOD_US`].
    cpu_us: u64,
}

impl GuestLimits {
    /// The limits of a guest of this size, whose disks are in memory with so
    /// many bytes.
    pub fn of(vcpus: u8, memory_mib: u32, disks: u64) -> Self {
        let guest = u64::from(memory_mib) << 20;
        let process = guest + guest / TABLES_PART + (OVERHEAD_MIB << 20);
        Self {
            memory: process.saturating_add(disks),
            cpu_us: (u64::from(vcpus) + DEVICE_CPUS) * PERIOD_US,
        }
    }
}

/// The cgroup of a deployment; dropping it removes it if no process is left.
#[derive(Debug)]
pub struct DeploymentGroup {
    path: PathBuf,
}

impl DeploymentGroup {
    /// Makes the cgroup of deployment `short_id` at `parent`, and removes what
    /// processes that are gone have left there.
    ///
    /// # Errors
    /// The kernel refused; nothing is left.
    pub fn create(parent: &ParentCgroup, short_id: &str) -> Result<Self, GroupError> {
        sweep(&parent.parent);
        let name = format!("{PREFIX}{short_id}.{}", std::process::id());
        let this = Self {
            path: parent.parent.join(name),
        };
        make(&this.path)?;
        if parent.preparation == Preparation::MoveAndEnable {
            let leaf = this.path.join(SUPERVISOR);
            make(&leaf)?;
            enter(&leaf, std::process::id())?;
        }
        if parent.preparation != Preparation::None {
            enable(&parent.parent)?;
        }
        enable(&this.path)?;
        Ok(this)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A cgroup with `limits` for the VMM process of `instance`.
    ///
    /// # Errors
    /// The kernel refused; nothing is left.
    pub fn guest(&self, instance: &str, limits: GuestLimits) -> Result<GuestGroup, GroupError> {
        let path = self.path.join(instance);
        // One of an earlier boot would bring that boot's counts with it.
        let _ = fs::remove_dir(&path);
        make(&path)?;
        let this = GuestGroup {
            path,
            memory: limits.memory,
            adopted: false,
        };
        this.set("memory.max", &limits.memory.to_string())?;
        this.set("memory.oom.group", "1")?;
        this.set("pids.max", &MOST_THREADS.to_string())?;
        if this.path.join("cpu.max").exists() {
            this.set("cpu.max", &format!("{} {PERIOD_US}", limits.cpu_us))?;
        }
        Ok(this)
    }
}

impl Drop for DeploymentGroup {
    fn drop(&mut self) {
        // The janitor comes after us.
        let _ = remove(&self.path);
    }
}

/// The cgroup of one boot of a guest; dropping it removes it if the process is
/// gone.
#[derive(Debug)]
pub struct GuestGroup {
    path: PathBuf,
    /// Bytes of memory that the process may use.
    memory: u64,
    /// A host agent that is gone made the cgroup around it.
    adopted: bool,
}

impl GuestGroup {
    /// The cgroup of a VMM process that another host agent started, if it is in one of
    /// its own.
    pub fn of_process(pid: u32) -> Option<Self> {
        let read = |file: &str| fs::read_to_string(format!("/proc/{file}")).ok();
        let membership = read(&format!("{pid}/cgroup"))?;
        let groups = cgroups_of(&read("self/mountinfo")?, &membership);
        let (_, path) = groups.into_iter().next()?;
        let of_host = path.parent()?.file_name()?.to_string_lossy();
        if !of_host.starts_with(PREFIX) {
            return None;
        }
        let memory = fs::read_to_string(path.join("memory.max")).ok()?;
        Some(Self {
            memory: memory.trim().parse().ok()?,
            path,
            adopted: true,
        })
    }

    /// Puts a process in.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn enter(&self, pid: u32) -> Result<(), GroupError> {
        enter(&self.path, pid)
    }

    /// If the kernel killed the process for want of memory: why, in words.
    pub fn killed_for_memory(&self) -> Option<String> {
        let events = fs::read_to_string(self.path.join("memory.events")).ok()?;
        let (count, killed) = (event(&events, "oom"), event(&events, "oom_kill"));
        if killed == 0 {
            return None;
        }
        Some(if count > 0 {
            format!(
                "out of memory at its limit of {} MiB (memory.max)",
                self.memory >> 20
            )
        } else {
            "the host ran out of memory".into()
        })
    }

    fn set(&self, file: &str, value: &str) -> Result<(), GroupError> {
        write(&self.path.join(file), value, "set")
    }
}

impl Drop for GuestGroup {
    fn drop(&mut self) {
        // A process that is still ending is left to the host agent's end.
        let _ = fs::remove_dir(&self.path);
        if self.adopted
            && let Some(parent) = self.path.parent().and_then(Path::parent)
        {
            sweep(parent);
        }
    }
}

/// Removes the cgroup of a deployment with its children; whether nothing is
/// left. Of this process it must not hold more than the supervisor's leaf.
pub fn remove(path: &Path) -> bool {
    let is_leaf = |path: &PathBuf| path.file_name().is_some_and(|name| name == SUPERVISOR);
    let (leaves, guests): (Vec<_>, Vec<_>) = children(path).into_iter().partition(is_leaf);
    let mut busy = false;
    for guest in guests {
        // As long as a process is in it.
        busy |= fs::remove_dir(guest).is_err();
    }
    // To leave is to give up the limits of what is still ending.
    for leaf in leaves.iter().filter(|_| !busy) {
        leave(path, leaf);
        let _ = fs::remove_dir(leaf);
    }
    match fs::remove_dir(path) {
        Ok(()) => true,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// Kills every process in the children of a deployment's cgroup, beside the
/// supervisor's leaf.
pub fn kill(path: &Path) {
    for child in children(path) {
        if child.file_name().is_some_and(|name| name != SUPERVISOR) {
            // Before Linux 5.14 there is no such file.
            let _ = write(&child.join("cgroup.kill"), "1", "kill");
        }
    }
}

/// Takes this process back to where it was before it went to the leaf, which
/// the kernel allows once the limits below are gone.
fn leave(path: &Path, leaf: &Path) {
    let mine = std::process::id();
    let inside = fs::read_to_string(leaf.join("cgroup.procs")).unwrap_or_default();
    let Some(parent) = path.parent() else { return };
    if !inside.lines().any(|pid| pid == mine.to_string()) {
        return;
    }
    for directory in [path, parent] {
        for controller in NEEDED.iter().chain(&WANTED) {
            // One that was not enabled cannot be disabled, and need not be.
            let file = directory.join("cgroup.subtree_control");
            let _ = write(&file, &format!("-{controller}"), "change");
        }
    }
    let _ = enter(parent, mine);
}

/// Removes empty cgroups of processes that are gone.
fn sweep(parent: &Path) {
    for path in children(parent) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let owner = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.rsplit_once('.'))
            .and_then(|(_, pid)| pid.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            remove(&path);
        }
    }
}

fn children(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// One number of `memory.events`.
fn event(events: &str, name: &str) -> u64 {
    let values = events.lines().filter_map(|line| line.split_once(' '));
    values
        .filter(|(key, _)| *key == name)
        .find_map(|(_, value)| value.parse().ok())
        .unwrap_or(0)
}

fn make(path: &Path) -> Result<(), GroupError> {
    match fs::create_dir(path) {
        // The process of an earlier boot is still ending in it.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(|source| GroupError {
            what: "make cgroup",
            path: path.to_owned(),
            source,
        }),
    }
}

fn enable(path: &Path) -> Result<(), GroupError> {
    let file = path.join("cgroup.subtree_control");
    for controller in NEEDED {
        write(&file, &format!("+{controller}"), "change")?;
    }
    for controller in WANTED {
        // Worth having, not worth failing for.
        let _ = write(&file, &format!("+{controller}"), "change");
    }
    Ok(())
}

fn enter(path: &Path, pid: u32) -> Result<(), GroupError> {
    write(&path.join("cgroup.procs"), &pid.to_string(), "move into")
}

/// One write, as these files want it.
fn write(path: &Path, value: &str, what: &'static str) -> Result<(), GroupError> {
    let written = OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(value.as_bytes()));
    written.map_err(|source| GroupError {
        what,
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_may_use_its_memory_its_processors_and_a_little_more() {
        let limits = GuestLimits::of(1, 768, 0);
        assert_eq!(limits.memory >> 20, 768 + 12 + 128);
        assert_eq!(limits.cpu_us, 200_000);
        assert_eq!(
            GuestLimits::of(8, 14_336, 5 << 20).memory >> 20,
            14_336 + 224 + 128 + 5
        );
    }

    #[test]
    fn events_are_read_by_their_whole_name() {
        let events = "low 0\nhigh 0\nmax 31\noom 2\noom_kill 1\noom_group_kill 0\n";
        assert_eq!((event(events, "oom"), event(events, "oom_kill")), (2, 1));
        assert_eq!(event("", "oom"), 0);
    }
}
