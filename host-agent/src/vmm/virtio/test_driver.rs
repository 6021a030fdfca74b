//! A virtio driver for unit tests and fuzz targets of devices: it fills real rings in
//! memory.

// Fuzz targets do not use all of it.
#![cfg_attr(not(test), allow(dead_code))]
#![allow(clippy::unwrap_used)]

use std::os::fd::AsRawFd;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

#[cfg(test)]
use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::interrupt::{Interrupt, USED_BUFFER};
use super::{Activation, ActiveQueue, new_event};

/// `VIRTQ_DESC_F_NEXT` (virtio 1.2, 2.7.5).
pub(crate) const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE` (virtio 1.2, 2.7.5).
pub(crate) const WRITE: u16 = 2;

/// Bytes of RAM, from address 0.
pub(crate) const RAM: u64 = 16 << 20;
/// Address of a second, small region of RAM, after a gap.
pub(crate) const HIGH: u64 = 32 << 20;
/// Bytes of the second region.
pub(crate) const HIGH_LEN: u64 = 0x1_0000;
/// The rings lie below this address, buffers above.
pub(crate) const BUFFERS: u64 = 1 << 20;
/// Bytes for the rings of one queue: descriptors, available, used.
const RINGS: u64 = 0x1_0000;
/// Longest time that a test waits for a device.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether the test `name` (under `vmm::virtio::`) runs alone in its process. If
/// not, this runs it in a process of its own and asserts that it passes.
pub(crate) fn alone(name: &str) -> bool {
    const ALONE: &str = "HOST_AGENT_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--test-threads=1", "--nocapture"])
        .arg(format!("vmm::virtio::{name}"))
        .env(ALONE, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let passed = output.status.success() && text.contains("1 passed");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(passed, "{text}{errors}");
    false
}

/// Number of open descriptors and of threads of this process.
pub(crate) fn open_files_and_threads() -> [usize; 2] {
    ["fd", "task"].map(|kind| {
        let entries = std::fs::read_dir(format!("/proc/self/{kind}"));
        entries.unwrap().count()
    })
}

/// Peak of the memory that `work` allocates, in bytes, without guest RAM
/// (`memory`).
pub(crate) fn memory_for(memory: &GuestMemoryMmap, work: impl FnOnce()) -> u64 {
    for page in (BUFFERS..RAM).step_by(4096) {
        memory.write_obj(0_u8, GuestAddress(page)).unwrap();
    }
    let peak = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.unwrap().trim().trim_end_matches(" kB");
        kib.parse::<u64>().unwrap() << 10
    };
    // Resets the peak (proc(5), clear_refs).
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = peak();
    work();
    peak() - before
}

/// A driver, valid or hostile.
pub(crate) struct TestDriver {
    /// Guest RAM.
    pub(crate) memory: GuestMemoryMmap,
    /// The device's interrupt.
    pub(crate) interrupt: Interrupt,
    line: EventFd,
    epoll: Epoll,
    rings: Vec<Ring>,
}

struct Ring {
    size: u16,
    kick: EventFd,
    avail: u16,
    seen: u16,
}

impl TestDriver {
    /// A driver with one queue for each of `sizes`.
    pub(crate) fn new(sizes: &[u16]) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), RAM as usize),
            (GuestAddress(HIGH), HIGH_LEN as usize),
        ])
        .unwrap();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let epoll = Epoll::new().unwrap();
        let interest = EpollEvent::new(EventSet::IN, 0);
        epoll
            .ctl(ControlOperation::Add, line.as_raw_fd(), interest)
            .unwrap();
        let ring = |size: &u16| Ring {
            size: *size,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            avail: 0,
            seen: 0,
        };
        Self {
            memory,
            interrupt: Interrupt::new(line.try_clone().unwrap(), "test", new_event().unwrap()),
            line,
            epoll,
            rings: sizes.iter().map(ring).collect(),
        }
    }

    /// Clears the rings, as after a reset; the arguments of [`super::Device::activate`].
    pub(crate) fn activation(&mut self, features: u64) -> Activation {
        self.interrupt.reset();
        let mut queues = Vec::new();
        for (index, ring) in self.rings.iter_mut().enumerate() {
            let base = RINGS * index as u64;
            let zeros = vec![0; RINGS as usize];
            self.memory.write_slice(&zeros, GuestAddress(base)).unwrap();
            (ring.avail, ring.seen) = (0, 0);
            let mut queue = Queue::new(ring.size).unwrap();
            queue
                .try_set_desc_table_address(GuestAddress(base))
                .unwrap();
            queue
                .try_set_avail_ring_address(GuestAddress(avail(index)))
                .unwrap();
            queue
                .try_set_used_ring_address(GuestAddress(used(index)))
                .unwrap();
            queue.set_ready(true);
            assert!(queue.is_valid(&self.memory));
            queues.push(ActiveQueue {
                queue,
                kick: ring.kick.try_clone().unwrap(),
            });
        }
        Activation {
            memory: self.memory.clone(),
            features,
            queues,
            interrupt: self.interrupt.clone(),
        }
    }

    /// Writes one descriptor of `queue`.
    pub(crate) fn describe(
        &self,
        queue: usize,
        index: u16,
        (addr, len): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        let at = RINGS * queue as u64 + 16 * u64::from(index);
        self.put(at, Descriptor::new(addr, len, flags, next));
    }

    /// Writes a chain of `(addr, len, writable)` to the descriptors of `queue`
    /// from `first` on.
    pub(crate) fn chain(&self, queue: usize, first: u16, parts: &[(u64, u32, bool)]) {
        for (index, (addr, len, writable)) in (first..).zip(parts) {
            let last = usize::from(index - first) + 1 == parts.len();
            let flags = u16::from(!last) * NEXT + u16::from(*writable) * WRITE;
            self.describe(queue, index, (*addr, *len), flags, index + 1);
        }
    }

    /// Offers one chain of queue 0, from descriptor 0 on, and kicks.
    pub(crate) fn submit(&mut self, parts: &[(u64, u32, bool)]) {
        self.chain(0, 0, parts);
        self.offer(0, 0);
        self.kick(0);
    }

    /// Guest memory at `at`.
    pub(crate) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    /// The object in guest memory at `at`.
    pub(crate) fn get<T: ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// Writes to guest memory.
    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    /// Writes an object to guest memory.
    pub(crate) fn put<T: ByteValued>(&self, at: u64, object: T) {
        self.memory.write_obj(object, GuestAddress(at)).unwrap();
    }

    /// Makes the chain at `head` available, without a kick.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = avail(queue) + 4 + 2 * u64::from(ring.avail % ring.size);
        ring.avail = ring.avail.wrapping_add(1);
        let index = ring.avail;
        self.put(slot, head);
        fence(Ordering::SeqCst);
        self.put(avail(queue) + 2, index);
    }

    /// Moves the available index without a chain.
    pub(crate) fn jump(&mut self, queue: usize, by: u16) {
        let ring = &mut self.rings[queue];
        ring.avail = ring.avail.wrapping_add(by);
        let index = ring.avail;
        self.put(avail(queue) + 2, index);
    }

    /// Kicks the device.
    pub(crate) fn kick(&self, queue: usize) {
        self.rings[queue].kick.write(1).unwrap();
    }

    /// The next used chain, if there is one: head and length. If not, requests
    /// an interrupt for the next one (virtio 1.2, 2.7.10).
    pub(crate) fn used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let Ring { size, seen, .. } = self.rings[queue];
        let index = used(queue) + 2;
        if self.get::<u16>(index) == seen {
            self.put(avail(queue) + 4 + 2 * u64::from(size), seen);
            fence(Ordering::SeqCst);
            if self.get::<u16>(index) == seen {
                return None;
            }
        }
        fence(Ordering::SeqCst);
        self.rings[queue].seen = seen.wrapping_add(1);
        let [head, len] = self.get(used(queue) + 4 + 8 * u64::from(seen % size));
        Some((head, len))
    }

    /// Waits, by interrupts alone, for the next used chain.
    pub(crate) fn wait_used(&mut self, queue: usize) -> (u32, u32) {
        let mut found = None;
        self.wait_until("a used buffer", |driver| {
            found = driver.used(queue);
            found.is_some()
        });
        found.unwrap()
    }

    /// Waits, by interrupts alone, until `done`.
    pub(crate) fn wait_until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            let left = PATIENCE.checked_sub(start.elapsed());
            let left = left.unwrap_or_else(|| panic!("no {what} in {PATIENCE:?}"));
            let mut events = [EpollEvent::default()];
            let _ = self.epoll.wait(left.as_millis() as i32, &mut events);
            let _ = self.line.read();
            self.interrupt.acknowledge(USED_BUFFER);
        }
    }
}

/// Address of the available ring of `queue`.
pub(crate) fn avail(queue: usize) -> u64 {
    RINGS * queue as u64 + 0x8000
}

fn used(queue: usize) -> u64 {
    RINGS * queue as u64 + 0xc000
}

/// An action of a hostile driver on queue 0.
#[derive(Debug, Clone)]
pub(crate) enum RingAction {
    /// Writes a descriptor: index, buffer, flags, next.
    Describe(u16, (u64, u32), u16, u16),
    /// Makes a head available, with or without a kick.
    Offer(u16, bool),
    /// Moves the available index without a chain.
    Jump(u16),
    /// Overwrites two bytes of the rings.
    Poke(u64, u16),
    Kick,
    /// Resets the device and starts it again.
    Reset,
}

/// Actions on a queue of `size`, mostly near what is valid.
#[cfg(test)]
pub(crate) fn ring_action(size: u16) -> impl Strategy<Value = RingAction> {
    let index = || prop_oneof![30 => 0..size, 1 => any::<u16>()];
    let address = prop_oneof![
        6 => BUFFERS..RAM,
        3 => 0..RINGS,
        1 => RAM - 100..RAM + 100,
        1 => any::<u64>(),
    ];
    let length = prop_oneof![
        4 => 0..5000_u32,
        4 => (0..20_u32).prop_map(|sectors| sectors * 512),
        1 => any::<u32>(),
        1 => Just(u32::MAX),
    ];
    let flags =
        prop_oneof![3 => Just(0_u16), 3 => Just(1), 2 => Just(2), 2 => Just(3), 1 => 4..8_u16];
    let step = prop_oneof![20 => 1..3_u16, 1 => any::<u16>()];
    let ring_header = prop::sample::select(vec![avail(0), avail(0) + 2, used(0), used(0) + 2]);
    prop_oneof![
        4 => (0..size, (address, length), flags, index())
            .prop_map(|(at, part, flags, next)| RingAction::Describe(at, part, flags, next)),
        3 => (index(), any::<bool>()).prop_map(|(head, kick)| RingAction::Offer(head, kick)),
        1 => step.prop_map(RingAction::Jump),
        1 => (0..RINGS - 2, any::<u16>()).prop_map(|(at, value)| RingAction::Poke(at, value)),
        2 => (ring_header, any::<u16>()).prop_map(|(at, value)| RingAction::Poke(at, value)),
        2 => Just(RingAction::Kick),
        1 => Just(RingAction::Reset),
    ]
}

impl TestDriver {
    /// Carries out `action`. The test resets the device itself.
    pub(crate) fn act(&mut self, action: &RingAction) {
        match *action {
            RingAction::Describe(index, part, flags, next) => {
                self.describe(0, index, part, flags, next);
            }
            RingAction::Offer(head, kick) => {
                self.offer(0, head);
                if kick {
                    self.kick(0);
                }
            }
            RingAction::Jump(by) => {
                self.jump(0, by);
                self.kick(0);
            }
            RingAction::Poke(at, value) => self.put(at, value),
            RingAction::Kick | RingAction::Reset => self.kick(0),
        }
    }
}
