//! The end of a guest: a thread stops the machine, which may wait for the host's
//! disks, while the main thread answers pings.

use std::io;
use std::sync::mpsc::{self, SendError, TryRecvError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::control::{Command, DialOutcome, Event};
use super::outbox::Outbox;
use super::wire;

/// Does `work` on `target` in a thread and waits for it for at most `limit`.
/// Meanwhile the supervisor, if there is one, learns by answered pings that this
/// process does not hang. False if the work is not done.
pub fn run_answering<T: Send + 'static>(
    target: T,
    work: fn(T),
    limit: Duration,
    (outbox, wake): (&Outbox, &EventFd),
    mut supervised: bool,
) -> bool {
    let deadline = Instant::now() + limit;
    let (give, given) = mpsc::channel();
    let (working, done) = mpsc::channel::<()>();
    let waker = wake.try_clone();
    // If the spawn fails, the `send` below fails and the work runs here.
    let _ = std::thread::Builder::new()
        .name("teardown".into())
        .spawn(move || {
            if let Ok(target) = given.recv() {
                work(target);
            }
            drop(working);
            if let Ok(waker) = waker {
                // Fails only if the counter is full: the main thread is awake.
                let _ = waker.write(1);
            }
        });
    if let Err(SendError(target)) = give.send(target) {
        work(target);
        return true;
    }
    while done.try_recv() != Err(TryRecvError::Disconnected) {
        if Instant::now() >= deadline {
            return false;
        }
        match outbox.wait(wake, supervised) {
            Ok((command, woken)) => {
                if woken {
                    // Fails if the counter is already 0.
                    let _ = wake.read();
                }
                if command {
                    supervised = answer(outbox);
                }
            }
            // `poll` failed: only wait for the work.
            Err(_) => return done.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Disconnected),
        }
    }
    true
}

/// Answers one command. False if there are no more: the socket is closed.
fn answer(outbox: &Outbox) -> bool {
    match wire::recv::<Command>(outbox.socket()) {
        Ok(Some((Command::Ping { id }, _))) => {
            outbox.send(&Event::Pong { id }, vec![]);
            true
        }
        // The guest is stopped, so it accepts no connection.
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
    fn pings_are_answered_while_a_disk_is_slow() {
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
            // The disk is flushed after the supervisor has gone.
            drop(theirs);
            flushed.send(()).unwrap();
        });
        let flush = |disk: mpsc::Receiver<()>| disk.recv_timeout(PATIENCE).unwrap();
        assert!(run_answering(disk, flush, PATIENCE, (&outbox, &wake), true));
        supervisor.join().unwrap();
    }

    #[test]
    fn a_stalled_disk_is_waited_for_up_to_the_limit() {
        let (outbox, wake, _theirs) = control();
        let (flushed, disk) = mpsc::channel::<()>();
        let flush = |disk: mpsc::Receiver<()>| assert!(disk.recv().is_err());
        let limit = Duration::from_millis(1);
        assert!(!run_answering(disk, flush, limit, (&outbox, &wake), true));
        drop(flushed);
    }
}
