//! A device's interrupt: its status bits, its irqfd, and the record of violations
//! by the driver.

use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vmbus::text::chain;
use vmm_sys_util::eventfd::EventFd;

use crate::token_bucket::{LogLimit, VMM_LOG};

/// Used buffer notification (virtio 1.2, 4.2.2, `InterruptStatus` bit 0).
pub const USED_BUFFER: u32 = 1;
/// Configuration change notification (virtio 1.2, 4.2.2, bit 1).
pub const CONFIG_CHANGE: u32 = 2;

/// Shared by the transport, which reads and acknowledges the status bits, and
/// the worker, which sets them.
#[derive(Debug, Clone)]
pub struct Interrupt(Arc<InterruptState>);

#[derive(Debug)]
struct InterruptState {
    line: EventFd,
    /// Wakes the main thread.
    wake: EventFd,
    status: AtomicU32,
    needs_reset: AtomicBool,
    violations: AtomicU64,
    name: String,
    last: Mutex<LastViolation>,
}

/// The last violation, and the rate limit of their log lines.
#[derive(Debug)]
struct LastViolation {
    reason: String,
    log: LogLimit<Instant>,
}

impl Interrupt {
    /// The interrupt of the device `name`; `line` is its irqfd, and `wake` is
    /// signalled by the first violation. A guest can cause any number of others.
    pub fn new(line: EventFd, name: &str, wake: EventFd) -> Self {
        Self(Arc::new(InterruptState {
            line,
            wake,
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            violations: AtomicU64::new(0),
            name: name.to_owned(),
            last: Mutex::new(LastViolation {
                reason: String::new(),
                log: LogLimit::new(VMM_LOG),
            }),
        }))
    }

    /// Name of the device.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Sends a used buffer notification.
    pub fn used(&self) {
        self.raise(USED_BUFFER);
    }

    /// Sets `DEVICE_NEEDS_RESET` until the driver resets the device, counts the
    /// violation and logs it at a limited rate.
    pub fn needs_reset(&self, why: &(dyn Error + 'static)) {
        let reason = chain(why);
        let mut last = self.last_violation();
        if let Some(suppressed) = last.log.allow(Instant::now()) {
            let device = &self.0.name;
            tracing::warn!(device, reason, suppressed, "device needs a reset");
        }
        last.reason = reason;
        drop(last);
        if self.0.violations.fetch_add(1, Ordering::Release) == 0 {
            // Fails only on a full counter: the main thread is about to wake up.
            let _ = self.0.wake.write(1);
        }
        self.0.needs_reset.store(true, Ordering::Release);
        self.raise(CONFIG_CHANGE);
    }

    /// Whether [`Interrupt::needs_reset`] was called since the last reset.
    pub fn is_broken(&self) -> bool {
        self.0.needs_reset.load(Ordering::Acquire)
    }

    /// Violations since the device was created; a reset does not clear the count.
    pub fn violations(&self) -> u64 {
        self.0.violations.load(Ordering::Acquire)
    }

    /// The last violation; empty if there was none.
    pub fn reason(&self) -> String {
        self.last_violation().reason.clone()
    }

    fn last_violation(&self) -> MutexGuard<'_, LastViolation> {
        self.0.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The value of the register `InterruptStatus`.
    pub fn status(&self) -> u32 {
        self.0.status.load(Ordering::Acquire)
    }

    /// Clears `bits`: the driver wrote them to `InterruptACK`.
    pub fn acknowledge(&self, bits: u32) {
        self.0.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Restores the state after power-on, except for the record of violations.
    pub fn reset(&self) {
        self.0.status.store(0, Ordering::Release);
        self.0.needs_reset.store(false, Ordering::Release);
    }

    fn raise(&self, bit: u32) {
        self.0.status.fetch_or(bit, Ordering::AcqRel);
        // The write fails only on a full counter, and then an interrupt is
        // pending already.
        let _ = self.0.line.write(1);
    }
}
