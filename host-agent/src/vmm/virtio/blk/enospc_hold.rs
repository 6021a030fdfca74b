//! A disk that waits until the host has room for a write: what its thread and
//! the main thread know of each other.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// What a disk waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortage {
    /// Bytes of the request that is held. What the file takes for it can be more.
    pub needed: u32,
    /// A quota is used up, not the file system.
    pub quota: bool,
}

/// Whether a disk waits, and whether it may.
#[derive(Debug)]
pub struct EnospcHold {
    shortage: Mutex<Option<Shortage>>,
    fail: AtomicBool,
    /// Wakes the main thread.
    changed: EventFd,
    /// Wakes the disk's thread.
    wake: EventFd,
}

impl EnospcHold {
    /// `changed` is signalled when a wait begins or ends, `wake` when it is
    /// given up.
    pub const fn new(changed: EventFd, wake: EventFd) -> Self {
        Self {
            shortage: Mutex::new(None),
            fail: AtomicBool::new(false),
            changed,
            wake,
        }
    }

    /// What the disk waits for, if it does.
    pub fn shortage(&self) -> Option<Shortage> {
        *self.lock()
    }

    /// From here on nothing waits: a write without room fails.
    pub fn fail_when_full(&self) {
        self.fail.store(true, Ordering::Release);
        // A full counter means that the thread is awake already.
        let _ = self.wake.write(1);
    }

    pub(super) fn fails_when_full(&self) -> bool {
        self.fail.load(Ordering::Acquire)
    }

    /// A request that needs `needed` bytes is held because of `error`.
    pub(in crate::vmm) fn begin(&self, needed: u32, error: &io::Error) {
        let quota = error.kind() == io::ErrorKind::QuotaExceeded;
        self.set(Some(Shortage { needed, quota }));
    }

    /// Nothing is held any more.
    pub(in crate::vmm) fn end(&self) {
        self.set(None);
    }

    fn set(&self, shortage: Option<Shortage>) {
        let before = std::mem::replace(&mut *self.lock(), shortage);
        if before.is_some() != shortage.is_some() {
            // A full counter means that the main thread is awake already.
            let _ = self.changed.write(1);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Shortage>> {
        self.shortage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
