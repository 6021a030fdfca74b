//! Random requests, reproducible by their seed.

use crate::device::{BUFFERS, Device, register};
use crate::generator::Random;
use crate::physical::Physical;

/// An address in the window, which ends where RAM ends, or outside of RAM, so
/// that no device overwrites this guest's kernel.
fn address(random: &mut Random, window: &Physical) -> u64 {
    match random.below(10) {
        0 => random.any() | 1 << 62,
        1 => window.start + window.length + random.below(1 << 20),
        2 => window.start + window.length - random.below(64),
        _ => window.start + BUFFERS + random.below(window.length - BUFFERS - (1 << 17)),
    }
}

/// Starts the device, sometimes with a misplaced ring, and sends it random requests.
pub fn round(device: &mut Device<'_>, window: &Physical, random: &mut Random) {
    if random.one_in(4) {
        let moved = address(random, window) & !0xfff;
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
        // Random words in the buffers sometimes form a valid request.
        let at = device.buffer(random.below(16)) + 8 * random.below(8);
        let value = random.any() >> (8 * random.below(8));
        window.write(at, value);
    }
    for queue in 0..device.queues.len() as u32 {
        let size = u64::from(device.queues[queue as usize]);
        let count = random.below(size.min(64)) + 1;
        for index in 0..count {
            let at = if random.one_in(2) {
                device.buffer(random.below(16))
            } else {
                address(random, window)
            };
            let flags = random.mostly_below(4, 16);
            let next = random.mostly_below(count, 8);
            device.describe(queue, index as u16, at, random.length(), flags, next);
        }
        for position in 0..=random.below(count) {
            let head = random.mostly_below(count, 16);
            let index = if random.one_in(16) {
                random.any() as u16
            } else {
                position as u16 + 1
            };
            device.offer(queue, position as u16, head, index);
        }
    }
    for _ in 0..random.below(6) {
        // Ring addresses stay, so that no device writes outside of the window.
        let offset = random.below(0x200) & !3;
        let value = random.any() as u32;
        match offset {
            register::QUEUE_DESC..0xb0 => {}
            _ if random.one_in(3) => device.set_narrow(offset, value as u16),
            _ if random.one_in(2) => device.set(offset, value & 0xf),
            _ => device.set(offset, value),
        }
    }
}
