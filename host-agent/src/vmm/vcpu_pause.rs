//! The pause that a processor's thread passes each time before it enters the
//! guest: open, closed for a pause, or shut down.

use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

const RUN: u8 = 0;
const PAUSE: u8 = 1;
const STOP: u8 = 2;

/// One pause for all processors of a guest; open at first.
#[derive(Debug, Default)]
pub struct VcpuPause {
    /// Changes under the lock; read without it by threads that go through.
    wanted: AtomicU8,
    parked: AtomicUsize,
    changed: Condvar,
    lock: Mutex<()>,
}

impl VcpuPause {
    /// Threads park here until the pause is opened.
    pub fn close(&self) {
        self.set(PAUSE);
    }

    /// Threads go through.
    pub fn open(&self) {
        self.set(RUN);
    }

    /// Threads end, for good.
    pub fn shut_down(&self) {
        self.set(STOP);
    }

    /// Threads that are parked.
    pub fn parked(&self) -> usize {
        self.parked.load(Ordering::Acquire)
    }

    fn set(&self, wanted: u8) {
        let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.wanted.store(wanted, Ordering::Release);
        self.changed.notify_all();
    }

    /// Waits while the pause is closed, `before` each wait with a word to the
    /// processor. False when the thread shall end.
    pub fn pass(&self, before: impl Fn()) -> bool {
        // Each decision is made of one look: what is wanted may change between
        // two.
        loop {
            match self.wanted.load(Ordering::Acquire) {
                RUN => return true,
                STOP => return false,
                _ => {
                    before();
                    self.park();
                }
            }
        }
    }

    fn park(&self) {
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.parked.fetch_add(1, Ordering::AcqRel);
        while self.wanted.load(Ordering::Acquire) == PAUSE {
            guard = self
                .changed
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.parked.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_passes_while_the_gate_opens_and_closes_ends_only_when_told() {
        let pause = VcpuPause::default();
        let told = AtomicU8::new(0);
        std::thread::scope(|scope| {
            let processors = [(); 2].map(|()| {
                scope.spawn(|| {
                    while pause.pass(|| {}) {}
                    told.load(Ordering::Acquire)
                })
            });
            let ended = || processors.iter().any(|thread| thread.is_finished());
            for round in 0..50_000 {
                pause.close();
                // Now and then for long enough that both park.
                while round % 100 == 0 && pause.parked() < 2 && !ended() {
                    std::thread::yield_now();
                }
                pause.open();
            }
            told.store(1, Ordering::Release);
            pause.close();
            pause.shut_down();
            for thread in processors {
                assert_eq!(thread.join().unwrap(), 1);
            }
        });
        assert_eq!(pause.parked(), 0);
    }
}
