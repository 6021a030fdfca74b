//! Random actions, reproducible by their seed: often near what a driver does.

use e2e::random::Random;

use super::payload::{Action, Width};

/// Bytes of each of the two disks.
pub const DISK_BYTES: usize = 1 << 20;
/// The guest prints this at the end.
pub const DONE: &str = "evil guest: all actions are done";

/// Device registers start here; each device has a page of them.
const REGISTERS: u64 = 0xd000_0000;
const STRIDE: u64 = 0x1000;
/// Queues of each device: two disks, vsock, entropy.
const DEVICES: [&[u16]; 4] = [&[256], &[256], &[256; 3], &[64]];
const VSOCK: u64 = 2;
/// RAM that only devices and stores use, and the end of RAM.
const WINDOW: u64 = 32 << 20;
const WINDOW_LENGTH: u64 = 16 << 20;
const RAM: u64 = 64 << 20;
/// Each queue has this much of the window for its rings; buffers come after all rings.
const RINGS: u64 = 0x1_0000;
const AVAIL: u64 = 0x8000;
const USED: u64 = 0xc000;
const BUFFERS: u64 = WINDOW + 16 * RINGS;
const SLOT: u64 = 0x2000;
/// First register of the serial port.
const SERIAL: u16 = 0x3f8;
/// Ports whose writes can end the guest, and the bytes that do.
const ENDS: [(u16, u8); 2] = [(0x600, 0x34), (0x602, 1)];
/// Registers (virtio 1.2, 4.2.2).
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const STATUS: u64 = 0x70;
const QUEUE_DESC: u64 = 0x80;
const QUEUE_DRIVER: u64 = 0x90;
const QUEUE_DEVICE: u64 = 0xa0;

fn width(random: &mut Random) -> Width {
    [Width::One, Width::Two, Width::Four, Width::Eight][random.below(4) as usize]
}

/// An address for a device: in the window, around the end of RAM, or anywhere
/// beyond RAM. The program itself is never overwritten.
fn address(random: &mut Random) -> u64 {
    match random.below(12) {
        0 => random.any() | 1 << 62,
        1 => RAM + random.below(1 << 20),
        2 => RAM - random.below(64),
        3 => WINDOW + random.below(BUFFERS - WINDOW),
        _ => BUFFERS + random.below(WINDOW_LENGTH / 2),
    }
}

/// A number below `bound`, or any number now and then.
fn near(random: &mut Random, bound: u64) -> u16 {
    random.mostly_below(bound, 16)
}

/// `count` random actions and those that print [`DONE`].
pub fn actions(seed: u64, count: usize) -> Vec<Action> {
    let mut script = Script {
        random: Random::new(seed.wrapping_mul(2).wrapping_add(1)),
        actions: Vec::new(),
        offered: [[0; 3]; DEVICES.len()],
    };
    while script.actions.len() < count {
        script.step();
    }
    script.actions.truncate(count);
    // No divisor latch, no loopback, no interrupts (16550 UART): then all of the text
    // reaches the log.
    for (register, value) in [(3, 3), (4, 0), (1, 0)] {
        let action = Action::Out(Width::One, SERIAL + register, value);
        script.actions.push(action);
    }
    let print = |byte: u8| Action::Out(Width::One, SERIAL, byte.into());
    script
        .actions
        .extend(format!("\n{DONE}\n").bytes().map(print));
    script.actions
}

struct Script {
    random: Random,
    actions: Vec<Action>,
    /// Available index of each queue since the device was started.
    offered: [[u16; 3]; DEVICES.len()],
}

impl Script {
    fn step(&mut self) {
        let device = self.random.below(DEVICES.len() as u64);
        match self.random.below(16) {
            0..3 => self.port(),
            3..7 => self.register(),
            7..9 => self.start(device),
            9..11 => self.hostile_chain(device),
            11..15 => self.request(device),
            _ => {
                // A byte anywhere in the rings.
                let at = WINDOW + self.random.below(BUFFERS - WINDOW);
                let value = self.random.any();
                self.store(at, value);
            }
        }
    }

