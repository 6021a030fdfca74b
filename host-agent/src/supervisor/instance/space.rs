//! A guest that stands still because the host has no room for what it writes.

use std::os::linux::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;

use super::super::event::EventKind;
use super::super::guest;
use super::super::lifecycle::Input;
use super::{ClockId, Instance, clock};

/// Least that is asked for: a cluster of a diff disk and the tables that name it.
const LEAST: u64 = 128 << 10;

impl Instance {
    pub(super) fn no_space(&mut self, disk: String, needed: u32, quota: bool) -> bool {
        let Some(name) = guest::disk_file(&disk) else {
            return self.no_such_disk();
        };
        let now = clock(ClockId::CLOCK_MONOTONIC);
        let reported = self.quota.take(now);
        let Some(boot) = &mut self.boot else {
            return true;
        };
        boot.no_space_reported |= reported;
        self.liveness.no_space(now);
        let file = self.parts.dir.join(name);
        let no_space = EventKind::NoSpace {
            disk,
            mount: mount_of(&file),
            needed_bytes: u64::from(needed).max(LEAST),
            free_bytes: free_on(&file),
            quota,
            file,
        };
        self.observe(&no_space);
        if reported {
            self.tell(no_space);
        }
        self.feed(Input::NoSpace)
    }

    pub(super) fn space_back(&mut self) -> bool {
        let now = clock(ClockId::CLOCK_MONOTONIC);
        let Some(paused) = self.liveness.space_back(now) else {
            return true;
        };
        self.observe(&EventKind::SpaceBack { paused_ms: 0 });
        let boot = self.boot.as_mut();
        if boot.is_some_and(|boot| std::mem::take(&mut boot.no_space_reported)) {
            let paused_ms = u64::try_from(paused.as_millis()).unwrap_or(u64::MAX);
            self.tell(EventKind::SpaceBack { paused_ms });
        }
        self.feed(Input::SpaceBack)
    }

    fn no_such_disk(&mut self) -> bool {
        let text = "VMM process lacks room for a disk that there is not".into();
        self.trouble(EventKind::Warning { text });
        true
    }
}

/// The mount point above `file`: the last directory on the same device.
fn mount_of(file: &Path) -> PathBuf {
    let device = |path: &Path| path.metadata().map(|metadata| metadata.st_dev()).ok();
    let own = device(file);
    let same = file.ancestors().take_while(|path| device(path) == own);
    same.last().unwrap_or(file).to_owned()
}

/// Bytes that we may still use on the file system of `file`.
fn free_on(file: &Path) -> Option<u64> {
    let stat = statvfs(file).ok()?;
    Some(stat.blocks_available() * stat.fragment_size())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_under_the_mount_point_of_its_file_system() {
        assert_eq!(mount_of(Path::new("/proc/self/status")), Path::new("/proc"));
        assert_eq!(mount_of(Path::new("/")), Path::new("/"));
        assert_eq!(free_on(Path::new("/proc/self/status")), Some(0));
        let own = std::env::current_exe().unwrap();
        assert!(free_on(&own).is_some());
    }
}
