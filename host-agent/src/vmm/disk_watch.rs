//! Reports full and failing disks of the host to the supervisor.

use std::time::Instant;

use super::control::{DiskFailed, Event, NoSpace};
use super::machine::DiskState;
use super::outbox::Outbox;
use super::virtio::blk::Shortage;
use crate::token_bucket::{TIMELINE, TokenBucket};

/// The disks of a guest, and what the supervisor knows of them.
#[derive(Debug)]
pub struct DiskWatch {
    disks: Vec<WatchedDisk>,
    /// Limits reports of shortages: resets of a disk can end one early.
    shortages: TokenBucket<Instant>,
}

#[derive(Debug)]
struct WatchedDisk {
    disk: DiskState,
    /// The first failure is reported.
    failure_reported: bool,
    /// The shortage found by the last [`DiskWatch::check`].
    shortage: Option<Shortage>,
    /// `NoSpace` is reported, and `SpaceBack` not yet.
    shortage_reported: bool,
}

impl DiskWatch {
    /// Nothing is reported yet.
    pub fn new(disks: &[DiskState]) -> Self {
        let fresh = |disk: &DiskState| WatchedDisk {
            disk: disk.clone(),
            failure_reported: false,
            shortage: None,
            shortage_reported: false,
        };
        Self {
            disks: disks.iter().map(fresh).collect(),
            shortages: TokenBucket::new(TIMELINE),
        }
    }

    /// Whether a disk holds a request because the host's disk is full. The guest
    /// is paused until none does.
    pub fn check(&mut self) -> bool {
        for watched in &mut self.disks {
            watched.shortage = watched.disk.hold.shortage();
        }
        self.is_any_full()
    }

    fn is_any_full(&self) -> bool {
        self.disks.iter().any(|watched| watched.shortage.is_some())
    }

    /// From now on ENOSPC fails the request instead of holding it.
    pub fn fail_when_full(&self) {
        for watched in &self.disks {
            watched.disk.hold.fail_when_full();
        }
    }

    /// Reports each full disk, and later that none is full. A report that the outbox
    /// did not take, or that came too often, is repeated: after `NoSpace` the supervisor counts no silence
    /// until it receives `SpaceBack`.
    pub fn report_space(&mut self, outbox: &Outbox) {
        for watched in &mut self.disks {
            if let (Some(no_space), false) = (watched.no_space(), watched.shortage_reported)
                && self.shortages.take(Instant::now())
            {
                watched.shortage_reported = outbox.send(&Event::NoSpace(no_space), vec![]);
            }
        }
        let reported = self.disks.iter().any(|watched| watched.shortage_reported);
        if reported && !self.is_any_full() && outbox.send(&Event::SpaceBack {}, vec![]) {
            for watched in &mut self.disks {
                watched.shortage_reported = false;
            }
        }
    }

    /// Whether a disk is full, and its report came too often.
    pub fn is_report_late(&self) -> bool {
        let late = |watched: &WatchedDisk| watched.shortage.is_some() && !watched.shortage_reported;
        self.disks.iter().any(late)
    }

    /// The state found by the last [`DiskWatch::check`], for a supervisor that
    /// attaches. From here on it is sent only changes.
    pub fn attached(&mut self) -> (Vec<NoSpace>, Vec<DiskFailed>) {
        let (mut no_space, mut failures) = (Vec::new(), Vec::new());
        for watched in &mut self.disks {
            let (shortage, failure) = (watched.no_space(), watched.failure());
            watched.shortage_reported = shortage.is_some();
            watched.failure_reported = failure.is_some();
            no_space.extend(shortage);
            failures.extend(failure);
        }
        (no_space, failures)
    }

    /// Reports the first failure of each disk, until the outbox takes it.
    pub fn report_failures(&mut self, outbox: &Outbox) {
        for watched in &mut self.disks {
            if let (Some(failure), false) = (watched.failure(), watched.failure_reported) {
                watched.failure_reported = outbox.send(&Event::DiskFailed(failure), vec![]);
            }
        }
    }
}

