//! A device's interrupt: status bits that the driver reads, the irqfd, and what
//! is known of a driver that broke the rules.

use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vmbus::text::chain;
use vmm_sys_util::eventfd::EventFd;

use crate::token_bucket::{LogLimit, VMM_LOG};

/// Used buffer notification (virtio 1.2, 4.2.2, InterruptStatus bit 0).
pub const USED_BUFFER: u32 = 1;
/// Configuration change notification (bit 1).
pub const CONFIG_CHANGE: u32 = 2;

/// Shared by the transport (which reads and acknowledges) and the device's
/// thread (which raises).
#[derive(Debug, Clone)]
pub struct Interrupt(Arc<InterruptState>);

#[derive(Debug)]
struct InterruptState {
    line: EventFd,
    status: AtomicU32,
    needs_reset: AtomicBool,
    violations: AtomicU64,
    name: String,
    last: Mutex<LastViolation>,
}

/// The last violation, and how often they are logged.
#[derive(Debug)]
struct LastViolation {
    reason: String,
    log: LogLimit<Instant>,
}

impl Interrupt {
    /// An interrupt of the device `name` that KVM injects when `line` is
    /// signalled.
    pub fn new(line: EventFd, name: &str) -> Self {
        Self(Arc::new(InterruptState {
            line,
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

    /// Tells the driver that buffers were used.
    pub fn used(&self) {
        self.raise(USED_BUFFER);
    }

    /// Marks the device as broken until the driver resets it; counts the
    /// violation and logs it at a limited rate. The transport shows
    /// `DEVICE_NEEDS_RESET` in its status.
    pub fn needs_reset(&self, why: &(dyn Error + 'static)) {
        let reason = chain(why);
        let mut broken = self.broken();
        if let Some(suppressed) = broken.log.allow(Instant::now()) {
            let device = &self.0.name;
            tracing::warn!(device, reason, suppressed, "device needs a reset");
        }
        broken.reason = reason;
        drop(broken);
        self.0.violations.fetch_add(1, Ordering::Release);
        self.0.needs_reset.store(true, Ordering::Release);
        self.raise(CONFIG_CHANGE);
    }

    /// Whether [`Interrupt::needs_reset`] was called since the last reset.
    pub fn is_broken(&self) -> bool {
        self.0.needs_reset.load(Ordering::Acquire)
    }

    /// Violations since the device was made; a reset does not clear them.
    pub fn violations(&self) -> u64 {
        self.0.violations.load(Ordering::Acquire)
    }

    /// What the last violation was; empty if there was none.
    pub fn reason(&self) -> String {
        self.broken().reason.clone()
    }

    fn broken(&self) -> MutexGuard<'_, LastViolation> {
        self.0.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The status bits, for the transport.
    pub fn status(&self) -> u32 {
        self.0.status.load(Ordering::Acquire)
    }

    /// The driver handled `bits`.
    pub fn acknowledge(&self, bits: u32) {
        self.0.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Back to the state after power-on, but for the count of violations.
    pub fn reset(&self) {
        self.0.status.store(0, Ordering::Release);
        self.0.needs_reset.store(false, Ordering::Release);
    }

    fn raise(&self, bit: u32) {
        self.0.status.fetch_or(bit, Ordering::AcqRel);
        // The counter of a non-blocking eventfd can only be full when an
        // interrupt is already pending.
        let _ = self.0.line.write(1);
    }
}
