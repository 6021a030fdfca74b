//! Requests without sense, the same for the same seed.

use crate::device::{BUFFERS, Device, register};
use crate::physical::Physical;

/// A small generator (Marsaglia's xorshift64*): the run can be had again.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    pub const fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    /// An address where a device can do no harm to this guest's kernel: in the
    /// window, which ends where RAM ends, or nowhere.
    fn address(&mut self, window: &Physical) -> u64 {
        match self.below(10) {
            0 => self.next() | 1 << 62,
            1 => window.start + window.length + self.below(1 << 20),
            2 => window.start + window.length - self.below(64),
            _ => window.start + BUFFERS + self.below(window.length - BUFFERS - (1 << 17)),
        }
    }

    fn length(&mut self) -> u32 {
        match self.below(8) {
            0 => self.next() as u32,
            1 => 0,
            2 => 44,
            3 => 16,
            4 => 512,
            _ => self.below(1 << 16) as u32,
        }
    }
}

/// Starts the device, or not, then feeds it anything.
pub fn round(device: &mut Device<'_>, window: &Physical, random: &mut Random) {
    if random.one_in(4) {
        let moved = random.address(window) & !0xfff;
        device.start(|at| {
            if at.is_multiple_of(0x1_0000) {
                moved
            } else {
                at
            }
        });
    } else {
        device.start(|at| at);
    }
    for _ in 0..random.below(4) {
        // Small pieces of the window become requests of a sort.
        let at = device.buffer(random.below(16)) + 8 * random.below(8);
        let value = random.next() >> (8 * random.below(8));
        window.write(at, value);
    }
    for queue in 0..device.queues.len() as u32 {
        let size = u64::from(device.queues[queue as usize]);
        let count = random.below(size.min(64)) + 1;
        for index in 0..count {
            let at = if random.one_in(2) {
                device.buffer(random.below(16))
            } else {
                random.address(window)
            };
            let flags = if random.one_in(16) {
                random.next() as u16
            } else {
                random.below(4) as u16
            };
            let next = if random.one_in(8) {
                random.next() as u16
            } else {
                random.below(count) as u16
            };
            device.describe(queue, index as u16, at, random.length(), flags, next);
        }
        for position in 0..=random.below(count) {
            let head = if random.one_in(16) {
                random.next() as u16
            } else {
                random.below(count) as u16
            };
            let index = if random.one_in(16) {
                random.next() as u16
            } else {
                position as u16 + 1
            };
            device.offer(queue, position as u16, head, index);
        }
    }
    for _ in 0..random.below(6) {
        // Addresses of rings stay where they can do no harm.
        let offset = random.below(0x200) & !3;
        let value = random.next() as u32;
        match offset {
            register::QUEUE_DESC..0xb0 => {}
            _ if random.one_in(3) => device.set_narrow(offset, value as u16),
            _ if random.one_in(2) => device.set(offset, value & 0xf),
            _ => device.set(offset, value),
        }
    }
}
