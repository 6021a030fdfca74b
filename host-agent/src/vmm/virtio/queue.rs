//! Chains of a split ring, checked once when taken and returned exactly once.
//!
//! Everything in a ring is the guest's word. [`CheckedQueue::pop`] copies each
//! descriptor once, walks at most queue-size of them, and refuses what the
//! specification forbids, so that a [`Chain`] in hand lies in guest RAM, is
//! finite and has its readable part first. [`CheckedQueue::push_used`] takes
//! the chain by value: it cannot be returned twice.

use std::num::Wrapping;
use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use super::ActiveQueue;

/// Size of a descriptor in bytes (virtio 1.2, 2.7.5).
const DESCRIPTOR: u64 = 16;
/// Bytes before the first entry of the available ring (virtio 1.2, 2.7.6).
const AVAIL_HEADER: u64 = 4;

/// A violation of the ring protocol by the driver. The device that meets one
/// marks itself as needing reset and stops using the queue.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// More new chains than the ring can hold.
    #[error("available index is {pending} ahead in a queue of {size}")]
    AvailJump {
        /// How far ahead.
        pending: u16,
        /// Queue size.
        size: u16,
    },
    /// The driver offers chains while it has not got back earlier ones.
    #[error("more than {size} chains in flight")]
    TooManyInFlight {
        /// Queue size.
        size: u16,
    },
    /// A head or `next` field beyond the descriptor table.
    #[error("descriptor index {index} in a queue of {size}")]
    Index {
        /// The index.
        index: u16,
        /// Queue size.
        size: u16,
    },
    /// The chain at `head` goes on after queue-size descriptors: it loops.
    #[error("chain {head} has more descriptors than the queue")]
    Endless {
        /// First descriptor of the chain.
        head: u16,
    },
    /// An indirect descriptor, which was never offered.
    #[error("chain {head} has an indirect descriptor")]
    Indirect {
        /// First descriptor of the chain.
        head: u16,
    },
    /// A buffer outside of guest RAM.
    #[error("chain {head} has a buffer of {len} bytes at {addr:#x}, outside of RAM")]
    OutsideRam {
        /// First descriptor of the chain.
        head: u16,
        /// Guest physical address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// A readable buffer after a writable one (virtio 1.2, 2.7.4.2).
    #[error("chain {head} has a readable buffer after a writable one")]
    ReadableAfterWritable {
        /// First descriptor of the chain.
        head: u16,
    },
    /// The lengths of a chain add up to more than `u32::MAX` (virtio 1.2, 2.7.5).
    #[error("chain {head} is longer than 4 GiB")]
    TooLong {
        /// First descriptor of the chain.
        head: u16,
    },
    /// The ring itself could not be read or written.
    #[error("ring is not accessible")]
    Ring(#[source] virtio_queue::Error),
}

/// A part of a chain: a range that lies in one region of guest RAM. Never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Guest physical address.
    pub addr: GuestAddress,
    /// Length in bytes.
    pub len: u32,
}

/// A checked chain. Give it back with [`CheckedQueue::push_used`]; a chain that
/// is dropped never returns to the driver, which is right only at reset.
#[derive(Debug)]
#[must_use = "the driver waits for the chain"]
pub struct Chain {
    head: u16,
    ranges: Vec<Range>,
    readable: usize,
    readable_len: u32,
    writable_len: u32,
}

impl Chain {
    /// What the driver wrote for the device.
    pub fn readable(&self) -> &[Range] {
        &self.ranges[..self.readable]
    }

    /// Where the driver wants an answer.
    pub fn writable(&self) -> &[Range] {
        &self.ranges[self.readable..]
    }

    /// Bytes in [`Chain::readable`].
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Bytes in [`Chain::writable`].
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    /// Copies the readable bytes from `offset` on into `buf`; returns how many
    /// there were, less than asked at the end of the chain.
    pub fn read_at(&self, memory: &GuestMemoryMmap, offset: u32, buf: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in slices(memory, self.readable(), offset, buf.len()) {
            done += slice.copy_to(&mut buf[done..]);
        }
        done
    }

    /// Copies `buf` to the writable bytes from `offset` on; returns how many
    /// fitted.
    pub fn write_at(&self, memory: &GuestMemoryMmap, offset: u32, buf: &[u8]) -> usize {
        let mut done = 0;
        for slice in slices(memory, self.writable(), offset, buf.len()) {
            let part = &buf[done..done + slice.len()];
            slice.copy_from(part);
            done += part.len();
        }
        done
    }

    /// At most `len` readable bytes from `offset` on, in place.
    pub fn readable_slices<'m>(
        &self,
        memory: &'m GuestMemoryMmap,
        offset: u32,
        len: usize,
    ) -> impl Iterator<Item = VolatileSlice<'m>> {
        slices(memory, self.readable(), offset, len)
    }

    /// At most `len` writable bytes from `offset` on, in place.
    pub fn writable_slices<'m>(
        &self,
        memory: &'m GuestMemoryMmap,
        offset: u32,
        len: usize,
    ) -> impl Iterator<Item = VolatileSlice<'m>> {
        slices(memory, self.writable(), offset, len)
    }
}

fn slices<'m>(
    memory: &'m GuestMemoryMmap,
    ranges: &[Range],
    offset: u32,
    len: usize,
) -> impl Iterator<Item = VolatileSlice<'m>> {
    let mut skip = offset as usize;
    let mut left = len;
    ranges.iter().filter_map(move |range| {
        let start = skip.min(range.len as usize);
        skip -= start;
        let count = (range.len as usize - start).min(left);
        left -= count;
        if count == 0 {
            return None;
        }
        // The range was checked when the chain was taken, and RAM never
        // shrinks: this cannot fail.
        let addr = GuestAddress(range.addr.0 + start as u64);
        memory.get_slice(addr, count).ok()
    })
}

