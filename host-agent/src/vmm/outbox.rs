//! Events on their way to the attached supervisor. Sending never waits.
//!
//! The control socket does not block. Events that it does not take are kept, in
//! order and within a bound, and sent by the main thread when there is space. So a
//! supervisor that is stopped or slow delays neither a device nor the main loop.
//!
//! Nothing is kept while no supervisor is attached. The next one learns the state
//! of the guest from [`Event::Attached`]; an event that is not state is lost: an
//! [`Event::Opened`] closes its descriptor, so that the guest sees a reset and
//! connects again, and nobody waits for an [`Event::Dialed`] any more.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;

use super::control::{DialOutcome, Event};
use super::wire;

/// Most events that wait. A guest can cause one for each connection that it
/// opens, and each may hold a descriptor; a supervisor so far behind hangs.
const MAX_WAITING: usize = 256;
/// Time until a packet that the kernel refused is tried again at the end.
const RETRY: Duration = Duration::from_millis(20);

/// The queue of all threads. Clones share it.
#[derive(Debug, Clone)]
pub struct Outbox(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    queue: Mutex<Queue>,
    /// Tells the main thread that there are events to flush.
    wake: EventFd,
}

#[derive(Debug, Default)]
struct Queue {
    /// The socket of the attached supervisor, until it fails.
    peer: Option<Arc<OwnedFd>>,
    /// Files of [`Event::Attached`] are shared with the main thread.
    events: VecDeque<(Vec<u8>, Vec<Arc<OwnedFd>>)>,
    /// The last event is queued: none may follow.
    complete: bool,
    /// The kernel refused the first event for another reason than a full socket:
    /// `POLLOUT` says nothing about the next try.
    refused: bool,
    /// Dials of this supervisor that are not answered: our number, its id. A later
    /// supervisor may use the same ids.
    dials: BTreeMap<u64, u64>,
    next_dial: u64,
}

impl Outbox {
    /// A queue without a supervisor. `wake` wakes the main thread.
    pub fn new(wake: EventFd) -> Self {
        Self(Arc::new(Inner {
            queue: Mutex::default(),
            wake,
        }))
    }

    /// Sends from here on to the supervisor at `socket`, which must not block, and
    /// `first` with its files before everything else. Drops what waits for the one before.
    pub fn attach(
        &self,
        socket: Arc<OwnedFd>,
        first: Option<(&Event, Vec<Arc<OwnedFd>>)>,
    ) -> io::Result<()> {
        let encode = |(event, files)| Ok::<_, io::Error>((wire::encode(event)?, files));
        let first = first.map(encode).transpose()?;
        let mut queue = self.lock();
        queue.leave();
        queue.peer = Some(socket);
        queue.events.extend(first);
        queue.flush();
        Ok(())
    }

    /// Drops what waits and closes this end of the socket.
    pub fn detach(&self) {
        self.lock().leave();
    }

    /// Sends an event with its files, or keeps it for later. False if the event is
    /// lost and its files are closed, because no supervisor is attached or it is too
    /// far behind.
    pub fn send(&self, event: &Event, files: Vec<OwnedFd>) -> bool {
        let Ok(bytes) = wire::encode(event) else {
            return false;
        };
        self.put(&mut self.lock(), bytes, files)
    }

    fn put(&self, queue: &mut Queue, bytes: Vec<u8>, files: Vec<OwnedFd>) -> bool {
        if queue.peer.is_none() || queue.complete || queue.events.len() >= MAX_WAITING {
            return false;
        }
        let files = files.into_iter().map(Arc::new).collect();
        queue.events.push_back((bytes, files));
        queue.flush();
        if !queue.events.is_empty() {
            // A full counter means that the main thread is awake already.
            let _ = self.0.wake.write(1);
        }
        queue.peer.is_some()
    }

    /// A number for the dial `id` of the attached supervisor.
    pub fn dial(&self, id: u64) -> u64 {
        let mut queue = self.lock();
        queue.next_dial += 1;
        let number = queue.next_dial;
        queue.dials.insert(number, id);
        number
    }

    /// Sends [`Event::Dialed`] for a number of [`Outbox::dial`], unless the
    /// supervisor has left that wanted to know.
    pub fn dialed(&self, number: u64, outcome: DialOutcome) -> bool {
        let mut queue = self.lock();
        let Some(id) = queue.dials.remove(&number) else {
            return false;
        };
        let event = wire::encode(&Event::Dialed { id, outcome });
        event.is_ok_and(|bytes| self.put(&mut queue, bytes, vec![]))
    }

