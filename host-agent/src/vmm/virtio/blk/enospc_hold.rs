//! The state of a disk whose writes are held while the host has no free space
//! (`ENOSPC`, `EDQUOT`), shared by its worker and the main thread.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// Why a write is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortage {
    /// Bytes of the held request. The file can need more, for its metadata.
    pub needed: u32,
    /// Whether a quota is used up (`EDQUOT`) and not the file system.
    pub quota: bool,
}

/// Whether a write is held, and whether writes may be held.
#[derive(Debug)]
pub struct EnospcHold {
    shortage: Mutex<Option<Shortage>>,
    fail_when_full: AtomicBool,
    /// Wakes the main thread.
    changed: EventFd,
    /// Wakes the worker.
    wake: EventFd,
}

impl EnospcHold {
    /// `changed` is signalled when a hold begins or ends, `wake` by
    /// [`Self::fail_when_full`].
    pub const fn new(changed: EventFd, wake: EventFd) -> Self {
        Self {
            shortage: Mutex::new(None),
            fail_when_full: AtomicBool::new(false),
            changed,
            wake,
        }
    }

    /// Why a write is held now, if one is.
    pub fn shortage(&self) -> Option<Shortage> {
        *self.lock()
    }

    /// From now on `ENOSPC` fails a write instead of holding it.
    pub fn fail_when_full(&self) {
        self.fail_when_full.store(true, Ordering::Release);
        // Fails only on a full counter: the worker is about to wake up.
        let _ = self.wake.write(1);
    }

    pub(super) fn fails_when_full(&self) -> bool {
        self.fail_when_full.load(Ordering::Acquire)
    }

    /// Holds a request of `needed` bytes because of `error`.
    pub(in crate::vmm) fn begin(&self, needed: u32, error: &io::Error) {
        let quota = error.kind() == io::ErrorKind::QuotaExceeded;
        self.set(Some(Shortage { needed, quota }));
    }

    /// Ends the hold.
    pub(in crate::vmm) fn end(&self) {
        self.set(None);
    }

    fn set(&self, shortage: Option<Shortage>) {
        let before = std::mem::replace(&mut *self.lock(), shortage);
        if before.is_some() != shortage.is_some() {
            self.notify();
        }
    }

    /// Wakes the main thread, which looks at the state of all disks.
    pub(super) fn notify(&self) {
        // Fails only on a full counter: the main thread is about to wake up.
        let _ = self.changed.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, Option<Shortage>> {
        self.shortage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
