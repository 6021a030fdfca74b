//! The end of a guest: its machine stops on a thread of its own, which may wait
//! for the host's disks, while the main thread goes on answering pings.

use std::io;
use std::sync::mpsc::{self, SendError, TryRecvError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::control::{Command, DialOutcome, Event};
use super::outbox::Outbox;
use super::wire;

/// Does `work` on `what` and waits for it, for at most `limit`; whether it was
/// done. A supervisor that is there hears meanwhile that this process is not
/// hung; it has no other say any more but to kill it.
pub fn run_answering<T: Send + 'static>(
    what: T,
    work: fn(T),
    limit: Duration,
    (outbox, wake): (&Outbox, &EventFd),
    mut supervised: bool,
) -> bool {
    let deadline = Instant::now() + limit;
    let (give, given) = mpsc::channel();
    let (working, done) = mpsc::channel::<()>();
    let waker = wake.try_clone();
    // Without a thread nobody takes what is given.
    let _ = std::thread::Builder::new()
        .name("ending".into())
        .spawn(move || {
            if let Ok(what) = given.recv() {
                work(what);
            }
            drop(working);
            if let Ok(waker) = waker {
                // A full counter means that the main thread is awake already.
                let _ = waker.write(1);
            }
        });
    if let Err(SendError(what)) = give.send(what) {
        work(what);
        return true;
    }
    while done.try_recv() != Err(TryRecvError::Disconnected) {
        if Instant::now() >= deadline {
            return false;
        }
        match outbox.wait(wake, supervised) {
            Ok((command, woken)) => {
                if woken {
                    // Reset of a counter that may already be zero.
                    let _ = wake.read();
                }
                if command {
                    supervised = answer(outbox);
                }
            }
            // Nothing can be waited for but the end of the work.
            Err(_) => return done.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Disconnected),
        }
    }
    true
}

/// Answers one command; false when there will be no more.
fn answer(outbox: &Outbox) -> bool {
    match wire::recv::<Command>(outbox.socket()) {
        Ok(Some((Command::Ping { id }, _))) => {
            outbox.send(&Event::Pong { id }, vec![]);
            true
        }
        // The guest is gone: whoever asks for a connection need not wait.
        Ok(Some((Command::Dial { id, .. } | Command::Probe { id, .. }, _))) => {
            let outcome = DialOutcome::Unavailable;
            outbox.send(&Event::Dialed { id, outcome }, vec![]);
            true
        }
        Ok(Some(_)) => true,
        Ok(None) => false,
        Err(error) => matches!(
            error.kind(),
            io::ErrorKind::WouldBlock | io::ErrorKind::InvalidData
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use super::*;

    /// Longest time that a test waits.
    const PATIENCE: Duration = Duration::from_secs(20);

    fn control() -> (Outbox, EventFd, OwnedFd) {
        let (ours, theirs) = wire::pair().unwrap();
        let wake = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let outbox = Outbox::new(ours, wake.try_clone().unwrap()).unwrap();
        (outbox, wake, theirs)
    }

    #[test]
    fn pings_are_answered_while_a_disk_takes_its_time() {
        let (outbox, wake, theirs) = control();
        let (flushed, disk) = mpsc::channel::<()>();
        let supervisor = std::thread::spawn(move || {
            for command in [
                Command::Stats {},
                Command::Ping { id: 1 },
                Command::Ping { id: 2 },
            ] {
                wire::send(theirs.as_fd(), &command, &[]).unwrap();
            }
            for expected in 1..=2 {
                let (event, _) = wire::recv::<Event>(theirs.as_fd()).unwrap().unwrap();
                assert_eq!(event, Event::Pong { id: expected });
            }
            // Gone, and the disk goes on.
            drop(theirs);
            flushed.send(()).unwrap();
        });
        let flush = |disk: mpsc::Receiver<()>| disk.recv_timeout(PATIENCE).unwrap();
        assert!(run_answering(disk, flush, PATIENCE, (&outbox, &wake), true));
        supervisor.join().unwrap();
    }

    #[test]
    fn a_disk_that_stands_still_is_not_waited_for_longer_than_the_limit() {
        let (outbox, wake, _theirs) = control();
        let (flushed, disk) = mpsc::channel::<()>();
        let flush = |disk: mpsc::Receiver<()>| assert!(disk.recv().is_err());
        let limit = Duration::from_millis(1);
        assert!(!run_answering(disk, flush, limit, (&outbox, &wake), true));
        drop(flushed);
    }
}
