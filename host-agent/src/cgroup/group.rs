//! The cgroups of a deployment and of its guests.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::parent::{ParentCgroup, Preparation, cgroups_of};
use super::{NEEDED, WANTED};

/// Prefix of the names of deployments' cgroups.
const PREFIX: &str = "host-agent-";
/// Name of the child for this process.
const SUPERVISOR: &str = "supervisor";

/// Memory of a VMM process besides the guest's RAM, in MiB: the process (8),
/// buffers of 1,023 connections (64), and page cache, which the kernel reclaims
/// under pressure.
const OVERHEAD_MIB: u64 = 128;
/// Part of the guest's RAM that the kernel needs for its page tables: 8 bytes
/// for each 4 KiB page in the process's tables and again in the second-level
/// tables (EPT, NPT), and more with shadow paging.
const TABLES_PART: u64 = 64;
/// Threads of a VMM process: 8 vCPUs and the devices', twice over.
const MOST_THREADS: u64 = 64;
/// Period of `cpu.max` in microseconds (the kernel's default).
const PERIOD_US: u64 = 100_000;
/// Host CPUs for the devices of a guest, besides one per vCPU.
const DEVICE_CPUS: u64 = 1;

/// An operation on a cgroup failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}", path.display())]
pub struct GroupError {
    what: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Limits of the VMM process of one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestLimits {
    /// Bytes of memory of the process, the guest's RAM included.
    pub memory: u64,
    /// Microseconds of CPU time in each [`PERIOD_US`].
    cpu_us: u64,
}

impl GuestLimits {
    /// Limits for a guest of this size. `disks` is the size of its disks on
    /// tmpfs, whose pages count as the process's memory.
    pub fn of(vcpus: u8, memory_mib: u32, disks: u64) -> Self {
        let guest = u64::from(memory_mib) << 20;
        let process = guest + guest / TABLES_PART + (OVERHEAD_MIB << 20);
        Self {
            memory: process.saturating_add(disks),
            cpu_us: (u64::from(vcpus) + DEVICE_CPUS) * PERIOD_US,
        }
    }
}

/// The cgroup of a host's guests. Drop removes it if no process is left in it.
#[derive(Debug)]
pub struct HostGroup {
    path: PathBuf,
}

impl HostGroup {
    /// Creates the cgroup of the host `short_id` in `parent`, and removes those of
    /// host agents that have ended.
    ///
    /// # Errors
    /// The kernel refused. Nothing is left behind.
    pub fn create(parent: &ParentCgroup, short_id: &str) -> Result<Self, GroupError> {
        sweep(&parent.path);
        let name = format!("{PREFIX}{short_id}.{}", std::process::id());
        let this = Self {
            path: parent.path.join(name),
        };
        make(&this.path)?;
        if parent.preparation == Preparation::MoveAndEnable {
            let leaf = this.path.join(SUPERVISOR);
            make(&leaf)?;
            enter(&leaf, std::process::id())?;
        }
        if parent.preparation != Preparation::None {
            enable(&parent.path)?;
        }
        enable(&this.path)?;
        Ok(this)
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Creates a cgroup with `limits` for the VMM process of `instance`.
    ///
    /// # Errors
    /// The kernel refused. Nothing is left behind.
    pub fn guest(&self, instance: &str, limits: GuestLimits) -> Result<GuestGroup, GroupError> {
        let path = self.path.join(instance);
        // A cgroup of an earlier boot has that boot's `memory.events`.
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

impl Drop for HostGroup {
    fn drop(&mut self) {
        // On failure the janitor removes it.
        let _ = remove(&self.path);
    }
}

/// The cgroup of one boot of a guest. Drop removes it if the process has ended.
#[derive(Debug)]
pub struct GuestGroup {
    path: PathBuf,
    /// Bytes of memory that the process may use.
    memory: u64,
    /// The cgroup around it is that of an earlier host agent.
    adopted: bool,
}

impl GuestGroup {
    /// The cgroup of a VMM process that an earlier host agent started, if it has one.
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

    /// Moves a process into it.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn enter(&self, pid: u32) -> Result<(), GroupError> {
        enter(&self.path, pid)
    }

    /// Why the kernel's OOM killer ended the process, if it did.
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
        // If the process is still exiting, the Drop of `HostGroup` removes it.
        let _ = fs::remove_dir(&self.path);
        if self.adopted
            && let Some(parent) = self.path.parent().and_then(Path::parent)
        {
            sweep(parent);
        }
    }
}

/// Removes the cgroup of a host with its children. False if it still exists. This process may be in its `supervisor` child only.
pub fn remove(path: &Path) -> bool {
    let mut busy = false;
    for guest in guests(path) {
        // EBUSY while a process is in it.
        busy |= fs::remove_dir(guest).is_err();
    }
    // Disabling controllers would lift the limits of guests that still exit.
    let leaf = path.join(SUPERVISOR);
    if !busy && leaf.exists() {
        leave(path, &leaf);
        let _ = fs::remove_dir(leaf);
    }
    match fs::remove_dir(path) {
        Ok(()) => true,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// The cgroups of guests in the cgroup of a host.
pub fn guests(path: &Path) -> Vec<PathBuf> {
    let mut guests = children(path);
    guests.retain(|path| !is_leaf(path));
    guests
}

/// Kills every process in the cgroup of a guest.
pub fn kill(guest: &Path) {
    // The file exists since Linux 5.14.
    let _ = write(&guest.join("cgroup.kill"), "1", "kill");
}

fn is_leaf(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == SUPERVISOR)
}

/// Moves this process from `leaf` back to the parent of `path`, which the kernel
/// allows once no controllers are enabled below the parent.
fn leave(path: &Path, leaf: &Path) {
    let mine = std::process::id();
    let inside = fs::read_to_string(leaf.join("cgroup.procs")).unwrap_or_default();
    let Some(parent) = path.parent() else { return };
    if !inside.lines().any(|pid| pid == mine.to_string()) {
        return;
    }
    for directory in [path, parent] {
        for controller in NEEDED.iter().chain(&WANTED) {
            // Fails for a controller that is not enabled.
            let file = directory.join("cgroup.subtree_control");
            let _ = write(&file, &format!("-{controller}"), "change");
        }
    }
    let _ = enter(parent, mine);
}

/// Removes the cgroups of host agents that have ended.
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

/// The counter `name` of `memory.events`.
fn event(events: &str, name: &str) -> u64 {
    let values = events.lines().filter_map(|line| line.split_once(' '));
    values
        .filter(|(key, _)| *key == name)
        .find_map(|(_, value)| value.parse().ok())
        .unwrap_or(0)
}

fn make(path: &Path) -> Result<(), GroupError> {
    match fs::create_dir(path) {
        // The process of an earlier boot is still exiting in it.
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
        // Optional, so errors are ignored.
        let _ = write(&file, &format!("+{controller}"), "change");
    }
    Ok(())
}

fn enter(path: &Path, pid: u32) -> Result<(), GroupError> {
    write(&path.join("cgroup.procs"), &pid.to_string(), "move into")
}

/// Writes `value` by one `write(2)`, which these files require.
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
    fn limits_cover_the_guest_and_its_vmm_process() {
        let limits = GuestLimits::of(1, 768, 0);
        assert_eq!(limits.memory >> 20, 768 + 12 + 128);
        assert_eq!(limits.cpu_us, 200_000);
        assert_eq!(
            GuestLimits::of(8, 14_336, 5 << 20).memory >> 20,
            14_336 + 224 + 128 + 5
        );
    }

    #[test]
    fn memory_events_are_read_by_their_full_name() {
        let events = "low 0\nhigh 0\nmax 31\noom 2\noom_kill 1\noom_group_kill 0\n";
        assert_eq!((event(events, "oom"), event(events, "oom_kill")), (2, 1));
        assert_eq!(event("", "oom"), 0);
    }
}