    fn store(&mut self, at: u64, value: u64) {
        self.actions.push(Action::Store(Width::Eight, at, value));
    }

    fn store_half(&mut self, at: u64, value: u16) {
        let action = Action::Store(Width::Two, at, value.into());
        self.actions.push(action);
    }

    fn set(&mut self, device: u64, register: u64, value: u32) {
        let at = REGISTERS + device * STRIDE + register;
        let action = Action::Store(Width::Four, at, value.into());
        self.actions.push(action);
    }

    fn port(&mut self) {
        let random = &mut self.random;
        let port = match random.below(4) {
            0 => SERIAL - 2 + random.below(12) as u16,
            1 => 0x505,
            2 => 0x5fe + random.below(8) as u16,
            // Not the ports of KVM's own devices (up to 0xff).
            _ => 0x100 + random.below(0xff00) as u16,
        };
        let (width, value) = (width(random), random.any() as u32);
        let action = match random.below(4) {
            0 => Action::In(width, port),
            1 => Action::OutString(port, random.any() as u8),
            _ => Action::Out(width, port, value >> random.below(32)),
        };
        // Not even a part of a string ends the guest.
        let ends = match action {
            Action::Out(_, port, value) => ENDS.contains(&(port, value as u8)),
            Action::OutString(port, _) => ENDS.iter().any(|(end, _)| *end == port),
            _ => false,
        };
        if !ends {
            self.actions.push(action);
        }
    }

    /// Any access to registers. Only [`Self::start`] sets ring addresses, so that no
    /// device writes to the program.
    fn register(&mut self) {
        let random = &mut self.random;
        let page = random.below(DEVICES.len() as u64 + 2) * STRIDE;
        let offset = match random.below(4) {
            0 => random.below(STRIDE),
            1 => STRIDE - 1 - random.below(8),
            _ => random.below(0x180) & !3,
        };
        let at = REGISTERS + page + offset;
        let width = width(random);
        let bits = random.below(64);
        let value = random.any() >> bits;
        let ring = (QUEUE_DESC - 7..QUEUE_DEVICE + 8).contains(&offset);
        let action = if random.one_in(2) || ring {
            Action::Load(width, at)
        } else {
            Action::Store(width, at, value)
        };
        self.actions.push(action);
    }

    /// Resets a device and starts it as a driver does, now and then with a mistake.
    fn start(&mut self, device: u64) {
        for status in [0, 1, 3] {
            self.set(device, STATUS, status);
        }
        // VERSION_1, and often all that the device offers below it.
        let features = if self.random.one_in(3) { 0 } else { 1 << 29 };
        for (half, bits) in [(0, features), (1, 1)] {
            self.set(device, DRIVER_FEATURES_SEL, half);
            self.set(device, DRIVER_FEATURES, bits);
        }
        self.set(device, STATUS, 0xb);
        for (queue, size) in (0..).zip(DEVICES[device as usize]) {
            self.set(device, QUEUE_SEL, queue);
            if self.random.one_in(4) {
                let size = u32::from(*size) >> self.random.below(10);
                self.set(device, QUEUE_SIZE, size);
            }
            let rings = rings(device, queue);
            let places = [(QUEUE_DESC, 0), (QUEUE_DRIVER, AVAIL), (QUEUE_DEVICE, USED)];
            for (register, offset) in places {
                let at = if self.random.one_in(24) {
                    address(&mut self.random)
                } else {
                    rings + offset
                };
                self.set(device, register, at as u32);
                self.set(device, register + 4, (at >> 32) as u32);
            }
            // Available index and flags, for the queue starts with index 0.
            self.store(rings + AVAIL, 0);
            if !self.random.one_in(24) {
                self.set(device, QUEUE_READY, 1);
            }
        }
        self.offered[device as usize] = [0; 3];
        self.set(device, STATUS, 0xf);
    }

