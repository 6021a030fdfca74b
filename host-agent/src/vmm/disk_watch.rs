//! What the main thread makes of disks that the host cannot serve.

use super::control::{DiskFailed, Event, NoSpace};
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
            watched.shortage = watched.disk.hold.shortage();
        }
        self.lacks_room()
    }

    fn lacks_room(&self) -> bool {
        self.0.iter().any(|watched| watched.shortage.is_some())
    }

    /// Nothing waits for room any more: what is written without fails.
    pub fn give_up(&self) {
        for watched in &self.0 {
            watched.disk.hold.fail_when_full();
        }
    }

    /// Tells of each disk that was seen to wait for room, and of the end of all
    /// waits. What the supervisor did not take is told again: it counts no
    /// silence until the end.
    pub fn tell_room(&mut self, outbox: &Outbox) {
        for watched in &mut self.0 {
            if let (Some(shortage), false) = (watched.shortage, watched.told) {
                let event = Event::NoSpace(NoSpace {
                    disk: watched.disk.serial.clone(),
                    needed: shortage.needed,
                    quota: shortage.quota,
                });
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

    /// Tells of each disk that the host failed to serve, until it is heard.
    pub fn tell_failures(&mut self, outbox: &Outbox) {
        for Watched { disk, failed, .. } in &mut self.0 {
            if let (Some(failure), false) = (disk.counters.first_failure.get(), *failed) {
                let event = Event::DiskFailed(DiskFailed {
                    disk: disk.serial.clone(),
                    error: failure.error.clone(),
                    full: failure.full,
                });
                *failed = outbox.send(&event, vec![]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::fd::{AsFd, OwnedFd};
    use std::sync::Arc;

    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::vmm::virtio::blk::{EnospcHold, HostFailure};
    use crate::vmm::wire;

    fn event() -> EventFd {
        EventFd::new(libc::EFD_NONBLOCK).unwrap()
    }

    /// Holds of two disks, and the ends of the control socket.
    fn watch() -> ([Arc<EnospcHold>; 2], DiskWatch, Outbox, OwnedFd) {
        let holds = [(); 2].map(|()| Arc::new(EnospcHold::new(event(), event())));
        let disks = [("os", &holds[0]), ("resource", &holds[1])].map(|(serial, hold)| DiskState {
            serial: serial.into(),
            counters: Arc::default(),
            hold: Arc::clone(hold),
        });
        let (ours, theirs) = wire::pair().unwrap();
        nix::fcntl::fcntl(
            &theirs,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )
        .unwrap();
        let outbox = Outbox::new(ours, event()).unwrap();
        let watch = DiskWatch::new(&disks);
        (holds, watch, outbox, theirs)
    }

    fn told(theirs: &OwnedFd) -> Vec<Event> {
        let next = || wire::recv::<Event>(theirs.as_fd()).ok().flatten();
        std::iter::from_fn(next).map(|(event, _)| event).collect()
    }

    fn no_space(disk: &str) -> Event {
        Event::NoSpace(NoSpace {
            disk: disk.into(),
            needed: 512,
            quota: true,
        })
    }

    #[test]
    fn each_disk_without_room_is_told_once_and_the_end_when_none_is_left() {
        let ([os, resource], mut watch, outbox, theirs) = watch();
        let quota = io::Error::from_raw_os_error(libc::EDQUOT);
        let mut look = || {
            let lacks = watch.look();
            watch.tell_room(&outbox);
            (lacks, told(&theirs))
        };
        assert_eq!(look(), (false, vec![]));
        for _ in 0..2 {
            os.begin(512, &quota);
            assert_eq!(look(), (true, vec![no_space("os")]));
            assert_eq!(look(), (true, vec![]));
            resource.begin(512, &quota);
            os.end();
            assert_eq!(look(), (true, vec![no_space("resource")]));
            resource.end();
            assert_eq!(look(), (false, vec![Event::SpaceBack {}]));
            assert_eq!(look(), (false, vec![]));
        }
    }

    #[test]
    fn a_supervisor_that_did_not_hear_of_it_hears_of_it_later_and_never_of_half() {
        let ([os, _], mut watch, outbox, theirs) = watch();
        let counters = Arc::clone(&watch.0[0].disk.counters);
        let quota = io::Error::from_raw_os_error(libc::EDQUOT);
        let stuff = || while outbox.send(&Event::Pong { id: 0 }, vec![]) {};
        let relieve = || {
            let mut all = told(&theirs);
            while outbox.is_behind() {
                outbox.flush();
                all.extend(told(&theirs));
            }
            all.retain(|event| !matches!(event, Event::Pong { .. }));
            all
        };
        // What begins and ends unheard is not told at all.
        stuff();
        os.begin(512, &quota);
        assert!(watch.look());
        watch.tell_room(&outbox);
        os.end();
        watch.look();
        assert_eq!(relieve(), []);
        watch.tell_room(&outbox);
        assert_eq!(relieve(), []);
        // The end of what was heard is told as soon as it can be.
        os.begin(512, &quota);
        watch.look();
        watch.tell_room(&outbox);
        assert_eq!(relieve(), [no_space("os")]);
        os.end();
        stuff();
        watch.look();
        watch.tell_room(&outbox);
        assert_eq!(relieve(), []);
        watch.tell_room(&outbox);
        assert_eq!(relieve(), [Event::SpaceBack {}]);
        // Nor is a failure lost, and it is told once.
        stuff();
        let failure = HostFailure::from(&io::Error::from_raw_os_error(libc::EIO));
        counters.first_failure.set(failure.clone()).unwrap();
        watch.tell_failures(&outbox);
        assert_eq!(relieve(), []);
        let failed = Event::DiskFailed(DiskFailed {
            disk: "os".into(),
            error: failure.error,
            full: false,
        });
        for told in [vec![failed], vec![]] {
            watch.tell_failures(&outbox);
            assert_eq!(relieve(), told);
        }
    }
}
