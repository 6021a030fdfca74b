//! Drivers that access registers and rings of devices.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::time::Duration;

use virtio_queue::{Queue, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice,
};

use super::input::Input;
use crate::vmm::disk::Disk;
use crate::vmm::virtio::blk::{Block, QUEUE_SIZE};
use crate::vmm::virtio::interrupt::Interrupt;
use crate::vmm::virtio::mmio::Transport;
use crate::vmm::virtio::queue::{Chain, CheckedQueue, EVENT_IDX};
use crate::vmm::virtio::test_driver::{BUFFERS, NEXT, TestDriver, WRITE};
use crate::vmm::virtio::vsock::{TimeLimits, Vsock, VsockEvent};
use crate::vmm::virtio::{ActivateError, Activation, ActiveQueue, Device, Identity, new_event};

/// `VIRTIO_F_VERSION_1`.
const VERSION_1: u64 = 1 << 32;

/// A device that checks what the transport gives it.
struct Inert {
    identity: Identity,
    active: bool,
}

impl Device for Inert {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        assert!(!self.active, "activated twice without a reset");
        self.active = true;
        let Activation {
            memory,
            features,
            queues,
            ..
        } = activation;
        assert_ne!(features & VERSION_1, 0);
        assert_eq!(features & !(self.identity.features | VERSION_1), 0);
        assert_eq!(queues.len(), self.identity.queue_sizes.len());
        for (active, max) in queues.iter().zip(self.identity.queue_sizes) {
            assert!(active.queue.size() <= *max && active.queue.is_valid(&memory));
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.active = false;
    }
}

