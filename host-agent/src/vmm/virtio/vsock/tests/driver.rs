//! The guest's end of a vsock device: valid and invalid packets on real rings.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{Ordering, fence};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use crate::vmm::control::DialOutcome;
use crate::vmm::virtio::Device;
use crate::vmm::virtio::queue::EVENT_IDX;
pub(crate) use crate::vmm::virtio::test_driver::alone;
use crate::vmm::virtio::test_driver::{BUFFERS, NEXT, RAM, TestDriver, WRITE};
use crate::vmm::virtio::vsock::packet::{HEADER_SIZE, Header, Operation, TYPE_STREAM};
use crate::vmm::virtio::vsock::{EventSink, QUEUE_SIZE, TimeLimits, Vsock, VsockEvent};

pub(crate) const RX: usize = 0;
pub(crate) const TX: usize = 1;
pub(crate) const CID: u64 = 3;
/// Host port of a channel.
pub(crate) const PORT: u32 = 10;
/// Limits of a device, with the time for the guest to answer a dial.
pub(crate) const LIMITS: TimeLimits = TimeLimits::with_dial(Duration::from_secs(2));
/// Longest time that a test waits.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Address of the guest's packets; its receive buffers lie below.
const TX_BUFFERS: u64 = 4 << 20;
/// Bytes reserved for one packet of the guest.
const TX_SLOT: u64 = 0x1_2000;
/// Most packets of the guest in flight; there are more slots.
const TX_IN_FLIGHT: u16 = 128;
/// Offset of the used ring in a queue's memory.
const USED: u64 = 0xc000;

/// Layout of the receive buffers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Buffers {
    pub(crate) count: u16,
    pub(crate) payload: u32,
    /// Header and payload in two descriptors, as in Linux before 6.3.
    pub(crate) split: bool,
}

impl Default for Buffers {
    /// As in Linux 6.1 with a queue of 256 entries.
    fn default() -> Self {
        Self {
            count: 128,
            payload: 4096,
            split: true,
        }
    }
}

impl Buffers {
    fn slot(self, index: u16) -> u64 {
        let stride = u64::from(self.payload) + 0x100;
        let at = BUFFERS + stride * u64::from(index);
        assert!(at + stride <= TX_BUFFERS);
        at
    }
}

