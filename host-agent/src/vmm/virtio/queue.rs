//! Descriptor chains of a split virtqueue (virtio 1.2, 2.7), validated once.
//!
//! The guest can change a ring at any time. [`CheckedQueue::pop`] therefore copies
//! each descriptor once, follows at most queue-size of them and refuses what the
//! specification forbids: every [`Chain`] is finite, lies in guest RAM and has its
//! readable buffers first. [`CheckedQueue::push_used`] takes the chain by value, so
//! a chain cannot be returned twice.

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

/// A violation of the ring protocol by the driver. The device then sets
/// `DEVICE_NEEDS_RESET` and stops using the queue.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// More new chains than the ring has entries.
    #[error("available index is {pending} ahead in a queue of {size}")]
    AvailJump {
        /// Distance to the device's index.
        pending: u16,
        /// Queue size.
        size: u16,
    },
    /// The driver offers more chains while the device holds a full ring of them.
    #[error("more than {size} chains in flight")]
    TooManyInFlight {
        /// Queue size.
        size: u16,
    },
    /// A head or `next` field outside the descriptor table.
    #[error("descriptor index {index} in a queue of {size}")]
    Index {
        /// The index.
        index: u16,
        /// Queue size.
        size: u16,
    },
    /// The chain at `head` loops: it has more descriptors than the table.
    #[error("chain {head} has more descriptors than the queue")]
    Endless {
        /// First descriptor of the chain.
        head: u16,
    },
    /// An indirect descriptor: `VIRTIO_F_INDIRECT_DESC` is not offered.
    #[error("chain {head} has an indirect descriptor")]
    Indirect {
        /// First descriptor of the chain.
        head: u16,
    },
    /// A buffer that does not lie in one region of guest RAM.
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
    /// The ring itself cannot be read or written.
    #[error("ring is not accessible")]
    Ring(#[from] virtio_queue::Error),
}

/// A non-empty buffer of a chain; it lies in one region of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Guest physical address.
    pub addr: GuestAddress,
    /// Length in bytes.
    pub len: u32,
}

/// A validated chain. Return it with [`CheckedQueue::push_used`]; only a reset
/// may drop a chain.
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
    /// The device-readable buffers.
    pub fn readable(&self) -> &[Range] {
        &self.ranges[..self.readable]
    }

    /// The device-writable buffers.
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

    /// Copies the readable bytes from `offset` on into `buf`; returns their
    /// number, less than `buf.len()` at the end of the chain.
    pub fn read_at(&self, memory: &GuestMemoryMmap, offset: u32, buf: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in slices(memory, self.readable(), offset, buf.len()) {
            done += slice.copy_to(&mut buf[done..]);
        }
        done
    }

    /// Copies `buf` to the writable bytes from `offset` on; returns how many
    /// bytes fitted.
    pub fn write_at(&self, memory: &GuestMemoryMmap, offset: u32, buf: &[u8]) -> usize {
        let mut done = 0;
        for slice in slices(memory, self.writable(), offset, buf.len()) {
            let part = &buf[done..done + slice.len()];
            slice.copy_from(part);
            done += part.len();
        }
        done
    }

    /// At most `len` readable bytes from `offset` on, without a copy.
    pub fn readable_slices<'m>(
        &self,
        memory: &'m GuestMemoryMmap,
        offset: u32,
        len: usize,
    ) -> impl Iterator<Item = VolatileSlice<'m>> {
        slices(memory, self.readable(), offset, len)
    }

    /// At most `len` writable bytes from `offset` on, without a copy.
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
        // Cannot fail: `walk` checked the range, and RAM never shrinks.
        let addr = GuestAddress(range.addr.0 + start as u64);
        memory.get_slice(addr, count).ok()
    })
}

/// A virtqueue of an active device, owned by its worker.
#[derive(Debug)]
pub struct CheckedQueue {
    queue: Queue,
    kick: EventFd,
    memory: GuestMemoryMmap,
    /// Chains taken and not yet returned; at most the queue size.
    in_flight: u16,
    /// Range lists of returned chains, reused so that a busy queue allocates nothing.
    spare: Vec<Vec<Range>>,
}

impl CheckedQueue {
    /// Takes over a queue. `features` are those that the driver accepted.
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

    /// Guest RAM.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The ioeventfd of the queue.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// The next available chain, if there is one.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let size = self.queue.size();
        let available = self.queue.avail_idx(&self.memory, Ordering::Acquire)?;
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
        let head = self.load_avail(slot)?;
        let chain = self.walk(head)?;
        self.queue.set_next_avail((next + Wrapping(1)).0);
        self.in_flight += 1;
        Ok(Some(chain))
    }

    /// Loads two bytes of the available ring, at `offset` from its start.
    fn load_avail(&self, offset: u64) -> Result<u16, QueueError> {
        let at = GuestAddress(self.queue.avail_ring() + offset);
        let value = self.memory.load(at, Ordering::Relaxed);
        Ok(u16::from_le(
            value.map_err(virtio_queue::Error::GuestMemory)?,
        ))
    }

    /// Copies and checks the chain at `head`.
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
                .map_err(virtio_queue::Error::GuestMemory)?;
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
            // A buffer of length 0 is valid and carries nothing.
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

    /// Returns a chain; its first `written` writable bytes were filled.
    pub fn push_used(&mut self, chain: Chain, written: u32) -> Result<(), QueueError> {
        debug_assert!(written <= chain.writable_len);
        self.queue.add_used(&self.memory, chain.head, written)?;
        self.in_flight = self.in_flight.saturating_sub(1);
        if self.spare.len() < usize::from(self.queue.size()) {
            self.spare.push(chain.ranges);
        }
        Ok(())
    }

    /// Whether the driver wants an interrupt for the chains returned since the
    /// last call (virtio 1.2, 2.7.7.2).
    pub fn notify_needed(&mut self) -> Result<bool, QueueError> {
        let wanted = self.queue.needs_notification(&self.memory)?;
        if !wanted || self.queue.event_idx_enabled() {
            return Ok(wanted);
        }
        let flags = self.load_avail(0)?;
        Ok(flags & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
    }

    /// Asks the driver not to kick, while the worker polls the ring.
    pub fn disable_kicks(&mut self) -> Result<(), QueueError> {
        Ok(self.queue.disable_notification(&self.memory)?)
    }

    /// Asks the driver to kick for the next chain. `true` if a chain became
    /// available in the meantime, for which the driver may not kick.
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        Ok(self.queue.enable_notification(&self.memory)?)
    }
}

/// `VIRTIO_F_EVENT_IDX` (virtio 1.2, 2.7.10), which [`CheckedQueue`] implements.
pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

#[cfg(test)]
mod tests;
