//! Events on their way to the supervisor: none is worth a thread that waits.
//!
//! The control socket does not block. What it cannot take now is kept, in
//! order and within a bound, and sent by the main thread when there is room.
//! So a supervisor that is stopped or slow stalls neither a device nor the
//! main loop.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;

use super::control::Event;
use super::virtio::borrow_event;
use super::wire;

/// How often the main thread has a look at everything, in milliseconds.
const LOOK_MS: u16 = 500;
/// Most events kept. A guest can cause one for each connection it opens, and
/// each may hold a descriptor; a supervisor so far behind has lost its guest.
const MOST_WAITING: usize = 256;
/// Time until a message that the kernel refused is tried again at the end.
const AGAIN: Duration = Duration::from_millis(20);

/// Where every thread puts its events. Clones share one queue.
#[derive(Debug, Clone)]
pub struct Outbox(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    socket: OwnedFd,
    waiting: Mutex<Waiting>,
    /// Tells the main thread that there is something to flush.
    wake: EventFd,
}

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    /// The other end is gone.
    closed: bool,
    /// The last event is there: none may follow.
    complete: bool,
    /// The kernel would not have the first event, though the socket may have
    /// room: that there is room says nothing.
    refused: bool,
}

impl Outbox {
    /// Takes over sending on `socket`, which no longer blocks from here on.
    pub fn new(socket: OwnedFd, wake: EventFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL)?);
        fcntl(&socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self(Arc::new(Shared {
            socket,
            waiting: Mutex::default(),
            wake,
        })))
    }

    /// The socket, to poll and to receive.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.0.socket.as_fd()
    }

    /// Sends an event with its files, or keeps it for later. False when it is
    /// lost, and its files closed: the supervisor is gone or too far behind.
    pub fn send(&self, event: &Event, files: Vec<OwnedFd>) -> bool {
        let Ok(bytes) = wire::encode(event) else {
            return false;
        };
        let mut waiting = self.lock();
        if waiting.closed || waiting.complete || waiting.events.len() >= MOST_WAITING {
            return false;
        }
        waiting.events.push_back((bytes, files));
        waiting.flush(&self.0.socket);
        if !waiting.events.is_empty() {
            // A full counter means that the main thread is awake already.
            let _ = self.0.wake.write(1);
        }
        !waiting.closed
    }

    /// Sends the last event and all that wait before it, however many, for at
    /// most `limit`. Of several threads that end the process the first has the
    /// word.
    pub fn finish(&self, last: &Event, limit: Duration) {
        if let Ok(bytes) = wire::encode(last) {
            let mut waiting = self.lock();
            if !waiting.closed && !waiting.complete {
                waiting.complete = true;
                waiting.events.push_back((bytes, vec![]));
            }
        }
        self.drain(limit);
    }

    /// Whether events wait.
    pub(super) fn is_behind(&self) -> bool {
        !self.lock().events.is_empty()
    }

    /// Whether events wait for room in the socket, and for nothing else.
    fn wants_room(&self) -> bool {
        let waiting = self.lock();
        !waiting.events.is_empty() && !waiting.refused
    }

    /// Waits for a command, if there is a supervisor, for a wake-up, and for no
    /// longer than until the next look; which of the two came. Sends events that
    /// had to wait as soon as there is room.
    pub fn wait(&self, wake: &EventFd, supervised: bool) -> nix::Result<(bool, bool)> {
        let mut fds = vec![PollFd::new(borrow_event(wake), PollFlags::POLLIN)];
        if supervised {
            let mut interest = PollFlags::POLLIN;
            interest.set(PollFlags::POLLOUT, self.wants_room());
            fds.push(PollFd::new(self.socket(), interest));
        }
        match poll(&mut fds, PollTimeout::from(LOOK_MS)) {
            Err(nix::errno::Errno::EINTR) => Ok((false, false)),
            Err(errno) => Err(errno),
            Ok(_) => {
                let got = |fd: &PollFd<'_>| fd.revents().unwrap_or(PollFlags::empty());
                let control = fds.get(1).map_or(PollFlags::empty(), got);
                // Not only when the socket has room: the kernel may have refused
                // them for other reasons, and tells nobody when those are gone.
                self.flush();
                // The end of the stream and errors count as readable.
                let command = !(control - PollFlags::POLLOUT).is_empty();
                Ok((command, !got(&fds[0]).is_empty()))
            }
        }
    }

    /// Sends what the socket takes now.
    pub(super) fn flush(&self) {
        self.lock().flush(&self.0.socket);
    }

    /// Sends everything, for at most `limit`.
    fn drain(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        loop {
            self.flush();
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.is_behind() || left.is_zero() {
                return;
            }
            let (interest, time) = if self.wants_room() {
                (PollFlags::POLLOUT, left)
            } else {
                (PollFlags::empty(), left.min(AGAIN))
            };
            let mut fds = [PollFd::new(self.socket(), interest)];
            let time = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
            // An interrupted wait is tried again until the deadline.
            let _ = poll(&mut fds, time);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn flush(&mut self, socket: &OwnedFd) {
        self.flush_by(|bytes, files| wire::send_bytes(socket.as_fd(), bytes, files));
    }

    fn flush_by(&mut self, send: impl Fn(&[u8], &[BorrowedFd<'_>]) -> io::Result<()>) {
        self.refused = false;
        while let Some((bytes, files)) = self.events.front() {
            let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            match send(bytes, &files) {
                Ok(()) => {
                    self.events.pop_front();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Too many of our descriptors are in flight (`ETOOMANYREFS`)
                // or the kernel is short of memory: room comes back.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::ENOBUFS | libc::ENOMEM | libc::ETOOMANYREFS)
                    ) =>
                {
                    self.refused = true;
                    return;
                }
                Err(_) => {
                    self.closed = true;
                    self.events.clear();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::control::ExitReason;

    fn outbox() -> (Outbox, OwnedFd, EventFd) {
        let (ours, theirs) = wire::pair().unwrap();
        let wake = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let outbox = Outbox::new(ours, wake.try_clone().unwrap()).unwrap();
        (outbox, theirs, wake)
    }

    #[test]
    fn a_supervisor_that_does_not_read_stops_nobody_and_finds_all_that_was_taken() {
        let (outbox, theirs, wake) = outbox();
        let mut taken = 0;
        while outbox.send(&Event::Pong { id: taken }, vec![]) {
            taken += 1;
        }
        assert!(outbox.is_behind());
        assert!(wake.read().is_ok());
        assert!(taken > MOST_WAITING as u64 && taken < 100_000);
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
        let opened = Event::Opened {
            port: 1,
            source_port: 1,
        };
        while outbox.send(&opened, vec![]) {}
        let (ours, guest) = wire::pair().unwrap();
        assert!(!outbox.send(&opened, vec![ours]));
        assert!(wire::recv::<Event>(guest.as_fd()).unwrap().is_none());

        drop(theirs);
        // Another test's child may hold a copy until it runs its program.
        outbox.drain(Duration::from_secs(20));
        assert!(!outbox.is_behind());
        assert!(!outbox.send(&opened, vec![]));
    }

    #[test]
    fn what_the_kernel_refuses_waits_and_asks_for_no_room_meanwhile() {
        let (outbox, theirs, _wake) = outbox();
        while outbox.send(&Event::Pong { id: 0 }, vec![]) {}
        assert!(outbox.wants_room());
        let refuse =
            |_: &[u8], _: &[BorrowedFd<'_>]| Err(io::Error::from_raw_os_error(libc::ETOOMANYREFS));
        outbox.lock().flush_by(refuse);
        assert!(outbox.is_behind() && !outbox.wants_room());
        // It is tried again whenever there is an occasion.
        outbox.flush();
        assert!(outbox.wants_room());
        while outbox.is_behind() {
            wire::recv::<Event>(theirs.as_fd()).unwrap().unwrap();
            outbox.flush();
        }
        assert!(!outbox.wants_room());
    }

    #[test]
    fn the_last_word_is_sent_though_no_more_is_taken_and_nothing_follows_it() {
        let (outbox, theirs, _wake) = outbox();
        while outbox.send(&Event::Pong { id: 0 }, vec![]) {}
        outbox.finish(&Event::Exited(ExitReason::PowerOff), Duration::ZERO);
        outbox.finish(&Event::Exited(ExitReason::Stopped), Duration::ZERO);
        assert!(!outbox.send(&Event::Pong { id: 1 }, vec![]));
        let reader = std::thread::spawn(move || {
            let mut heard = Vec::new();
            while let Ok(Some((event, _))) = wire::recv::<Event>(theirs.as_fd()) {
                heard.push(event);
            }
            heard
        });
        outbox.drain(Duration::from_secs(20));
        drop(outbox);
        let heard = reader.join().unwrap();
        let (last, others) = heard.split_last().unwrap();
        assert_eq!(*last, Event::Exited(ExitReason::PowerOff));
        assert!(others.iter().all(|event| *event == Event::Pong { id: 0 }));
    }

    #[test]
    fn draining_waits_for_a_slow_supervisor_and_not_for_a_stopped_one() {
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
        assert!(reader.join().unwrap() > MOST_WAITING);
    }
}
