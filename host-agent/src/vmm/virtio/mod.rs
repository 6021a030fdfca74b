//! virtio over MMIO: the interface between a device and its transport.
//!
//! A device has two halves. The *front* ([`Device`]) answers the transport on
//! a vCPU thread. The *worker* is a thread of the device that owns the queues
//! from [`Device::activate`] until [`Device::reset`], so no queue needs a lock.

pub mod blk;
pub mod interrupt;
pub mod mmio;
pub mod queue;
pub mod rng;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod test_driver;
pub mod vsock;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use interrupt::Interrupt;
use queue::CheckedQueue;

/// What a device gets when the driver sets `DRIVER_OK`.
#[derive(Debug)]
pub struct Activation {
    /// Guest RAM.
    pub memory: GuestMemoryMmap,
    /// Feature bits that the driver accepted.
    pub features: u64,
    /// The queues, ready and with valid ring addresses.
    pub queues: Vec<ActiveQueue>,
    /// The device's interrupt.
    pub interrupt: Interrupt,
}

impl Activation {
    /// The queues of a device that has `N` of them.
    pub fn checked_queues<const N: usize>(self) -> Result<[CheckedQueue; N], ActivateError> {
        let queues = <[ActiveQueue; N]>::try_from(self.queues).map_err(|queues| {
            ActivateError::QueueCount {
                expected: N,
                actual: queues.len(),
            }
        })?;
        Ok(queues.map(|queue| CheckedQueue::new(queue, self.memory.clone(), self.features)))
    }
}

/// One queue of an active device.
#[derive(Debug)]
pub struct ActiveQueue {
    /// The ring.
    pub queue: Queue,
    /// The ioeventfd that KVM signals on a write to `QueueNotify`. The transport
    /// signals it once after activation, so that an early kick is not lost.
    pub kick: EventFd,
}

/// Why a device cannot be activated. The transport then sets
/// `DEVICE_NEEDS_RESET`.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver set up a different number of queues.
    #[error("device has {expected} queues, the driver set up {actual}")]
    QueueCount {
        /// Queues of the device.
        expected: usize,
        /// Queues that the driver set up.
        actual: usize,
    },
    /// The host could not provide a resource.
    #[error("host resource: {what}")]
    Host {
        /// The resource.
        what: &'static str,
        /// Why the host refused it.
        #[source]
        source: io::Error,
    },
    /// The worker has exited.
    #[error("the device's thread ended")]
    ThreadGone,
}

/// The constant properties of a device.
#[derive(Debug)]
pub struct Identity {
    /// Device id (virtio 1.2, section 5).
    pub id: u32,
    /// Name for logs and events: `blk-0`, `vsock`, `rng`.
    pub name: String,
    /// Feature bits offered, without `VIRTIO_F_VERSION_1`, which the transport
    /// adds. Neither indirect descriptors nor packed rings are offered.
    pub features: u64,
    /// Largest size of each queue.
    pub queue_sizes: &'static [u16],
    /// Device configuration space, little-endian. Bytes beyond it read as 0.
    pub config: Vec<u8>,
}

/// The front of a device. The transport calls it on vCPU threads under its
/// lock, so no method waits for the guest, and only [`Device::reset`] waits for
/// the host.
pub trait Device: Send {
    /// Its constant properties.
    fn identity(&self) -> &Identity;

    /// Its name.
    fn name(&self) -> &str {
        &self.identity().name
    }

    /// Takes the queues: the driver set `DRIVER_OK`.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops every access to guest memory before it returns. It waits for a
    /// system call in progress on a disk of the host, which cannot be
    /// interrupted. Idempotent.
    fn reset(&mut self);
}

/// A new eventfd that does not block.
pub fn new_event() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

/// The borrowed descriptor of an eventfd; [`EventFd`] does not implement `AsFd`.
#[allow(unsafe_code)]
pub fn borrow_event(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd stays open for as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
