//! Work that may wait for the host's disks, on a thread of its own, while the main
//! thread goes on serving the control socket.

use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SendError, Sender, TryRecvError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::sandbox::{self, ThreadClass};

/// A thread that waits for its work. It is started before there is work: the main
/// thread's filter allows no new thread while a guest runs.
#[derive(Debug)]
pub struct Teardown<T> {
    give: Sender<T>,
    /// Disconnected when the work is done.
    done: Receiver<()>,
    work: fn(T),
}

impl<T: Send + 'static> Teardown<T> {
    /// Starts the thread. It signals `wake` when the work is done.
    pub fn start(work: fn(T), wake: EventFd) -> io::Result<Self> {
        let (give, given) = mpsc::channel();
        let (working, done) = mpsc::channel::<()>();
        sandbox::spawn(ThreadClass::Teardown, "teardown", move || {
            if let Ok(what) = given.recv() {
                work(what);
            }
            drop(working);
            // A full counter means that the main thread is awake already.
            let _ = wake.write(1);
        })?;
        Ok(Self { give, done, work })
    }

    /// Does the work on `what` for at most `limit`, and calls `serve` until then;
    /// whether the work was done. `serve` waits for events and for the wake-up.
    pub fn run_while(
        self,
        what: T,
        mut serve: impl FnMut() -> io::Result<()>,
        limit: Duration,
    ) -> bool {
        let deadline = Instant::now() + limit;
        // Fails only if the thread is gone.
        if let Err(SendError(what)) = self.give.send(what) {
            (self.work)(what);
            return true;
        }
        while self.done.try_recv() != Err(TryRecvError::Disconnected) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            if serve().is_err() {
                // Nothing but the end of the work can be waited for.
                return self.done.recv_timeout(left) == Err(RecvTimeoutError::Disconnected);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start<T: Send + 'static>(work: fn(T)) -> Teardown<T> {
        Teardown::start(work, EventFd::new(0).unwrap()).unwrap()
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
        assert!(start(flush).run_while(disk, serve, limit));
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
            assert!(!start(flush).run_while(disk, serve, limit));
            drop(flushed);
        }
    }
}
