//! virtio over MMIO: what a device is, and what it is given while active.
//!
//! A device has two halves. The *front* ([`Device`]) answers the transport on
//! a vCPU thread: identity, features, configuration space. The *back* is a
//! thread of the device that owns the queues from [`Device::activate`] until
//! [`Device::reset`] takes them away again, so no queue is ever behind a lock.

pub mod blk;
pub mod interrupt;
pub mod mmio;
pub mod queue;
pub mod rng;
#[cfg(test)]
pub(crate) mod test_driver;
pub mod vsock;

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use interrupt::Interrupt;

/// Everything that moves into a device when its driver is ready.
#[derive(Debug)]
pub struct Activation {
    /// Guest RAM.
    pub memory: GuestMemoryMmap,
    /// Feature bits that the driver accepted.
    pub features: u64,
    /// The queues, checked and ready, with the eventfd that KVM signals when
    /// the driver kicks them.
    pub queues: Vec<ActiveQueue>,
    /// How the device raises its interrupt.
    pub interrupt: Interrupt,
}

/// One queue in the hands of a device.
#[derive(Debug)]
pub struct ActiveQueue {
    /// The ring.
    pub queue: Queue,
    /// Signalled by the driver's kick (ioeventfd). The transport signals it
    /// once after activation, so that an early kick is not lost.
    pub kick: EventFd,
}

/// Why a device cannot be activated; it is marked as needing reset.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver set up another number of queues.
    #[error("device has {expected} queues, the driver set up {actual}")]
    QueueCount {
        /// Queues of the device.
        expected: usize,
        /// Queues that came.
        actual: usize,
    },
    /// The host could not provide what the device needs.
    #[error("host resource: {what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The device's thread is gone.
    #[error("the device's thread ended")]
    ThreadGone,
}

/// The front half of a device. Called on vCPU threads, under the transport's
/// lock; nothing here may wait for the guest, and only [`Device::reset`] for the
/// host.
pub trait Device: Send {
    /// Device id (virtio 1.2, section 5).
    fn id(&self) -> u32;

    /// Name for logs and events: `blk-0`, `vsock`, `rng`.
    fn name(&self) -> &str;

    /// Feature bits offered, without `VIRTIO_F_VERSION_1`, which the transport
    /// adds. Neither indirect descriptors nor packed rings are offered.
    fn features(&self) -> u64;

    /// Largest size of each queue.
    fn queue_sizes(&self) -> &[u16];

    /// Device configuration space (little-endian); what is beyond it reads 0.
    fn config(&self) -> &[u8];

    /// The driver is ready: take the queues.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// The driver resets the device: stop using guest memory before returning,
    /// whatever is in flight. That can be a system call on a disk of the host,
    /// which nothing cuts short. Idempotent.
    fn reset(&mut self);
}

/// A borrowed descriptor of an eventfd, whose type predates I/O safety.
#[allow(unsafe_code)]
pub fn borrow_event(event: &EventFd) -> std::os::fd::BorrowedFd<'_> {
    use std::os::fd::{AsRawFd, BorrowedFd};
    // SAFETY: the eventfd stays open for as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
