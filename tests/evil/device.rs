//! A virtio-mmio device (virtio 1.2, section 4.2) in the hands of this guest.

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
    /// Of a block device: its length in sectors, 8 bytes (5.2.4).
    pub const CAPACITY: u64 = 0x100;
}

const MAGIC: u32 = 0x7472_6976;
/// Status bits (2.1).
const NEEDS_RESET: u32 = 0x40;
const STEPS: [u32; 4] = [1, 3, 11, 15];
/// Descriptor flags (2.7.5).
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Where a queue's parts lie, from the start of its stretch of the window.
const QUEUE: u64 = 0x1_0000;
const DRIVER: u64 = 0x4000;
const DEVICE: u64 = 0x8000;
/// Buffers begin here.
pub const BUFFERS: u64 = 4 * QUEUE;

/// A device and the memory that it is given.
#[derive(Debug)]
pub struct Device<'a> {
    registers: &'a Physical,
    window: &'a Physical,
    base: u64,
    /// Kind of device: 2 block, 4 entropy, 19 socket.
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

    /// Writes one or two bytes where registers are four.
    pub fn set_narrow(&self, register: u64, value: u16) {
        self.registers.write(self.base + (register & !1), value);
    }

    /// Resets the device; it has to say at once that it is.
    pub fn reset(&self) -> bool {
        self.set(register::STATUS, 0);
        self.get(register::STATUS) == 0
    }

    /// Resets and starts it with empty queues, as an honest driver does.
    /// `place` may move the parts of a queue.
    pub fn start(&mut self, place: impl Fn(u64) -> u64) {
        self.reset();
        for step in &STEPS[..2] {
            self.set(register::STATUS, *step);
        }
        self.set(register::DRIVER_FEATURES_SEL, 1);
        // VIRTIO_F_VERSION_1 and nothing else.
        self.set(register::DRIVER_FEATURES, 1);
        self.set(register::STATUS, STEPS[2]);
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
        self.set(register::STATUS, STEPS[3]);
    }

    fn queue(&self, queue: u32) -> u64 {
        self.window.start + QUEUE * u64::from(queue)
    }

    /// Address of the `n`th buffer of a page.
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

    /// Puts `head` into the available ring at `position` and claims that there
    /// are `index` entries, then kicks.
    pub fn offer(&self, queue: u32, position: u16, head: u16, index: u16) {
        let ring = self.queue(queue) + DRIVER;
        self.window.write(ring + 4 + 2 * u64::from(position), head);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.window.write(ring + 2, index);
        self.set(register::QUEUE_NOTIFY, queue);
    }

    /// Chains that came back from a queue.
    pub fn used(&self, queue: u32) -> u16 {
        self.window.read(self.queue(queue) + DEVICE + 2)
    }

    /// Waits until the device says that it needs a reset.
    pub fn broke(&self, limit: Duration) -> bool {
        wait(limit, || self.get(register::STATUS) & NEEDS_RESET != 0)
    }

    /// The queue on which the device waits for something to do.
    pub fn busy_queue(&self) -> u32 {
        // Of a socket device, queue 0 is what the device fills.
        u32::from(self.kind == 19)
    }
}

/// Waits for a condition.
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