    fn describe(
        &mut self,
        device: u64,
        queue: u32,
        index: u16,
        part: (u64, u32),
        link: (u16, u16),
    ) {
        let at = rings(device, queue) + 16 * u64::from(index % 256);
        let (flags, next) = link;
        self.store(at, part.0);
        let word = u64::from(part.1) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.store(at + 8, word);
    }

    /// Makes a chain available and notifies the device.
    fn offer(&mut self, device: u64, queue: u32, head: u16) {
        let size = DEVICES[device as usize][queue as usize];
        let index = &mut self.offered[device as usize][queue as usize];
        let slot = u64::from(*index % size);
        *index = index.wrapping_add(1);
        let index = *index;
        let avail = rings(device, queue) + AVAIL;
        self.store_half(avail + 4 + 2 * slot, head);
        self.store_half(avail + 2, index);
        self.set(device, QUEUE_NOTIFY, queue);
    }

    fn hostile_chain(&mut self, device: u64) {
        let queue = self.random.below(DEVICES[device as usize].len() as u64) as u32;
        let count = 1 + self.random.below(6);
        for index in 0..count {
            let part = (address(&mut self.random), self.random.length());
            let link = (near(&mut self.random, 4), near(&mut self.random, count));
            self.describe(device, queue, index as u16, part, link);
        }
        let head = near(&mut self.random, count);
        self.offer(device, queue, head);
        if self.random.one_in(8) {
            let index = self.random.any() as u16;
            self.store_half(rings(device, queue) + AVAIL + 2, index);
        }
    }

    /// A valid request, whose fields are random within what they may be.
    fn request(&mut self, device: u64) {
        let slot = self.random.below(64);
        let at = BUFFERS + slot * SLOT;
        let head = (slot * 3) as u16;
        match device {
            VSOCK if self.random.one_in(3) => {
                // A receive buffer.
                self.describe(device, 0, head, (at, 4096), (2, 0));
                self.offer(device, 0, head);
            }
            VSOCK => {
                // Source and destination address, ports, length, type, operation,
                // flags, buffer space (virtio 1.2, 5.10.6).
                let guest = self.random.below(8);
                let channel = 8 + self.random.below(12);
                let length = self.random.below(64);
                let operation = self.random.below(10);
                self.store(at, 3);
                self.store(at + 8, 2);
                self.store(at + 16, guest | channel << 32);
                self.store(at + 24, length | 1 << 32 | operation << 48);
                let flags = self.random.below(4);
                self.store(at + 32, flags | 0x1_0000 << 32);
                self.describe(device, 1, head, (at, 44 + length as u32), (0, 0));
                self.offer(device, 1, head);
            }
            0 | 1 => {
                // Type and sector (virtio 1.2, 5.2.6).
                let kind = [0, 0, 1, 1, 4, 8][self.random.below(6) as usize];
                let sector = self.random.below(DISK_BYTES as u64 / 512);
                let length = 512 * (1 + self.random.below(8)) as u32;
                self.store(at, kind);
                self.store(at + 8, sector);
                let data = if kind == 1 { 1 } else { 3 };
                self.describe(device, 0, head, (at, 16), (1, head + 1));
                self.describe(device, 0, head + 1, (at + 64, length), (data, head + 2));
                self.describe(device, 0, head + 2, (at + 32, 1), (2, 0));
                self.offer(device, 0, head);
            }
            _ => {
                let length = self.random.length();
                self.describe(device, 0, head % 64, (at, length), (2, 0));
                self.offer(device, 0, head % 64);
            }
        }
    }
}

/// Address of the rings of a queue.
fn rings(device: u64, queue: u32) -> u64 {
    WINDOW + (device * 3 + u64::from(queue)) * RINGS
}
