//! Finds the cgroup in which this process may create cgroups with limits.
//! [`decide`] is pure; the rest gathers its input.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};

use super::NEEDED;

/// Command by which systemd delegates a cgroup to a user.
const BY_SYSTEMD: &str = "systemd-run --user --scope -p Delegate=yes host-agent …";
/// The same for root.
const BY_SYSTEMD_ROOT: &str = "systemd-run --scope -p Delegate=yes host-agent …";
/// For hosts on which cgroup version 1 has the controllers.
const BY_BOOT: &str = "boot with cgroup v2 alone: systemd.unified_cgroup_hierarchy=1 on the \
    kernel command line";

/// A cgroup in which this process may create cgroups with limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentCgroup {
    /// Its directory.
    pub path: PathBuf,
    /// What must be done before the first cgroup is created.
    pub(super) preparation: Preparation,
}

/// What must be done before children can have limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Preparation {
    /// Nothing.
    None,
    /// Enable the controllers for the children (`cgroup.subtree_control`).
    Enable,
    /// Move this process to a child first: a cgroup other than the root cannot
    /// have both processes and children with controllers (`cgroup-v2.rst`, "No
    /// Internal Process Constraint").
    MoveAndEnable,
}

/// Why limits cannot be enforced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotEnforced {
    /// The reason.
    pub reason: String,
    /// The command or change that helps.
    pub hint: String,
}

impl fmt::Display for NotEnforced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.reason, self.hint)
    }
}

/// The facts about one cgroup that [`decide`] needs.
#[derive(Debug, Clone, PartialEq, Eq)]
struct CgroupState {
    path: PathBuf,
    /// The root of the hierarchy: it may have processes and children with
    /// controllers.
    is_root: bool,
    /// `cgroup.controllers`: what can be enabled for its children.
    available: BTreeSet<String>,
    /// `cgroup.subtree_control`: what is enabled for its children.
    enabled: BTreeSet<String>,
    /// Whether this process may create children and move processes.
    writable: bool,
    /// Whether it has processes other than this one.
    shared: bool,
}

/// Finds the parent for the cgroups of this process. Changes nothing.
///
/// # Errors
/// This process may create cgroups with limits nowhere.
pub fn find_parent() -> Result<ParentCgroup, NotEnforced> {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let membership = read("/proc/self/cgroup");
    let mut found = Err(NotEnforced {
        reason: "cgroup v2 is not mounted".into(),
        hint: "mount -t cgroup2 none /sys/fs/cgroup, or on a machine with systemd, ".to_owned()
            + BY_BOOT,
    });
    for (mount, own) in cgroups_of(&read("/proc/self/mountinfo"), &membership) {
        let parent = own
            .parent()
            .filter(|parent| parent.starts_with(&mount))
            .map(level);
        found = decide(&level(&own), parent.as_ref());
        if found.is_ok() {
            break;
        }
    }
    found
}

/// Mount point and cgroup below it of the process with the `membership`, for every
/// mount of cgroup2.
pub(super) fn cgroups_of(mountinfo: &str, membership: &str) -> Vec<(PathBuf, PathBuf)> {
    let Some(own) = membership.lines().find_map(|line| line.strip_prefix("0::")) else {
        return Vec::new();
    };
    let mounts = mountinfo.lines().filter_map(|line| {
        // proc_pid_mountinfo(5): a hyphen ends the optional fields.
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        // A path with a space is escaped with a backslash: not supported.
        if filesystem.split(' ').next() != Some("cgroup2") || point.contains('\\') {
            return None;
        }
        let below = Path::new(own).strip_prefix(root).ok()?;
        let point = PathBuf::from(point);
        // `collect` removes the slash that joining an empty path adds.
        let own = point.join(below).components().collect();
        Some((point, own))
    });
    mounts.collect()
}

fn level(path: &Path) -> CgroupState {
    let read = |name| fs::read_to_string(path.join(name)).unwrap_or_default();
    let words = |name| read(name).split_whitespace().map(Into::into).collect();
    let may = |name| access(&path.join(name), AccessFlags::W_OK).is_ok();
    let mine = std::process::id().to_string();
    CgroupState {
        path: path.to_owned(),
        // Only the root has no such file.
        is_root: !path.join("cgroup.events").exists(),
        available: words("cgroup.controllers"),
        enabled: words("cgroup.subtree_control"),
        writable: may("") && may("cgroup.procs") && may("cgroup.subtree_control"),
        shared: read("cgroup.procs").lines().any(|pid| pid != mine),
    }
}

