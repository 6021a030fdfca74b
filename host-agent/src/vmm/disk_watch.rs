//! What the main thread makes of disks that the host cannot serve.

use super::control::Event;
use super::machine::DiskState;
use super::outbox::Outbox;
use super::virtio::blk::Shortage;

/// The disks of a guest, and what was told of them.
#[derive(Debug)]
pub struct DiskWatch(Vec<Watched>);

#[derive(Debug)]
struct Watched {
    disk: DiskState,
    /// The first failure was told.
    failed: bool,
    /// What it was last seen to wait for.
    shortage: Option<Shortage>,
    /// A wait was told, and not yet the end of all.
    told: bool,
}

impl DiskWatch {
    /// Nothing was told yet.
    pub fn new(disks: &[DiskState]) -> Self {
        let fresh = |disk: &DiskState| Watched {
            disk: disk.clone(),
            failed: false,
            shortage: None,
            told: false,
        };
        Self(disks.iter().map(fresh).collect())
    }

    /// Looks whether a disk waits for room. Until none does the guest stands
    /// still.
    pub fn look(&mut self) -> bool {
        for watched in &mut self.0 {
            watched.shortage = watched.disk.room.shortage();
        }
        self.lacks_room()
    }

    fn lacks_room(&self) -> bool {
        self.0.iter().any(|watched| watched.shortage.is_some())
    }

    /// Nothing waits for room any more: what is written without fails.
    pub fn give_up(&self) {
        for watched in &self.0 {
            watched.disk.room.give_up();
        }
    }

    /// Tells of each disk that was seen to wait for room, and of the end of all
    /// waits. What the supervisor did not take is told again: it counts no
    /// silence until the end.
    pub fn tell_room(&mut self, outbox: &Outbox) {
        for watched in &mut self.0 {
            if let (Some(shortage), false) = (watched.shortage, watched.told) {
                let event = Event::NoSpace {
                    disk: watched.disk.serial.clone(),
                    needed: shortage.needed,
                    quota: shortage.quota,
                };
                watched.told = outbox.send(&event, vec![]);
            }
        }
        let told = self.0.iter().any(|watched| watched.told);
        if told && !self.lacks_room() && outbox.send(&Event::SpaceBack {}, vec![]) {
            for watched in &mut self.0 {
                watched.told = false;
            }
        }
    }

    /// Tells of each disk that the host failed to serve, once.
    pub fn tell_failures(&mut self, outbox: &Outbox) {
        for Watched { disk, failed, .. } in &mut self.0 {
            if let (Some(failure), false) = (disk.counters.first_failure.get(), *failed) {
                let event = Event::DiskFailed {
                    disk: disk.serial.clone(),
                    error: failure.error.clone(),
                    full: failure.full,
                };
                outbox.send(&event, vec![]);
                *failed = true;
            }
        }
    }
}
