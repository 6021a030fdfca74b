//! A driver of a virtio-mmio device (virtio 1.2, 4.2).

use std::time::{Duration, Instant};

use crate::physical::Physical;

/// Registers (virtio 1.2, 4.2.2).
pub mod register {
    pub const MAGIC: u64 = 0x00;
    pub const DEVICE_ID: u64 = 0x08;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC: u64 = 0x80;
    pub const QUEUE_DRIVER: u64 = 0x90;
    pub const QUEUE_DEVICE: u64 = 0xa0;
    /// Capacity of a block device in sectors, 8 bytes (virtio 1.2, 5.2.4).
    pub const CAPACITY: u64 = 0x100;
}

const MAGIC: u32 = 0x7472_6976;
/// Device status bits (virtio 1.2, 2.1).
const NEEDS_RESET: u32 = 0x40;
const STATUS_STEPS: [u32; 4] = [1, 3, 11, 15];
/// Descriptor flags (virtio 1.2, 2.7.5).
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Bytes of memory for one queue; offsets of its driver area and device area.
const QUEUE: u64 = 0x1_0000;
const DRIVER: u64 = 0x4000;
const DEVICE: u64 = 0x8000;
/// Offset of the buffers in the window.
pub const BUFFERS: u64 = 4 * QUEUE;

/// A device and the memory for its queues and buffers.
#[derive(Debug)]
pub struct Device<'a> {
    registers: &'a Physical,
    window: &'a Physical,
    base: u64,
    /// Device id (virtio 1.2, section 5): 2 block, 4 entropy, 19 socket.
    pub kind: u32,
    /// Length of each queue.
    pub queues: Vec<u16>,
}

impl<'a> Device<'a> {
    /// The device whose registers are at `base`, if there is one.
    pub fn find(registers: &'a Physical, window: &'a Physical, base: u64) -> Option<Self> {
        let kind = registers.read::<u32>(base + register::DEVICE_ID);
        let magic = registers.read::<u32>(base + register::MAGIC);
        (magic == MAGIC && kind != 0).then_some(Self {
            registers,
            window,
            base,
            kind,
            queues: Vec::new(),
        })
    }

    pub fn get(&self, register: u64) -> u32 {
        self.registers.read(self.base + register)
    }

    pub fn set(&self, register: u64, value: u32) {
        self.registers.write(self.base + register, value);
    }

    /// Writes two bytes to a register of four.
    pub fn set_narrow(&self, register: u64, value: u16) {
        self.registers.write(self.base + (register & !1), value);
    }

    /// Resets the device; whether its status then reads as 0.
    pub fn reset(&self) -> bool {
        self.set(register::STATUS, 0);
        self.get(register::STATUS) == 0
    }

    /// Resets and initialises the device with empty queues (virtio 1.2, 3.1.1).
    /// `place` may move the areas of a queue.
    pub fn start(&mut self, place: impl Fn(u64) -> u64) {
        self.reset();
        for step in &STATUS_STEPS[..2] {
            self.set(register::STATUS, *step);
        }
        self.set(register::DRIVER_FEATURES_SEL, 1);
        // Accepts only VIRTIO_F_VERSION_1.
        self.set(register::DRIVER_FEATURES, 1);
        self.set(register::STATUS, STATUS_STEPS[2]);
        self.queues.clear();
        for queue in 0.. {
            self.set(register::QUEUE_SEL, queue);
            let most = self.get(register::QUEUE_SIZE_MAX);
            if most == 0 {
                break;
            }
            self.queues.push(most as u16);
            self.set(register::QUEUE_SIZE, most);
            let start = self.queue(queue);
            for at in (start..start + QUEUE).step_by(8) {
                self.window.write(at, 0_u64);
            }
            for (register, at) in [
                (register::QUEUE_DESC, start),
                (register::QUEUE_DRIVER, start + DRIVER),
                (register::QUEUE_DEVICE, start + DEVICE),
            ] {
                let at = place(at);
                self.set(register, at as u32);
                self.set(register + 4, (at >> 32) as u32);
            }
            self.set(register::QUEUE_READY, 1);
        }
        self.set(register::STATUS, STATUS_STEPS[3]);
    }

    fn queue(&self, queue: u32) -> u64 {
        self.window.start + QUEUE * u64::from(queue)
    }

    /// Address of the buffer `n`, a page.
    pub fn buffer(&self, n: u64) -> u64 {
        self.window.start + BUFFERS + n * 0x1000
    }

    /// Writes a descriptor.
    pub fn describe(&self, queue: u32, index: u16, at: u64, length: u32, flags: u16, next: u16) {
        let descriptor = self.queue(queue) + 16 * u64::from(index);
        self.window.write(descriptor, at);
        self.window.write(descriptor + 8, length);
        self.window.write(descriptor + 12, flags);
        self.window.write(descriptor + 14, next);
    }

    /// Writes `head` to the available ring at `position`, sets the available index
    /// to `index`, and kicks.
    pub fn offer(&self, queue: u32, position: u16, head: u16, index: u16) {
        let ring = self.queue(queue) + DRIVER;
        self.window.write(ring + 4 + 2 * u64::from(position), head);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.window.write(ring + 2, index);
        self.set(register::QUEUE_NOTIFY, queue);
    }

    /// The used index of a queue.
    pub fn used(&self, queue: u32) -> u16 {
        self.window.read(self.queue(queue) + DEVICE + 2)
    }

    /// Waits for `DEVICE_NEEDS_RESET`.
    pub fn broke(&self, limit: Duration) -> bool {
        wait(limit, || self.get(register::STATUS) & NEEDS_RESET != 0)
    }

    /// A queue that the device serves when it is kicked.
    pub fn busy_queue(&self) -> u32 {
        // Queue 0 of a socket device holds receive buffers.
        u32::from(self.kind == 19)
    }
}

/// Waits until `condition` holds; `false` after `limit`.
pub fn wait(limit: Duration, condition: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while !condition() {
        if start.elapsed() > limit {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}