/// Chooses this process's own cgroup `own`, or `parent`, the cgroup above it.
fn decide(own: &CgroupState, parent: Option<&CgroupState>) -> Result<ParentCgroup, NotEnforced> {
    let has = |set: &BTreeSet<String>| NEEDED.iter().all(|name| set.contains(*name));
    let at = |level: &CgroupState, preparation| {
        Ok(ParentCgroup {
            path: level.path.clone(),
            preparation,
        })
    };
    if own.writable && has(&own.enabled) {
        return at(own, Preparation::None);
    }
    if own.writable && own.is_root && has(&own.available) {
        return at(own, Preparation::Enable);
    }
    if own.writable && !own.shared && has(&own.available) {
        return at(own, Preparation::MoveAndEnable);
    }
    if let Some(parent) = parent
        && parent.writable
        && has(&parent.enabled)
    {
        return at(parent, Preparation::None);
    }
    let path = own.path.display();
    let root = nix::unistd::Uid::effective().is_root();
    let by_systemd = if root { BY_SYSTEMD_ROOT } else { BY_SYSTEMD };
    Err(if !has(&own.available) {
        let missing: Vec<_> = NEEDED
            .into_iter()
            .filter(|name| !own.available.contains(*name))
            .collect();
        NotEnforced {
            reason: format!("cgroup {path} has no controller {}", missing.join(", ")),
            hint: if own.is_root { BY_BOOT } else { by_systemd }.into(),
        }
    } else if own.writable {
        NotEnforced {
            reason: format!("cgroup {path} holds other processes too"),
            hint: by_systemd.into(),
        }
    } else {
        NotEnforced {
            reason: format!("cgroup {path} belongs to another user or is read-only"),
            hint: by_systemd.into(),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_cgroup_is_found_below_every_mount_that_has_it() {
        let mountinfo = "\
25 30 0:23 / /sys rw,nosuid shared:7 - sysfs sysfs rw\n\
35 25 0:30 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n\
36 25 0:31 / /sys/fs/cgroup/memory rw shared:5 - cgroup cgroup rw,memory\n\
90 25 0:30 /user.slice /mnt rw - cgroup2 none rw\n\
91 25 0:30 /system.slice /other rw - cgroup2 none rw\n";
        let membership = "4:memory:/x\n0::/user.slice/a.scope\n";
        assert_eq!(
            cgroups_of(mountinfo, membership),
            [
                ("/sys/fs/cgroup", "/sys/fs/cgroup/user.slice/a.scope"),
                ("/mnt", "/mnt/a.scope")
            ]
            .map(|(mount, own)| (mount.into(), own.into()))
        );
        assert_eq!(cgroups_of(mountinfo, "4:memory:/x\n"), []);
    }

    fn level(path: &str, change: impl FnOnce(&mut CgroupState)) -> CgroupState {
        let all: BTreeSet<String> = ["cpu", "memory", "pids"].map(Into::into).into();
        let mut level = CgroupState {
            path: path.into(),
            is_root: false,
            available: all,
            enabled: BTreeSet::new(),
            writable: true,
            shared: false,
        };
        change(&mut level);
        level
    }

    #[test]
    fn own_cgroup_is_preferred_to_the_one_above_it() {
        let place = |own: &CgroupState, parent: Option<&CgroupState>| {
            decide(own, parent).map(|parent| (parent.path, parent.preparation))
        };
        let full = |level: &mut CgroupState| level.enabled = level.available.clone();
        let above = level("/c/a", full);

        let root = level("/c", |level| (level.is_root, level.shared) = (true, true));
        assert_eq!(place(&root, None), Ok(("/c".into(), Preparation::Enable)));
        let ready = level("/c", full);
        assert_eq!(place(&ready, None), Ok(("/c".into(), Preparation::None)));
        let delegated = level("/c/a/b", |_| {});
        assert_eq!(
            place(&delegated, Some(&above)),
            Ok(("/c/a/b".into(), Preparation::MoveAndEnable))
        );
        let shared = level("/c/a/b", |level| level.shared = true);
        assert_eq!(
            place(&shared, Some(&above)),
            Ok(("/c/a".into(), Preparation::None))
        );

        let why = |own: &CgroupState, parent| place(own, parent).unwrap_err().to_string();
        let bare = level("/c/a", |_| {});
        assert!(why(&shared, Some(&bare)).contains("/c/a/b holds other processes"));
        let foreign = level("/c/a/b", |level| level.writable = false);
        let closed = level("/c/a", |level| (level.writable) = false);
        let text = why(&foreign, Some(&closed));
        assert!(text.contains("another user") && text.contains("systemd-run"));
        let poor = level("/c", |level| {
            level.is_root = true;
            level.available = ["hugetlb".into()].into();
        });
        let text = why(&poor, None);
        assert!(text.contains("no controller memory, pids") && text.contains("boot with"));
    }

    #[test]
    fn this_machine_has_a_parent_or_a_reason() {
        match find_parent() {
            Ok(parent) => assert!(parent.path.join("cgroup.procs").exists()),
            Err(why) => assert!(!why.reason.is_empty() && !why.hint.is_empty()),
        }
    }
}