impl WatchedDisk {
    fn no_space(&self) -> Option<NoSpace> {
        self.shortage.map(|shortage| NoSpace {
            disk: self.disk.serial.clone(),
            needed: shortage.needed,
            quota: shortage.quota,
        })
    }

    fn failure(&self) -> Option<DiskFailed> {
        let failure = self.disk.counters.first_failure.get();
        failure.map(|failure| DiskFailed {
            disk: self.disk.serial.clone(),
            error: failure.error.clone(),
            full: failure.full,
        })
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
        wire::set_nonblocking(&ours).unwrap();
        let outbox = Outbox::new(event());
        outbox.attach(Arc::new(ours), None).unwrap();
        let watch = DiskWatch::new(&disks);
        (holds, watch, outbox, theirs)
    }

    fn received(theirs: &OwnedFd) -> Vec<Event> {
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
    fn each_full_disk_is_reported_once_and_so_is_the_end() {
        let ([os, resource], mut watch, outbox, theirs) = watch();
        let quota = io::Error::from_raw_os_error(libc::EDQUOT);
        let mut look = || {
            let lacks = watch.check();
            watch.report_space(&outbox);
            (lacks, received(&theirs))
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
    fn shortages_that_come_and_go_are_reported_at_a_limited_rate() {
        let ([os, _], mut watch, outbox, theirs) = watch();
        let quota = io::Error::from_raw_os_error(libc::EDQUOT);
        let begin = Instant::now();
        let mut events = Vec::new();
        for _ in 0..10_000 {
            os.begin(512, &quota);
            assert!(watch.check());
            watch.report_space(&outbox);
            os.end();
            assert!(!watch.check());
            watch.report_space(&outbox);
            events.extend(received(&theirs));
        }
        let most = 2 * (21 + begin.elapsed().as_millis() as usize / 500);
        assert!((40..=most).contains(&events.len()), "{}", events.len());
        let pair = [no_space("os"), Event::SpaceBack {}];
        assert!(events.chunks(2).all(|events| events == pair));
    }

    #[test]
    fn reports_that_the_outbox_refused_are_repeated() {
        let ([os, _], mut watch, outbox, theirs) = watch();
        let counters = Arc::clone(&watch.disks[0].disk.counters);
        let quota = io::Error::from_raw_os_error(libc::EDQUOT);
        let stuff = || while outbox.send(&Event::Pong { id: 0 }, vec![]) {};
        let relieve = || {
            let mut all = received(&theirs);
            while outbox.is_behind() {
                outbox.flush();
                all.extend(received(&theirs));
            }
            all.retain(|event| !matches!(event, Event::Pong { .. }));
            all
        };
        // A shortage that begins and ends before it can be reported is not reported.
        stuff();
        os.begin(512, &quota);
        assert!(watch.check());
        watch.report_space(&outbox);
        os.end();
        watch.check();
        assert_eq!(relieve(), []);
        watch.report_space(&outbox);
        assert_eq!(relieve(), []);
        // The end of a reported shortage is reported as soon as possible.
        os.begin(512, &quota);
        watch.check();
        watch.report_space(&outbox);
        assert_eq!(relieve(), [no_space("os")]);
        os.end();
        stuff();
        watch.check();
        watch.report_space(&outbox);
        assert_eq!(relieve(), []);
        watch.report_space(&outbox);
        assert_eq!(relieve(), [Event::SpaceBack {}]);
        // A failure is reported later too, and once.
        stuff();
        let failure = HostFailure::from(&io::Error::from_raw_os_error(libc::EIO));
        counters.first_failure.set(failure.clone()).unwrap();
        watch.report_failures(&outbox);
        assert_eq!(relieve(), []);
        let failed = Event::DiskFailed(DiskFailed {
            disk: "os".into(),
            error: failure.error,
            full: false,
        });
        for expected in [vec![failed], vec![]] {
            watch.report_failures(&outbox);
            assert_eq!(relieve(), expected);
        }
    }
}