    /// Sends the last event and all that wait before it, however many, for at most
    /// `limit`. Of several threads that end the process the first decides.
    pub fn finish(&self, last: &Event, limit: Duration) {
        if let Ok(bytes) = wire::encode(last) {
            let mut queue = self.lock();
            if queue.peer.is_some() && !queue.complete {
                queue.events.push_back((bytes, vec![]));
            }
            queue.complete = true;
        }
        self.drain(limit);
    }

    /// Whether events wait.
    pub(super) fn is_behind(&self) -> bool {
        !self.lock().events.is_empty()
    }

    /// Whether events wait only for space in the socket.
    pub(super) fn wants_space(&self) -> bool {
        let queue = self.lock();
        !queue.events.is_empty() && !queue.refused
    }

    /// Sends what the socket takes now.
    pub(super) fn flush(&self) {
        self.lock().flush();
    }

    /// Sends everything, for at most `limit`.
    fn drain(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        loop {
            self.flush();
            let left = deadline.saturating_duration_since(Instant::now());
            let peer = self.lock().peer.clone();
            let Some(peer) = peer.filter(|_| self.is_behind() && !left.is_zero()) else {
                return;
            };
            let (interest, time) = if self.wants_space() {
                (PollFlags::POLLOUT, left)
            } else {
                (PollFlags::empty(), left.min(RETRY))
            };
            let mut fds = [PollFd::new(peer.as_fd(), interest)];
            let time = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
            // An interrupted wait is tried again until the deadline.
            let _ = poll(&mut fds, time);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn leave(&mut self) {
        self.peer = None;
        self.events.clear();
        self.dials.clear();
        self.refused = false;
    }

    fn flush(&mut self) {
        if let Some(peer) = self.peer.clone() {
            self.flush_by(|bytes, files| wire::send_bytes(peer.as_fd(), bytes, files));
        }
    }

    fn flush_by(&mut self, send: impl Fn(&[u8], &[BorrowedFd<'_>]) -> io::Result<()>) {
        self.refused = false;
        while let Some((bytes, files)) = self.events.front() {
            let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
            match send(bytes, &files) {
                Ok(()) => {
                    self.events.pop_front();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Too many of our descriptors are in flight (`ETOOMANYREFS`) or the
                // kernel is short of memory: a later try may succeed.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::ENOBUFS | libc::ENOMEM | libc::ETOOMANYREFS)
                    ) =>
                {
                    self.refused = true;
                    return;
                }
                // The supervisor closed its socket. The main thread reads its last
                // commands and the end of the stream.
                Err(_) => self.leave(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::control::ExitReason;

    fn outbox() -> (Outbox, OwnedFd, EventFd) {
        let wake = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let outbox = Outbox::new(wake.try_clone().unwrap());
        let theirs = supervisor(&outbox);
        (outbox, theirs, wake)
    }

    fn supervisor(outbox: &Outbox) -> OwnedFd {
        let (ours, theirs) = wire::pair().unwrap();
        wire::set_nonblocking(&ours).unwrap();
        outbox.attach(Arc::new(ours), None).unwrap();
        theirs
    }

    const OPENED: Event = Event::Opened {
        port: 1,
        source_port: 1,
    };

    #[test]
    fn every_event_reaches_a_supervisor_that_reads_late() {
        let (outbox, theirs, wake) = outbox();
        let mut taken = 0;
        while outbox.send(&Event::Pong { id: taken }, vec![]) {
            taken += 1;
        }
        assert!(outbox.is_behind());
        assert!(wake.read().is_ok());
        assert!(taken > MAX_WAITING as u64 && taken < 100_000);
        for id in 0..taken {
            let (event, _) = wire::recv::<Event>(theirs.as_fd()).unwrap().unwrap();
            assert_eq!(event, Event::Pong { id });
            outbox.flush();
        }
        assert!(!outbox.is_behind());
    }

    #[test]
    fn files_of_a_lost_event_are_closed() {
        let (outbox, theirs, _wake) = outbox();
        while outbox.send(&OPENED, vec![]) {}
        let (ours, guest) = wire::pair().unwrap();
        assert!(!outbox.send(&OPENED, vec![ours]));
        assert!(wire::recv::<Event>(guest.as_fd()).unwrap().is_none());

        drop(theirs);
        // Another test's child may hold a copy until it runs its program.
        outbox.drain(Duration::from_secs(20));
        assert!(!outbox.is_behind());
        assert!(!outbox.send(&OPENED, vec![]));
    }

    #[test]
    fn nothing_is_kept_while_no_supervisor_is_attached() {
        let (outbox, theirs, _wake) = outbox();
        while outbox.send(&Event::Pong { id: 0 }, vec![]) {}
        let (waiting, first) = wire::pair().unwrap();
        wire::recv::<Event>(theirs.as_fd()).unwrap().unwrap();
        while !outbox.send(&OPENED, vec![waiting.try_clone().unwrap()]) {
            wire::recv::<Event>(theirs.as_fd()).unwrap().unwrap();
            outbox.flush();
        }
        drop(waiting);
        outbox.detach();
        assert!(!outbox.is_behind());
        assert!(wire::recv::<Event>(first.as_fd()).unwrap().is_none());
        assert!(!outbox.send(&Event::Pong { id: 1 }, vec![]));
        let theirs = supervisor(&outbox);
        assert!(outbox.send(&Event::Pong { id: 2 }, vec![]));
        let (event, _) = wire::recv::<Event>(theirs.as_fd()).unwrap().unwrap();
        assert_eq!(event, Event::Pong { id: 2 });
    }

    #[test]
    fn a_dial_is_answered_only_to_the_supervisor_that_asked() {
        let (outbox, _theirs, _wake) = outbox();
        let before = outbox.dial(7);
        let theirs = supervisor(&outbox);
        let after = outbox.dial(7);
        assert!(!outbox.dialed(before, DialOutcome::Connected));
        assert!(outbox.dialed(after, DialOutcome::Refused));
        assert!(!outbox.dialed(after, DialOutcome::Refused));
        let (event, _) = wire::recv::<Event>(theirs.as_fd()).unwrap().unwrap();
        let outcome = DialOutcome::Refused;
        assert_eq!(event, Event::Dialed { id: 7, outcome });
    }

    #[test]
    fn a_packet_that_the_kernel_refused_is_tried_again() {
        let (outbox, theirs, _wake) = outbox();
        while outbox.send(&Event::Pong { id: 0 }, vec![]) {}
        assert!(outbox.wants_space());
        let refuse =
            |_: &[u8], _: &[BorrowedFd<'_>]| Err(io::Error::from_raw_os_error(libc::ETOOMANYREFS));
        outbox.lock().flush_by(refuse);
        assert!(outbox.is_behind() && !outbox.wants_space());
        outbox.flush();
        assert!(outbox.wants_space());
        while outbox.is_behind() {
            wire::recv::<Event>(theirs.as_fd()).unwrap().unwrap();
            outbox.flush();
        }
        assert!(!outbox.wants_space());
    }

    #[test]
    fn the_last_event_is_sent_although_the_queue_is_full() {
        let (outbox, theirs, _wake) = outbox();
        while outbox.send(&Event::Pong { id: 0 }, vec![]) {}
        outbox.finish(&Event::Exited(ExitReason::PowerOff), Duration::ZERO);
        outbox.finish(&Event::Exited(ExitReason::Stopped), Duration::ZERO);
        assert!(!outbox.send(&Event::Pong { id: 1 }, vec![]));
        let reader = std::thread::spawn(move || {
            let mut received = Vec::new();
            while let Ok(Some((event, _))) = wire::recv::<Event>(theirs.as_fd()) {
                received.push(event);
            }
            received
        });
        outbox.drain(Duration::from_secs(20));
        drop(outbox);
        let received = reader.join().unwrap();
        let (last, others) = received.split_last().unwrap();
        assert_eq!(*last, Event::Exited(ExitReason::PowerOff));
        assert!(others.iter().all(|event| *event == Event::Pong { id: 0 }));
    }

    #[test]
    fn draining_waits_for_a_slow_supervisor_until_the_limit() {
        let (outbox, theirs, _wake) = outbox();
        while outbox.send(&Event::Pong { id: 0 }, vec![]) {}
        outbox.drain(Duration::from_millis(20));
        assert!(outbox.is_behind());
        let reader = std::thread::spawn(move || {
            let mut count = 0;
            while let Ok(Some(_)) = wire::recv::<Event>(theirs.as_fd()) {
                count += 1;
            }
            count
        });
        outbox.drain(Duration::from_secs(20));
        assert!(!outbox.is_behind());
        drop(outbox);
        assert!(reader.join().unwrap() > MAX_WAITING);
    }
}
