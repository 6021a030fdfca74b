//! A guest that stands still because the host has no room for what it writes.

use std::os::linux::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;
use tokio::time::Instant;

use super::super::event::EventKind;
use super::super::guest;
use super::super::lifecycle::Input;
use super::{ClockId, Instance, clock};

/// Least that is asked for: a cluster of a diff disk and the tables that name it.
const LEAST: u64 = 128 << 10;

/// A pause for want of room.
#[derive(Debug)]
pub(super) struct Standing {
    since: Instant,
    /// Its end is told if its begin was.
    told: bool,
}

impl Instance {
    pub(super) fn no_space(&mut self, disk: String, needed: u32, quota: bool) -> bool {
        let Some(name) = guest::disk_file(&disk) else {
            return self.no_such_disk();
        };
        let told = self.quota.take(clock(ClockId::CLOCK_MONOTONIC));
        let Some(boot) = &mut self.boot else {
            return true;
        };
        let standing = boot.standing.get_or_insert_with(|| Standing {
            since: Instant::now(),
            told,
        });
        standing.told |= told;
        // What ran of this tick is not worth a verdict.
        self.ran_whole_tick = false;
        self.view.send_modify(|view| view.no_space = true);
        if told {
            let file = self.parts.dir.join(name);
            self.tell(EventKind::NoSpace {
                disk,
                mount: mount_of(&file),
                needed_bytes: u64::from(needed).max(LEAST),
                free_bytes: free_on(&file),
                quota,
                file,
            });
        }
        self.feed(Input::NoSpace)
    }

    pub(super) fn space_back(&mut self) -> bool {
        let standing = self.boot.as_mut().and_then(|boot| boot.standing.take());
        let Some(Standing { since, told }) = standing else {
            return true;
        };
        self.view.send_modify(|view| view.no_space = false);
        if told {
            let paused_ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.tell(EventKind::SpaceBack { paused_ms });
        }
        self.feed(Input::SpaceBack)
    }

    /// Whether the guest stands still for want of room.
    pub(super) fn stands_still(&self) -> bool {
        self.boot
            .as_ref()
            .is_some_and(|boot| boot.standing.is_some())
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
