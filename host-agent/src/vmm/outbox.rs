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
use super::wire;

/// Most events kept. A guest can cause one for each connection it opens, and
/// each may hold a descriptor; a supervisor so far behind has lost its guest.
const MOST_WAITING: usize = 256;

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
    closed: bool,
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
        if waiting.closed || waiting.events.len() >= MOST_WAITING {
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

    /// Whether events wait for room in the socket.
    pub fn is_behind(&self) -> bool {
        !self.lock().events.is_empty()
    }

    /// Sends what the socket takes now.
    pub fn flush(&self) {
        self.lock().flush(&self.0.socket);
    }

    /// Sends everything, for at most `limit`.
    pub fn drain(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        loop {
            self.flush();
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.is_behind() || left.is_zero() {
                return;
            }
            let mut fds = [PollFd::new(self.socket(), PollFlags::POLLOUT)];
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            // An interrupted wait is tried again until the deadline.
            let _ = poll(&mut fds, left);
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
        while let Some((bytes, files)) = self.events.front() {
            let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            match wire::send_bytes(socket.as_fd(), bytes, &files) {
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
