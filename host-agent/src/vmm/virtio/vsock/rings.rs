//! The three queues of a vsock device while its driver is up.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};

use vm_memory::GuestMemoryMmap;

use super::packet::{HEADER_SIZE, Header, MAX_PAYLOAD};
use crate::vmm::virtio::interrupt::Interrupt;
use crate::vmm::virtio::queue::{Chain, CheckedQueue, QueueError};
use crate::vmm::virtio::{ActivateError, Activation};

/// Queues of the device (virtio 1.2, 5.10.2): receive, transmit, event.
pub const QUEUES: usize = 3;

/// Receive buffers that one turn of a connection fills at most.
const MAX_BATCH: usize = 32;

/// Useless receive buffers that are returned at a time, so that a guest which
/// offers nothing else does not keep the thread.
const MAX_USELESS: usize = 256;

/// The queues, and receive buffers taken in advance.
#[derive(Debug)]
pub struct Rings {
    rx: CheckedQueue,
    tx: CheckedQueue,
    events: CheckedQueue,
    interrupt: Interrupt,
    buffers: VecDeque<Chain>,
    /// The driver has no receive buffer and will kick when it has.
    starved: bool,
    /// There may be packets from the guest.
    pub outgoing: bool,
    returned_rx: bool,
    returned_tx: bool,
}

/// Payload that fits into a receive buffer.
fn room(chain: &Chain) -> u32 {
    chain
        .writable_len()
        .saturating_sub(HEADER_SIZE as u32)
        .min(MAX_PAYLOAD)
}

impl Rings {
    /// Takes over the queues.
    pub fn new(activation: Activation) -> Result<Self, ActivateError> {
        let Activation {
            memory,
            features,
            queues,
            interrupt,
        } = activation;
        let actual = queues.len();
        let Ok([rx, tx, events]) = <[_; QUEUES]>::try_from(queues) else {
            return Err(ActivateError::QueueCount {
                expected: QUEUES,
                actual,
            });
        };
        Ok(Self {
            rx: CheckedQueue::new(rx, memory.clone(), features),
            tx: CheckedQueue::new(tx, memory.clone(), features),
            events: CheckedQueue::new(events, memory, features),
            interrupt,
            buffers: VecDeque::new(),
            starved: false,
            outgoing: true,
            returned_rx: false,
            returned_tx: false,
        })
    }

    /// The eventfds of the driver's kicks: receive, transmit, event.
    pub fn kicks(&self) -> [RawFd; QUEUES] {
        [&self.rx, &self.tx, &self.events].map(|queue| queue.kick().as_raw_fd())
    }

    /// The driver offered receive buffers.
    pub fn rx_kicked(&mut self) -> Result<(), QueueError> {
        // It is not blocking; the count does not matter.
        let _ = self.rx.kick().read();
        self.starved = false;
        self.rx.disable_kicks()
    }

    /// The driver sent packets.
    pub fn tx_kicked(&mut self) -> Result<(), QueueError> {
        let _ = self.tx.kick().read();
        self.outgoing = true;
        self.tx.disable_kicks()
    }

    /// The driver offered event buffers. No event is ever sent, as the only
    /// one there is tells of a migration (virtio 1.2, 5.10.6.7).
    pub fn events_kicked(&mut self) {
        let _ = self.events.kick().read();
    }

    /// The next packet of the guest; [`Self::return_packet`] takes it back.
    pub fn next_packet(&mut self) -> Result<Option<Chain>, QueueError> {
        if let Some(chain) = self.tx.pop()? {
            return Ok(Some(chain));
        }
        if self.tx.enable_kicks()? {
            self.tx.disable_kicks()?;
            return self.tx.pop();
        }
        self.outgoing = false;
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

    /// Whether the driver owes receive buffers.
    pub fn is_starved(&self) -> bool {
        self.starved
    }

    /// Takes receive buffers in advance until they hold `len` bytes of payload,
    /// or are as many as one turn fills. `false` if there is none at all.
    pub fn reserve(&mut self, len: u32) -> Result<bool, QueueError> {
        let mut have: u32 = self.buffers.iter().map(room).sum();
        let mut useless = 0;
        while self.buffers.len() < MAX_BATCH && (have < len || self.buffers.is_empty()) {
            let Some(chain) = self.pop_buffer()? else {
                break;
            };
            if room(&chain) == 0 {
                self.returned_rx = true;
                self.rx.push_used(chain, 0)?;
                useless += 1;
                if useless == MAX_USELESS {
                    break;
                }
                continue;
            }
            have += room(&chain);
            self.buffers.push_back(chain);
        }
        Ok(!self.buffers.is_empty())
    }

    fn pop_buffer(&mut self) -> Result<Option<Chain>, QueueError> {
        if self.starved {
            return Ok(None);
        }
        if let Some(chain) = self.rx.pop()? {
            return Ok(Some(chain));
        }
        // Those in hand will do; the driver is asked for a kick only when
        // there is nothing left to go on with.
        if !self.buffers.is_empty() {
            return Ok(None);
        }
        if self.rx.enable_kicks()? {
            self.rx.disable_kicks()?;
            return self.rx.pop();
        }
        self.starved = true;
        Ok(None)
    }

    /// The payload parts of reserved buffers, `len` bytes at most.
    pub fn payload_slices(&self, len: u32) -> impl Iterator<Item = vm_memory::VolatileSlice<'_>> {
        let mut left = len;
        self.buffers.iter().flat_map(move |chain| {
            let part = room(chain).min(left);
            left -= part;
            chain.writable_slices(self.rx.memory(), HEADER_SIZE as u32, part as usize)
        })
    }

    /// Payload that fits into the first reserved buffer.
    pub fn next_room(&self) -> u32 {
        self.buffers.front().map_or(0, room)
    }

    /// Gives the first reserved buffer to the guest, with `header` before the
    /// payload that is in it already. `false` if there is none.
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

    /// One interrupt for everything returned since the last call, if the
    /// driver wants one.
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

    /// The driver broke the ring protocol.
    pub fn needs_reset(&self, error: &QueueError) {
        self.interrupt.needs_reset(error);
    }
}