/// Accesses of any width and order to the registers of a virtio-mmio device.
pub fn mmio_state(data: &[u8]) {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let interrupt = Interrupt::new(new_event().unwrap(), "fuzz", new_event().unwrap());
    let device = Box::new(Inert {
        identity: Identity {
            id: 4711,
            name: "fuzz".into(),
            features: EVENT_IDX | 1,
            queue_sizes: &[8, 256],
            config: vec![1, 2, 3],
        },
        active: false,
    });
    let transport = Transport::new(device, memory, interrupt.clone()).unwrap();
    let register = |offset| {
        let mut bytes = [0; 4];
        transport.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    let mut input = Input(data);
    while let Some([kind, low, high]) = input.take() {
        let offset = u64::from(u16::from_le_bytes([low, high]) % 0x1000);
        // Mostly whole registers.
        let width = if kind < 0xc0 {
            4
        } else {
            usize::from(kind % 9)
        };
        match kind % 8 {
            0 => transport.read(offset, &mut [0; 8][..width]),
            1 => interrupt.used(),
            2 => interrupt.needs_reset(&io::Error::other("fuzz")),
            _ => match input.take::<8>() {
                Some(value) => transport.write(offset, &value[..width]),
                None => return,
            },
        }
        assert_eq!(register(0), u32::from_le_bytes(*b"virt"));
        assert_eq!((register(4), register(8)), (2, 4711));
        let status = register(0x70);
        // Each status has those below it (virtio 1.2, 3.1.1), whatever failed.
        let steps = [0, 1, 3, 0xb, 0xf];
        assert!(steps.contains(&(status & 0xf)), "status {status:#x}");
        assert_eq!(status & 0x40 != 0, interrupt.is_broken());
    }
    transport.stop();
}

/// Descriptor chains in any memory.
pub fn queue_chains(data: &[u8]) {
    const DESCRIPTORS: u64 = 0;
    const AVAIL: u64 = 0x1000;
    const USED: u64 = 0x2000;
    let mut input = Input(data);
    let Some([exponent, flags, heads]) = input.take() else {
        return;
    };
    let size = 1_u16 << (exponent % 9);
    let features = if flags & 1 == 0 { 0 } else { EVENT_IDX };
    let ranges = [
        (GuestAddress(0), 0x2_0000),
        (GuestAddress(0x3_0000), 0x1_0000),
    ];
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let mut queue = Queue::new(256).unwrap();
    queue.set_size(size);
    queue
        .try_set_desc_table_address(GuestAddress(DESCRIPTORS))
        .unwrap();
    queue
        .try_set_avail_ring_address(GuestAddress(AVAIL))
        .unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    queue.set_ready(true);
    // Flags and index, then heads; the rest are descriptors.
    let ring = input.bytes(4 + 2 * usize::from(heads));
    memory.write_slice(ring, GuestAddress(AVAIL)).unwrap();
    let table = input.bytes(16 * usize::from(size));
    memory
        .write_slice(table, GuestAddress(DESCRIPTORS))
        .unwrap();
    let kick = new_event().unwrap();
    let mut queue = CheckedQueue::new(ActiveQueue { queue, kick }, memory.clone(), features);
    let mut held = Vec::new();
    // An error stops a device.
    while let Ok(Some(chain)) = queue.pop() {
        check_chain(&chain, &memory);
        held.push(chain);
        assert!(held.len() <= usize::from(size), "more chains than entries");
        if flags & 2 != 0 {
            let _ = queue.disable_kicks();
        }
    }
    for chain in held {
        let written = chain.writable_len().min(100);
        if queue.push_used(chain, written).is_err() {
            return;
        }
        let _ = queue.notify_needed();
        let _ = queue.enable_kicks();
    }
}

fn check_chain(chain: &Chain, memory: &GuestMemoryMmap) {
    for (ranges, len) in [
        (chain.readable(), chain.readable_len()),
        (chain.writable(), chain.writable_len()),
    ] {
        let sum: u64 = ranges.iter().map(|range| u64::from(range.len)).sum();
        assert_eq!(sum, u64::from(len));
        for range in ranges {
            let region = memory.find_region(range.addr).expect("the range is in RAM");
            let last = range.addr.0 + u64::from(range.len) - 1;
            assert!(range.len > 0 && last <= region.last_addr().0);
        }
    }
    let mut buffer = [0; 300];
    for offset in [0, 1, chain.readable_len() / 2, chain.readable_len()] {
        let left = chain.readable_len().saturating_sub(offset) as usize;
        assert_eq!(chain.read_at(memory, offset, &mut buffer), left.min(300));
    }
}

/// A disk in memory that checks the ranges of its requests.
struct CheckedDisk(Vec<u8>);

impl CheckedDisk {
    fn range(&self, offset: u64, slices: &[VolatileSlice<'_>]) -> usize {
        let len: usize = slices.iter().map(VolatileSlice::len).sum();
        let end = usize::try_from(offset).unwrap().checked_add(len).unwrap();
        assert!(end <= self.0.len(), "{len} bytes at {offset}");
        offset as usize
    }
}

impl Disk for CheckedDisk {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&mut self, offset: u64, to: &[VolatileSlice<'_>]) -> io::Result<()> {
        let mut at = self.range(offset, to);
        for slice in to {
            slice.copy_from(&self.0[at..at + slice.len()]);
            at += slice.len();
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        let mut at = self.range(offset, from);
        for slice in from {
            slice.copy_to(&mut self.0[at..at + slice.len()]);
            at += slice.len();
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A block device and its driver.
struct BlockRun {
    block: Block,
    driver: TestDriver,
    features: u64,
}

impl BlockRun {
    fn restart(&mut self) {
        self.block.reset();
        let activation = self.driver.activation(self.features);
        self.block.activate(activation).unwrap();
    }

    /// Offers a request in three buffers; the address of its status.
    fn request(&mut self, [slot, kind, sector]: [u8; 3], len: u32) -> u64 {
        let slot = slot % 32;
        let at = BUFFERS + 0x2_0000 * u64::from(slot);
        let head = u16::from(slot) * 3;
        let driver = &mut self.driver;
        driver.put(at, [u32::from(kind), 0, u32::from(sector), 0]);
        driver.put(at + 32, 0xaa_u8);
        let data = if kind == 1 { NEXT } else { NEXT | WRITE };
        driver.describe(0, head, (at, 16), NEXT, head + 1);
        driver.describe(0, head + 1, (at + 64, len), data, head + 2);
        driver.describe(0, head + 2, (at + 32, 1), WRITE, 0);
        driver.offer(0, head);
        driver.kick(0);
        at + 32
    }

    fn step(&mut self, input: &mut Input<'_>) -> Option<()> {
        match input.byte()? % 8 {
            0..4 => {
                let fields = input.take()?;
                let len = u32::from(input.word()?);
                self.request(fields, len);
            }
            4 => {
                let [index, flags, next] = input.take()?;
                let part = (u64::from(input.double()?), input.double()?);
                self.driver
                    .describe(0, index.into(), part, flags.into(), next.into());
            }
            5 => {
                self.driver.offer(0, input.byte()?.into());
                self.driver.kick(0);
            }
            6 => {
                self.driver.jump(0, input.word()?);
                self.driver.kick(0);
            }
            _ => self.restart(),
        }
        Some(())
    }
}

/// Requests and rings of a block device, which a reset must repair.
pub fn block_requests(data: &[u8]) {
    let mut input = Input(data);
    let Some(features) = input.byte() else {
        return;
    };
    let disk = Box::new(CheckedDisk(vec![0; 64 * 512]));
    let mut run = BlockRun {
        block: Block::new(0, "fuzz", disk, new_event().unwrap()).unwrap(),
        driver: TestDriver::new(&[QUEUE_SIZE]),
        // VIRTIO_BLK_F_FLUSH is bit 9.
        features: u64::from(features & 1) * EVENT_IDX + (u64::from(features & 2) << 8),
    };
    run.restart();
    while run.step(&mut input).is_some() {}
    run.restart();
    let status = run.request([0, 0, 1], 512);
    assert_eq!(run.driver.wait_used(0), (0, 513));
    assert_eq!(run.driver.get::<u8>(status), 0);
}

/// Queues of a vsock device.
const RX: usize = 0;
const TX: usize = 1;
/// Most sockets of the host that are open at once.
const STREAMS: usize = 64;

/// A vsock device, its driver, and the host's ends of connections.
struct VsockRun {
    device: Vsock,
    driver: TestDriver,
    events: std::sync::mpsc::Receiver<VsockEvent>,
    streams: Vec<UnixStream>,
    features: u64,
    dials: u64,
}

impl VsockRun {
    fn restart(&mut self) {
        self.device.reset();
        let activation = self.driver.activation(self.features);
        self.device.activate(activation).unwrap();
    }

    /// Sends a packet with this header, whose payload is of `len` bytes.
    fn send(&mut self, slot: u8, header: [u8; 44], len: u32) {
        let at = BUFFERS + 0xe000 * u64::from(slot);
        let slot = u16::from(slot);
        self.driver.write(at, &header);
        self.driver.describe(TX, slot, (at, 44 + len), 0, 0);
        self.driver.offer(TX, slot);
        self.driver.kick(TX);
    }

    fn receive_into(&mut self, slot: u8, len: u32) {
        let at = BUFFERS + 0xe000 * u64::from(slot);
        self.driver.describe(RX, slot.into(), (at, len), WRITE, 0);
        self.driver.offer(RX, slot.into());
        self.driver.kick(RX);
    }

    fn step(&mut self, input: &mut Input<'_>) -> Option<()> {
        let [operation, slot] = input.take()?;
        match operation % 8 {
            0..3 => {
                let [op, host, guest, flags] = input.take()?;
                let len = u32::from(input.word()?);
                let credit = (input.double()?, input.double()?);
                let ports = (8 + u32::from(host % 16), u32::from(guest % 16));
                self.send(slot, header(op.into(), ports, flags, len, credit), len);
            }
            3 => {
                let header = input.take()?;
                self.send(slot, header, u32::from(slot));
            }
            4 => {
                let len = u32::from(input.word()?);
                self.receive_into(slot, len);
            }
            5 => {
                if let Some(stream) = self.streams.last_mut() {
                    // The guest may have closed it, or sent nothing.
                    let _ = stream.write(&vec![1; 16 * usize::from(slot)]);
                    let _ = stream.read(&mut [0; 4096]);
                }
            }
            6 if slot < 0x80 => drop(self.streams.pop()),
            6 => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                self.keep(ours);
                self.dials += 1;
                let handle = self.device.handle();
                handle.dial(self.dials, u32::from(slot), vec![], theirs.into());
            }
            _ if slot < 0x80 => self.restart(),
            _ => {
                let queue = usize::from(slot % 2);
                self.driver.jump(queue, 4 * u16::from(slot));
                self.driver.kick(queue);
            }
        }
        while let Ok(event) = self.events.try_recv() {
            if let VsockEvent::Opened { fd, .. } = event {
                self.keep(UnixStream::from(fd));
            }
        }
        Some(())
    }

    fn keep(&mut self, stream: UnixStream) {
        stream.set_nonblocking(true).unwrap();
        if self.streams.len() < STREAMS {
            self.streams.push(stream);
        }
    }
}

/// A header of guest 3 to the host (virtio 1.2, 5.10.6). Ports are those of the host
/// and of the guest; credit is buffer space and forwarded bytes.
fn header(op: u16, ports: (u32, u32), flags: u8, len: u32, credit: (u32, u32)) -> [u8; 44] {
    let mut header = [0; 44];
    header[..8].copy_from_slice(&3_u64.to_le_bytes());
    header[8..16].copy_from_slice(&2_u64.to_le_bytes());
    for (at, field) in [(16, ports.1), (20, ports.0), (24, len), (32, flags.into())] {
        header[at..at + 4].copy_from_slice(&u32::to_le_bytes(field));
    }
    header[28] = 1;
    header[30..32].copy_from_slice(&op.to_le_bytes());
    for (at, field) in [(36, credit.0), (40, credit.1)] {
        header[at..at + 4].copy_from_slice(&field.to_le_bytes());
    }
    header
}

/// Packets and rings of a vsock device, which a reset must repair.
pub fn vsock_packets(data: &[u8]) {
    let mut input = Input(data);
    let Some(features) = input.byte() else {
        return;
    };
    let (sender, events) = channel();
    let sink = Box::new(move |event| drop(sender.send(event)));
    let mut run = VsockRun {
        device: Vsock::new(3, TimeLimits::with_dial(Duration::from_secs(1)), sink).unwrap(),
        driver: TestDriver::new(&[256; 3]),
        events,
        streams: Vec::new(),
        features: u64::from(features & 1) * EVENT_IDX,
        dials: 0,
    };
    run.restart();
    while run.step(&mut input).is_some() {}
    run.restart();
    run.receive_into(0, 4096);
    run.send(1, header(1, (10, 1), 0, 0, (4096, 0)), 0);
    assert_eq!(run.driver.wait_used(RX), (0, 44));
    let response = run.driver.read(BUFFERS, 44);
    assert_eq!(response[30], 2, "no response but {response:?}");
}