/// Reads exactly `len` bytes.
pub(crate) fn read_exactly(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// A sink of events, and what it takes.
fn queue() -> (EventSink, Receiver<VsockEvent>) {
    let (sender, events) = channel();
    let sink = Box::new(move |event| {
        let _ = sender.send(event);
    });
    (sink, events)
}

/// A guest with a driver and its device.
pub(crate) struct Guest {
    pub(crate) device: Vsock,
    pub(crate) events: Receiver<VsockEvent>,
    pub(crate) driver: TestDriver,
    features: u64,
    buffers: Buffers,
    free: Vec<u16>,
    slot: u64,
    /// For each queue: chains offered, and their number at the last kick.
    offered: [u16; 2],
    kicked: [u16; 2],
}

impl Guest {
    /// A guest like Linux 6.1, without `VIRTIO_F_EVENT_IDX`.
    pub(crate) fn new() -> Self {
        Self::with(Buffers::default(), 0)
    }

    pub(crate) fn with(buffers: Buffers, features: u64) -> Self {
        let (sink, events) = queue();
        Self::with_sink(buffers, features, sink, events)
    }

    /// The same as [`Guest::new`], with other limits.
    pub(crate) fn with_limits(limits: TimeLimits) -> Self {
        let (sink, events) = queue();
        Self::with_device(
            Vsock::new(CID, limits, sink).unwrap(),
            Buffers::default(),
            0,
            events,
        )
    }

    /// A guest whose device sends its events to `sink`.
    pub(crate) fn with_sink(
        buffers: Buffers,
        features: u64,
        sink: EventSink,
        events: Receiver<VsockEvent>,
    ) -> Self {
        let device = Vsock::new(CID, LIMITS, sink).unwrap();
        Self::with_device(device, buffers, features, events)
    }

    fn with_device(
        device: Vsock,
        buffers: Buffers,
        features: u64,
        events: Receiver<VsockEvent>,
    ) -> Self {
        let mut guest = Self {
            device,
            events,
            driver: TestDriver::new(&[QUEUE_SIZE; 3]),
            features,
            buffers,
            free: Vec::new(),
            slot: 0,
            offered: [0; 2],
            kicked: [0; 2],
        };
        guest.start();
        guest
    }

    /// Activates the device and offers the receive buffers.
    pub(crate) fn start(&mut self) {
        (self.offered, self.kicked) = ([0; 2], [0; 2]);
        let activation = self.driver.activation(self.features);
        self.device.activate(activation).unwrap();
        for queue in [RX, TX] {
            self.driver.kick(queue);
        }
        self.free = (0..QUEUE_SIZE).collect();
        for index in 0..self.buffers.count {
            self.post(index);
        }
    }

    fn offer(&mut self, queue: usize, head: u16) {
        self.driver.offer(queue, head);
        self.offered[queue] = self.offered[queue].wrapping_add(1);
    }

    /// Kicks if the device requested it (virtio 1.2, 2.7.10): a missing request
    /// shows as a test that times out.
    pub(crate) fn kick(&mut self, queue: usize) {
        fence(Ordering::SeqCst);
        let used = 0x1_0000 * queue as u64 + USED;
        let load = |at| {
            let memory = &self.driver.memory;
            memory
                .load::<u16>(GuestAddress(at), Ordering::SeqCst)
                .unwrap()
        };
        let offered = self.offered[queue];
        let before = std::mem::replace(&mut self.kicked[queue], offered);
        let requested = if self.features & EVENT_IDX == 0 {
            load(used) & 1 == 0
        } else {
            let event = load(used + 4 + 8 * u64::from(QUEUE_SIZE));
            offered.wrapping_sub(event).wrapping_sub(1) < offered.wrapping_sub(before)
        };
        if requested {
            self.driver.kick(queue);
        }
    }

    /// Offers receive buffers of a guest that was created without any.
    pub(crate) fn offer_buffers(&mut self, buffers: Buffers) {
        assert_eq!(self.buffers.count, 0);
        self.buffers = buffers;
        for index in 0..buffers.count {
            self.post(index);
        }
    }

    /// Offers receive buffer `index`.
    fn post(&mut self, index: u16) {
        let at = self.buffers.slot(index);
        let (header, payload) = (HEADER_SIZE as u32, self.buffers.payload);
        let describe = |index, part, flags| {
            self.driver.describe(RX, index, part, flags, index + 1);
        };
        if self.buffers.split {
            let head = index * 2;
            describe(head, (at, header), WRITE | NEXT);
            describe(head + 1, (at + 44, payload), WRITE);
            self.offer(RX, head);
        } else {
            describe(index, (at, header + payload), WRITE);
            self.offer(RX, index);
        }
        self.kick(RX);
    }

    /// A header from port `guest` to port `host`, with the `buf_alloc` of Linux.
    pub(crate) fn header(operation: Operation, host: u32, guest: u32) -> Header {
        Header {
            src_cid: CID,
            dst_cid: 2,
            src_port: guest,
            dst_port: host,
            kind: TYPE_STREAM,
            op: operation.code(),
            buf_alloc: 256 * 1024,
            ..Header::default()
        }
    }

    /// Sends a packet without payload.
    pub(crate) fn control(&mut self, operation: Operation, host: u32, guest: u32) {
        self.send(&Self::header(operation, host, guest), &[]);
    }

    /// Sends a packet: header and payload in one descriptor each.
    pub(crate) fn send(&mut self, header: &Header, payload: &[u8]) {
        if payload.is_empty() {
            self.send_in(header, payload, &[HEADER_SIZE]);
        } else {
            self.send_in(header, payload, &[HEADER_SIZE, payload.len()]);
        }
    }

    /// Sends a packet in descriptors of these lengths.
    pub(crate) fn send_in(&mut self, header: &Header, payload: &[u8], lens: &[usize]) {
        assert_eq!(lens.iter().sum::<usize>(), HEADER_SIZE + payload.len());
        self.reclaim(lens.len().max(usize::from(QUEUE_SIZE - TX_IN_FLIGHT)));
        let slots = (RAM - TX_BUFFERS) / TX_SLOT;
        let at = TX_BUFFERS + self.slot % slots * TX_SLOT;
        self.slot += 1;
        self.driver.write(at, &header.to_bytes());
        self.driver.write(at + HEADER_SIZE as u64, payload);
        let indices = self.free.split_off(self.free.len() - lens.len());
        let mut from = at;
        for (n, len) in lens.iter().enumerate() {
            let next = indices.get(n + 1);
            let flags = if next.is_some() { NEXT } else { 0 };
            let next = next.copied().unwrap_or_default();
            let part = (from, *len as u32);
            self.driver.describe(TX, indices[n], part, flags, next);
            from += *len as u64;
        }
        self.offer(TX, indices[0]);
        self.kick(TX);
    }

    /// Waits until the device has returned every packet.
    pub(crate) fn settle(&mut self) {
        self.reclaim(usize::from(QUEUE_SIZE));
    }

    fn reclaim(&mut self, count: usize) {
        let free = &mut self.free;
        self.driver.wait_until("packets back", |driver| {
            while free.len() < count {
                let Some((head, _)) = driver.used(TX) else {
                    return false;
                };
                let mut index = head as u16;
                loop {
                    free.push(index);
                    let at = 0x1_0000 * TX as u64 + 16 * u64::from(index) + 12;
                    let [flags, next]: [u16; 2] = driver.get(at);
                    if flags & NEXT == 0 {
                        break;
                    }
                    index = next;
                }
            }
            true
        });
    }

    /// The next packet of the device, if there is one.
    pub(crate) fn try_receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let used = self.driver.used(RX)?;
        Some(self.take(used))
    }

    /// Waits for the next packet of the device.
    pub(crate) fn receive(&mut self) -> (Header, Vec<u8>) {
        let used = self.driver.wait_used(RX);
        self.take(used)
    }

    fn take(&mut self, (head, len): (u32, u32)) -> (Header, Vec<u8>) {
        let head = head as u16;
        let index = if self.buffers.split { head / 2 } else { head };
        let at = self.buffers.slot(index);
        let raw = self.driver.read(at, HEADER_SIZE).try_into();
        let header = Header::parse(&raw.unwrap());
        assert_eq!(len, HEADER_SIZE as u32 + header.len);
        let payload = self
            .driver
            .read(at + HEADER_SIZE as u64, header.len as usize);
        self.post(index);
        (header, payload)
    }

    /// Waits for the next packet and asserts its operation and ports.
    pub(crate) fn expect(&mut self, operation: Operation, host: u32, guest: u32) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.operation(), Some(operation), "{header:?}");
        assert_eq!((header.src_port, header.dst_port), (host, guest));
        assert_eq!((header.src_cid, header.dst_cid), (2, CID));
        header
    }

    /// Waits for the shutdown of both directions; shutdowns accumulate (virtio 1.2,
    /// 5.10.6.4).
    pub(crate) fn expect_end(&mut self, host: u32, guest: u32) {
        while self.expect(Operation::Shutdown, host, guest).flags != 3 {}
    }

    /// Waits until the device has `count` connections.
    pub(crate) fn wait_connections(&self, count: u32) {
        let handle = self.device.handle();
        let start = Instant::now();
        while handle.connections() != count {
            let held = handle.connections();
            assert!(start.elapsed() < PATIENCE, "{held} and not {count}");
            std::thread::yield_now();
        }
    }

    /// The next event.
    pub(crate) fn event(&self) -> VsockEvent {
        self.events.recv_timeout(PATIENCE).unwrap()
    }

    /// Connects port `guest` to the channel `host`; the host's end.
    pub(crate) fn connect(&mut self, host: u32, guest: u32) -> UnixStream {
        self.control(Operation::Request, host, guest);
        self.expect(Operation::Response, host, guest);
        self.opened()
    }

    /// The id and outcome of the next event, which must be the result of a dial.
    pub(crate) fn dialed(&self) -> (u64, DialOutcome) {
        match self.event() {
            VsockEvent::Dialed { id, outcome } => (id, outcome),
            opened @ VsockEvent::Opened { .. } => panic!("{opened:?}"),
        }
    }

    /// The host's end of a connection that the guest dialed.
    pub(crate) fn opened(&self) -> UnixStream {
        match self.event() {
            VsockEvent::Opened { fd, .. } => {
                let stream = UnixStream::from(fd);
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                stream.set_write_timeout(Some(PATIENCE)).unwrap();
                stream
            }
            dialed @ VsockEvent::Dialed { .. } => panic!("{dialed:?}"),
        }
    }

    /// Sends data on a connection.
    pub(crate) fn data(&mut self, host: u32, guest: u32, payload: &[u8]) {
        let mut header = Self::header(Operation::Data, host, guest);
        header.len = payload.len() as u32;
        self.send(&header, payload);
    }

    /// Sends a shutdown with these flags.
    pub(crate) fn shutdown(&mut self, host: u32, guest: u32, flags: u32) {
        let mut header = Self::header(Operation::Shutdown, host, guest);
        header.flags = flags;
        self.send(&header, &[]);
    }
}
