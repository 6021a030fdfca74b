//! A driver in this process, for tests of devices: real rings in real memory.

use std::os::fd::AsRawFd;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::interrupt::{Interrupt, USED_BUFFER};
use super::{Activation, ActiveQueue};

/// Another descriptor follows.
pub(crate) const NEXT: u16 = 1;
/// The device writes the buffer.
pub(crate) const WRITE: u16 = 2;

/// Bytes of RAM, from address 0.
pub(crate) const RAM: u64 = 16 << 20;
/// Behind a gap there is more, but not much.
pub(crate) const HIGH: u64 = 32 << 20;
/// Bytes of it.
pub(crate) const HIGH_LEN: u64 = 0x1_0000;
/// The rings end below this address; above it all is free for buffers.
pub(crate) const BUFFERS: u64 = 1 << 20;
/// Room for the rings of one queue: descriptors, available, used.
const RINGS: u64 = 0x1_0000;
/// Longest time that a test waits for a device.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether the test `name` (under `vmm::virtio::`) is the only one in its
/// process. If not, it has now passed in a process of its own.
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

/// Open descriptors and threads of this process.
pub(crate) fn open_files_and_threads() -> [usize; 2] {
    ["fd", "task"].map(|kind| {
        let entries = std::fs::read_dir(format!("/proc/self/{kind}"));
        entries.unwrap().count()
    })
}

/// Bytes of memory that `work` takes at the most, beyond what this process has
/// before. Guest RAM, `memory`, does not count.
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
    // The peak begins anew here (proc(5), clear_refs).
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = peak();
    work();
    peak() - before
}

/// What a driver does, honest or not.
pub(crate) struct TestDriver {
    /// Guest RAM.
    pub(crate) memory: GuestMemoryMmap,
    /// The device's interrupt, as the transport sees it.
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
    /// A driver with one queue of each of `sizes`.
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
            interrupt: Interrupt::new(line.try_clone().unwrap(), "test"),
            line,
            epoll,
            rings: sizes.iter().map(ring).collect(),
        }
    }

    /// Sets the rings up anew, as after a reset, and makes what the device gets.
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
        let at = GuestAddress(RINGS * queue as u64 + 16 * u64::from(index));
        self.memory
            .write_obj(Descriptor::new(addr, len, flags, next), at)
            .unwrap();
    }

    /// Writes a chain of `(addr, len, writable)` to the descriptors of `queue`
    /// from `first` on; the number of the descriptor behind it.
    pub(crate) fn chain(&self, queue: usize, first: u16, parts: &[(u64, u32, bool)]) -> u16 {
        let mut index = first;
        for (number, (addr, len, writable)) in parts.iter().enumerate() {
            let last = number + 1 == parts.len();
            let flags = u16::from(!last) * NEXT + u16::from(*writable) * WRITE;
            self.describe(queue, index, (*addr, *len), flags, index + 1);
            index += 1;
        }
        index
    }

    /// Offers the chain at `head`, without a kick.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = avail(queue) + 4 + 2 * u64::from(ring.avail % ring.size);
        ring.avail = ring.avail.wrapping_add(1);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        fence(Ordering::SeqCst);
        self.memory
            .write_obj(ring.avail, GuestAddress(avail(queue) + 2))
            .unwrap();
    }

    /// Moves the available index without offering anything.
    pub(crate) fn jump(&mut self, queue: usize, by: u16) {
        let ring = &mut self.rings[queue];
        ring.avail = ring.avail.wrapping_add(by);
        self.memory
            .write_obj(ring.avail, GuestAddress(avail(queue) + 2))
            .unwrap();
    }

    /// Tells the device to look.
    pub(crate) fn kick(&self, queue: usize) {
        self.rings[queue].kick.write(1).unwrap();
    }

    /// The next returned chain, if there is one: head and length. If not, asks
    /// for an interrupt when there is (virtio 1.2, 2.7.10).
    pub(crate) fn used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let ring = &mut self.rings[queue];
        let index = GuestAddress(used(queue) + 2);
        if self.memory.read_obj::<u16>(index).unwrap() == ring.seen {
            let used_event = avail(queue) + 4 + 2 * u64::from(ring.size);
            self.memory
                .write_obj(ring.seen, GuestAddress(used_event))
                .unwrap();
            fence(Ordering::SeqCst);
            if self.memory.read_obj::<u16>(index).unwrap() == ring.seen {
                return None;
            }
        }
        fence(Ordering::SeqCst);
        let slot = used(queue) + 4 + 8 * u64::from(ring.seen % ring.size);
        ring.seen = ring.seen.wrapping_add(1);
        let [head, len]: [u32; 2] = self.memory.read_obj(GuestAddress(slot)).unwrap();
        Some((head, len))
    }

    /// Waits, by interrupts alone, for the next returned chain.
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

/// Where the available ring of `queue` is.
pub(crate) fn avail(queue: usize) -> u64 {
    RINGS * queue as u64 + 0x8000
}

fn used(queue: usize) -> u64 {
    RINGS * queue as u64 + 0xc000
}
