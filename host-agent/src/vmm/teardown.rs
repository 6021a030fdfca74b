//! Work that may wait for the host's disks, on a thread of its own, while the main
//! thread goes on serving the control socket.

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError, SendError, TryRecvError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

/// Does `work` on `what` for at most `limit`, and calls `serve` until then; whether
/// the work was done. `serve` waits for events and for `wake`.
pub fn run_while<T: Send + 'static>(
    what: T,
    work: fn(T),
    wake: io::Result<EventFd>,
    mut serve: impl FnMut() -> io::Result<()>,
    limit: Duration,
) -> bool {
    let deadline = Instant::now() + limit;
    let (give, given) = mpsc::channel();
    let (working, done) = mpsc::channel::<()>();
    // If the spawn fails, the send below fails and the work runs inline.
    let _ = std::thread::Builder::new()
        .name("teardown".into())
        .spawn(move || {
            if let Ok(what) = given.recv() {
                work(what);
            }
            drop(working);
            if let Ok(wake) = wake {
                // A full counter means that the main thread is awake already.
                let _ = wake.write(1);
            }
        });
    if let Err(SendError(what)) = give.send(what) {
        work(what);
        return true;
    }
    while done.try_recv() != Err(TryRecvError::Disconnected) {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        if serve().is_err() {
            // Nothing but the end of the work can be waited for.
            return done.recv_timeout(left) == Err(RecvTimeoutError::Disconnected);
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no_wake() -> io::Result<EventFd> {
        Err(io::ErrorKind::Unsupported.into())
    }

    #[test]
    fn serving_goes_on_while_the_work_waits_for_a_disk() {
        let (flushed, disk) = mpsc::channel::<()>();
        let flush = |disk: mpsc::Receiver<()>| disk.recv().unwrap();
        let mut served = 0;
        let serve = || {
            served += 1;
            if served == 3 {
                flushed.send(()).unwrap();
            }
            Ok(())
        };
        let limit = Duration::from_secs(20);
        assert!(run_while(disk, flush, no_wake(), serve, limit));
        assert!(served >= 3);
    }

    #[test]
    fn work_that_hangs_is_given_up_at_the_limit() {
        for broken in [false, true] {
            let (flushed, disk) = mpsc::channel::<()>();
            let flush = |disk: mpsc::Receiver<()>| assert!(disk.recv().is_err());
            let broken = broken.then_some(io::ErrorKind::Other);
            let serve = || broken.map_or(Ok(()), |kind| Err(kind.into()));
            let limit = Duration::from_millis(1);
            assert!(!run_while(disk, flush, no_wake(), serve, limit));
            drop(flushed);
        }
    }
}
