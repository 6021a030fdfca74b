//! The three queues of an active vsock device (virtio 1.2, 5.10.2).

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};

use vm_memory::GuestMemoryMmap;

use super::packet::{HEADER_SIZE, Header, MAX_PAYLOAD};
use crate::vmm::virtio::interrupt::Interrupt;
use crate::vmm::virtio::queue::{Chain, CheckedQueue, QueueError};
use crate::vmm::virtio::{ActivateError, Activation};

/// Queues of the device (virtio 1.2, 5.10.2): receive, transmit, event.
pub const QUEUES: usize = 3;

/// Most receive buffers that one turn of a connection fills.
const MAX_BATCH: usize = 32;

/// Most receive buffers without space for payload that are returned at a time, so
/// that a guest which offers no others does not keep the worker busy.
const MAX_TOO_SMALL: usize = 256;

/// The queues, and the receive buffers that were taken in advance.
#[derive(Debug)]
pub struct Rings {
    rx: CheckedQueue,
    tx: CheckedQueue,
    events: CheckedQueue,
    interrupt: Interrupt,
    buffers: VecDeque<Chain>,
    /// The receive queue is empty; the driver kicks when it adds a buffer.
    rx_empty: bool,
    /// The transmit queue may contain packets.
    pub tx_pending: bool,
    returned_rx: bool,
    returned_tx: bool,
}

/// Payload bytes that fit into a receive buffer.
fn payload_capacity(chain: &Chain) -> u32 {
    chain
        .writable_len()
        .saturating_sub(HEADER_SIZE as u32)
        .min(MAX_PAYLOAD)
}

impl Rings {
    /// Takes over the queues.
    pub fn new(activation: Activation) -> Result<Self, ActivateError> {
        let interrupt = activation.interrupt.clone();
        let [rx, tx, events] = activation.checked_queues()?;
        Ok(Self {
            rx,
            tx,
            events,
            interrupt,
            buffers: VecDeque::new(),
            rx_empty: false,
            tx_pending: true,
            returned_rx: false,
            returned_tx: false,
        })
    }

    /// The ioeventfds of the queues: receive, transmit, event.
    pub fn kicks(&self) -> [RawFd; QUEUES] {
        [&self.rx, &self.tx, &self.events].map(|queue| queue.kick().as_raw_fd())
    }

    /// The driver added receive buffers.
    pub fn rx_kicked(&mut self) -> Result<(), QueueError> {
        let _ = self.rx.kick().read();
        self.rx_empty = false;
        self.rx.disable_kicks()
    }

    /// The driver sent packets.
    pub fn tx_kicked(&mut self) -> Result<(), QueueError> {
        let _ = self.tx.kick().read();
        self.tx_pending = true;
        self.tx.disable_kicks()
    }

    /// The driver added event buffers. The device sends no event: the only one
    /// reports a migration (virtio 1.2, 5.10.6.7).
    pub fn events_kicked(&mut self) {
        let _ = self.events.kick().read();
    }

    /// The next packet of the guest, to be returned with [`Self::return_packet`].
    pub fn next_packet(&mut self) -> Result<Option<Chain>, QueueError> {
        if let Some(chain) = self.tx.pop()? {
            return Ok(Some(chain));
        }
        if self.tx.enable_kicks()? {
            self.tx.disable_kicks()?;
            return self.tx.pop();
        }
        self.tx_pending = false;
        Ok(None)
    }

    /// Returns a packet of the guest.
    pub fn return_packet(&mut self, chain: Chain) -> Result<(), QueueError> {
        self.returned_tx = true;
        self.tx.push_used(chain, 0)
    }

    /// Guest RAM.
    pub fn memory(&self) -> &GuestMemoryMmap {
        self.tx.memory()
    }

    /// Whether the receive queue is empty.
    pub fn is_rx_empty(&self) -> bool {
        self.rx_empty
    }

    /// Takes receive buffers in advance, for `len` bytes of payload or up to
    /// [`MAX_BATCH`]. Returns `false` if there is none.
    pub fn reserve(&mut self, len: u32) -> Result<bool, QueueError> {
        let mut reserved: u32 = self.buffers.iter().map(payload_capacity).sum();
        let mut too_small = 0;
        while self.buffers.len() < MAX_BATCH && (reserved < len || self.buffers.is_empty()) {
            let Some(chain) = self.pop_buffer()? else {
                break;
            };
            if payload_capacity(&chain) == 0 {
                self.returned_rx = true;
                self.rx.push_used(chain, 0)?;
                too_small += 1;
                if too_small == MAX_TOO_SMALL {
                    break;
                }
                continue;
            }
            reserved += payload_capacity(&chain);
            self.buffers.push_back(chain);
        }
        Ok(!self.buffers.is_empty())
    }

    fn pop_buffer(&mut self) -> Result<Option<Chain>, QueueError> {
        if self.rx_empty {
            return Ok(None);
        }
        if let Some(chain) = self.rx.pop()? {
            return Ok(Some(chain));
        }
        // Ask for a kick only when no reserved buffer is left.
        if !self.buffers.is_empty() {
            return Ok(None);
        }
        if self.rx.enable_kicks()? {
            self.rx.disable_kicks()?;
            return self.rx.pop();
        }
        self.rx_empty = true;
        Ok(None)
    }

    /// The payload ranges of the reserved buffers, at most `len` bytes.
    pub fn payload_slices(&self, len: u32) -> impl Iterator<Item = vm_memory::VolatileSlice<'_>> {
        let mut left = len;
        self.buffers.iter().flat_map(move |chain| {
            let part = payload_capacity(chain).min(left);
            left -= part;
            chain.writable_slices(self.rx.memory(), HEADER_SIZE as u32, part as usize)
        })
    }

    /// Payload bytes that fit into the first reserved buffer.
    pub fn next_capacity(&self) -> u32 {
        self.buffers.front().map_or(0, payload_capacity)
    }

    /// Returns the first reserved buffer to the guest, with `header` before the
    /// payload that it already contains. Returns `false` if there is none.
    pub fn send(&mut self, header: &Header) -> Result<bool, QueueError> {
        let Some(chain) = self.buffers.pop_front() else {
            return Ok(false);
        };
        let len = HEADER_SIZE as u32 + header.len;
        chain.write_at(self.rx.memory(), 0, &header.to_bytes());
        self.returned_rx = true;
        self.rx.push_used(chain, len)?;
        Ok(true)
    }

    /// Raises one interrupt for all chains returned since the last call, if the
    /// driver wants it.
    pub fn notify(&mut self) -> Result<(), QueueError> {
        let mut wanted = false;
        if std::mem::take(&mut self.returned_rx) {
            wanted |= self.rx.notify_needed()?;
        }
        if std::mem::take(&mut self.returned_tx) {
            wanted |= self.tx.notify_needed()?;
        }
        if wanted {
            self.interrupt.used();
        }
        Ok(())
    }

    /// Sets `DEVICE_NEEDS_RESET` because of `error`.
    pub fn needs_reset(&self, error: &(dyn std::error::Error + 'static)) {
        self.interrupt.needs_reset(error);
    }
}