/// A queue in the hands of a device's thread.
#[derive(Debug)]
pub struct CheckedQueue {
    queue: Queue,
    kick: EventFd,
    memory: GuestMemoryMmap,
    /// Chains taken and not yet returned; never more than the queue's size.
    in_flight: u16,
    /// Range lists of returned chains, so that a busy queue allocates nothing.
    spare: Vec<Vec<Range>>,
}

impl CheckedQueue {
    /// Takes over a queue. `features` are those that the driver accepted; the
    /// device must have offered [`EVENT_IDX`] for it to be used.
    pub fn new(active: ActiveQueue, memory: GuestMemoryMmap, features: u64) -> Self {
        let ActiveQueue { mut queue, kick } = active;
        queue.set_event_idx(features & EVENT_IDX != 0);
        Self {
            queue,
            kick,
            memory,
            in_flight: 0,
            spare: Vec::new(),
        }
    }

    /// Guest RAM, for the chains of this queue.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Signalled by the driver's kick; for the device's event loop.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// The next chain, or `None` if the driver has offered all there is.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let size = self.queue.size();
        let available = self
            .queue
            .avail_idx(&self.memory, Ordering::Acquire)
            .map_err(QueueError::Ring)?;
        let next = Wrapping(self.queue.next_avail());
        let pending = (available - next).0;
        if pending == 0 {
            return Ok(None);
        }
        if pending > size {
            return Err(QueueError::AvailJump { pending, size });
        }
        if self.in_flight >= size {
            return Err(QueueError::TooManyInFlight { size });
        }
        let slot = AVAIL_HEADER + 2 * u64::from(next.0 % size);
        let head = self
            .memory
            .load::<u16>(
                GuestAddress(self.queue.avail_ring() + slot),
                Ordering::Relaxed,
            )
            .map_err(|error| QueueError::Ring(virtio_queue::Error::GuestMemory(error)))?;
        let chain = self.walk(u16::from_le(head))?;
        self.queue.set_next_avail((next + Wrapping(1)).0);
        self.in_flight += 1;
        Ok(Some(chain))
    }

    fn walk(&mut self, head: u16) -> Result<Chain, QueueError> {
        let size = self.queue.size();
        let mut chain = Chain {
            head,
            ranges: self.spare.pop().unwrap_or_default(),
            readable: 0,
            readable_len: 0,
            writable_len: 0,
        };
        chain.ranges.clear();
        let mut total = 0_u32;
        let mut index = head;
        let mut writing = false;
        for _ in 0..size {
            if index >= size {
                return Err(QueueError::Index { index, size });
            }
            let at = GuestAddress(self.queue.desc_table() + DESCRIPTOR * u64::from(index));
            let descriptor: Descriptor = self
                .memory
                .read_obj(at)
                .map_err(|error| QueueError::Ring(virtio_queue::Error::GuestMemory(error)))?;
            if descriptor.refers_to_indirect_table() {
                return Err(QueueError::Indirect { head });
            }
            let (addr, len) = (descriptor.addr(), descriptor.len());
            total = total.checked_add(len).ok_or(QueueError::TooLong { head })?;
            if descriptor.is_write_only() {
                writing = true;
                chain.writable_len += len;
            } else if writing {
                return Err(QueueError::ReadableAfterWritable { head });
            } else {
                chain.readable_len += len;
            }
            // Empty buffers are allowed anywhere and carry nothing.
            if len > 0 {
                if self.memory.get_slice(addr, len as usize).is_err() {
                    return Err(QueueError::OutsideRam {
                        head,
                        addr: addr.0,
                        len,
                    });
                }
                chain.ranges.push(Range { addr, len });
                if !writing {
                    chain.readable += 1;
                }
            }
            if !descriptor.has_next() {
                return Ok(chain);
            }
            index = descriptor.next();
        }
        Err(QueueError::Endless { head })
    }

    /// Returns a chain of which the first `written` writable bytes were filled.
    pub fn push_used(&mut self, chain: Chain, written: u32) -> Result<(), QueueError> {
        debug_assert!(written <= chain.writable_len);
        self.queue
            .add_used(&self.memory, chain.head, written)
            .map_err(QueueError::Ring)?;
        self.in_flight = self.in_flight.saturating_sub(1);
        if self.spare.len() < usize::from(self.queue.size()) {
            self.spare.push(chain.ranges);
        }
        Ok(())
    }

    /// Whether the driver wants an interrupt for the chains returned since the
    /// last call.
    pub fn notify_needed(&mut self) -> Result<bool, QueueError> {
        let wanted = self
            .queue
            .needs_notification(&self.memory)
            .map_err(QueueError::Ring)?;
        if !wanted || self.queue.event_idx_enabled() {
            return Ok(wanted);
        }
        let flags = self
            .memory
            .load::<u16>(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(|error| QueueError::Ring(virtio_queue::Error::GuestMemory(error)))?;
        Ok(u16::from_le(flags) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
    }

    /// Asks the driver not to kick: the device is about to look anyway.
    pub fn disable_kicks(&mut self) -> Result<(), QueueError> {
        self.queue
            .disable_notification(&self.memory)
            .map_err(QueueError::Ring)
    }

    /// Asks the driver to kick for the next chain. `true` if one came in the
    /// meantime, for which no kick may follow.
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        self.queue
            .enable_notification(&self.memory)
            .map_err(QueueError::Ring)
    }
}

/// `VIRTIO_F_EVENT_IDX`: a device that works its queues through
/// [`CheckedQueue`] may offer it.
pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

#[cfg(test)]
mod tests;
