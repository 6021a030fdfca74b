//! Pauses and stops vCPU threads before they enter the guest.

use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

const RUN: u8 = 0;
const PAUSE: u8 = 1;
const STOP: u8 = 2;

/// What the vCPUs of a guest shall do; at first they run.
#[derive(Debug, Default)]
pub struct VcpuPause {
    /// Written under `lock`, so that no wait misses a change; a running vCPU reads
    /// it without the lock.
    wanted: AtomicU8,
    paused: AtomicUsize,
    changed: Condvar,
    lock: Mutex<()>,
}

impl VcpuPause {
    /// Threads wait until [`VcpuPause::resume`].
    pub fn paused_at_start() -> Self {
        Self {
            wanted: AtomicU8::new(PAUSE),
            ..Self::default()
        }
    }

    /// Makes threads wait in [`VcpuPause::enter`].
    pub fn pause(&self) {
        self.set(PAUSE);
    }

    /// Lets threads continue.
    pub fn resume(&self) {
        self.set(RUN);
    }

    /// Makes threads end.
    pub fn stop(&self) {
        self.set(STOP);
    }

    /// Number of threads that wait.
    pub fn paused(&self) -> usize {
        self.paused.load(Ordering::Acquire)
    }

    fn set(&self, wanted: u8) {
        let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.wanted.store(wanted, Ordering::Release);
        self.changed.notify_all();
    }

    /// Called before each entry into the guest. Calls `on_pause` and waits while
    /// the vCPUs are paused. False if the thread must end.
    pub fn enter(&self, on_pause: impl Fn()) -> bool {
        // One load per decision: `wanted` may change between two loads.
        loop {
            match self.wanted.load(Ordering::Acquire) {
                RUN => return true,
                STOP => return false,
                _ => {
                    on_pause();
                    self.wait();
                }
            }
        }
    }

    fn wait(&self) {
        let guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.paused.fetch_add(1, Ordering::AcqRel);
        let paused = |(): &mut ()| self.wanted.load(Ordering::Acquire) == PAUSE;
        let _guard = self
            .changed
            .wait_while(guard, paused)
            .unwrap_or_else(PoisonError::into_inner);
        self.paused.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpus_survive_quick_pauses_and_end_only_when_stopped() {
        let pause = VcpuPause::default();
        let stopped = AtomicU8::new(0);
        std::thread::scope(|scope| {
            let vcpus = [(); 2].map(|()| {
                scope.spawn(|| {
                    while pause.enter(|| {}) {}
                    stopped.load(Ordering::Acquire)
                })
            });
            let ended = || vcpus.iter().any(|thread| thread.is_finished());
            for round in 0..50_000 {
                pause.pause();
                // In some rounds until both threads wait.
                while round % 100 == 0 && pause.paused() < 2 && !ended() {
                    std::thread::yield_now();
                }
                pause.resume();
            }
            stopped.store(1, Ordering::Release);
            pause.pause();
            pause.stop();
            for thread in vcpus {
                assert_eq!(thread.join().unwrap(), 1);
            }
        });
        assert_eq!(pause.paused(), 0);
    }
}
