//! A hostile guest: it can break its own device and nothing else.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::driver::*;
use crate::vmm::virtio::Device;
use crate::vmm::virtio::queue::EVENT_IDX;
use crate::vmm::virtio::test_driver::{BUFFERS, RAM, WRITE};
use crate::vmm::virtio::vsock::packet::{HEADER_SIZE, Header, Operation};
use crate::vmm::virtio::vsock::{QUEUE_SIZE, VsockEvent};

/// End of the memory of the three queues, 64 KiB each.
const RINGS_END: u64 = 0x3_0000;
/// Offsets of the available and used rings in a queue's memory.
const AVAIL: u64 = 0x8000;
const USED: u64 = 0xc000;
/// Bytes reserved for a packet or a receive buffer.
const SLOT: u64 = 0x1000;

/// An action of the guest or of its host.
#[derive(Debug, Clone)]
enum HostileAction {
    /// Writes a descriptor: queue, index, buffer, flags, next.
    Describe(usize, u16, (u64, u32), u16, u16),
    /// Makes a head available, with or without a kick.
    Offer(usize, u16, bool),
    /// Moves the available index without a chain.
    Jump(usize, u16),
    /// Overwrites two bytes of a ring.
    Poke(u64, u16),
    /// Sends a packet with this header, in a valid chain.
    Packet(u16, Header, u32),
    /// Adds a receive buffer.
    Buffer(u16, u32),
    Kick(usize),
    /// The host dials, writes, reads, or closes its newest connection.
    Dial,
    Write(usize),
    Read,
    Close,
    /// The guest resets the device and starts it again.
    Reset,
}

fn header() -> impl Strategy<Value = Header> {
    let mostly = |value: u64| prop_oneof![20 => Just(value), 1 => any::<u64>()];
    let number = || prop_oneof![4 => 0..3000_u32, 1 => any::<u32>(), 1 => Just(u32::MAX)];
    let operation = prop_oneof![3 => Just(1_u16), 4 => Just(5), 6 => 0..9_u16, 1 => any::<u16>()];
    (
        (mostly(CID), mostly(2)),
        (0..4_u32, PORT..PORT + 2, number()),
        (prop_oneof![20 => Just(1_u16), 1 => any::<u16>()], operation),
        (0..5_u32, number(), number()),
    )
        .prop_map(|(cids, ports, kinds, rest)| Header {
            src_cid: cids.0,
            dst_cid: cids.1,
            src_port: ports.0,
            dst_port: ports.1,
            len: ports.2,
            kind: kinds.0,
            op: kinds.1,
            flags: rest.0,
            buf_alloc: rest.1,
            fwd_cnt: rest.2,
        })
}

fn action() -> impl Strategy<Value = HostileAction> {
    let index = || prop_oneof![30 => 0..QUEUE_SIZE, 1 => any::<u16>()];
    let address = prop_oneof![
        6 => BUFFERS..RAM,
        3 => 0..RINGS_END,
        1 => RAM - 100..RAM + 100,
        1 => any::<u64>(),
    ];
    let length = prop_oneof![8 => 0..5000_u32, 1 => any::<u32>(), 1 => Just(u32::MAX)];
    let flags =
        prop_oneof![3 => Just(0_u16), 3 => Just(1), 2 => Just(2), 2 => Just(3), 1 => 4..8_u16];
    let step = prop_oneof![20 => 1..3_u16, 1 => any::<u16>()];
    let field = prop_oneof![
        // Flags, index and first entries; the event index after the ring.
        4 => (0..3_u64, prop_oneof![Just(AVAIL), Just(USED)], 0..8_u64)
            .prop_map(|(queue, ring, at)| queue * 0x1_0000 + ring + at),
        1 => (0..3_u64, 0..2_u64).prop_map(|(queue, used)| {
            let size = u64::from(QUEUE_SIZE);
            queue * 0x1_0000 + if used == 1 { USED + 4 + 8 * size } else { AVAIL + 4 + 2 * size }
        }),
        2 => 0..RINGS_END - 2,
    ];
    prop_oneof![
        6 => (0..3_usize, index(), (address, length), flags, index())
            .prop_map(|(queue, at, buffer, flags, next)| {
                HostileAction::Describe(queue, at, buffer, flags, next)
            }),
        3 => (0..3_usize, index(), any::<bool>())
            .prop_map(|(queue, head, kick)| HostileAction::Offer(queue, head, kick)),
        1 => (0..3_usize, step).prop_map(|(queue, by)| HostileAction::Jump(queue, by)),
        1 => (field, any::<u16>()).prop_map(|(at, value)| HostileAction::Poke(at, value)),
        12 => (0..64_u16, header(), 0..4000_u32)
            .prop_map(|(slot, header, len)| HostileAction::Packet(slot, header, len)),
        8 => (0..64_u16, 0..4000_u32).prop_map(|(slot, len)| HostileAction::Buffer(slot, len)),
        2 => (0..3_usize).prop_map(HostileAction::Kick),
        1 => Just(HostileAction::Dial),
        3 => (0..20_000_usize).prop_map(HostileAction::Write),
        3 => Just(HostileAction::Read),
        1 => Just(HostileAction::Close),
        1 => Just(HostileAction::Reset),
    ]
}

/// The host of a hostile guest.
struct Host {
    open: Vec<UnixStream>,
    dials: u64,
    answers: u64,
}

impl Host {
    fn take_events(&mut self, guest: &Guest) {
        while let Ok(effect) = guest.events.try_recv() {
            match effect {
                VsockEvent::Opened { port, fd, .. } => {
                    assert!((PORT..PORT + 7).contains(&port));
                    let stream = UnixStream::from(fd);
                    stream.set_nonblocking(true).unwrap();
                    self.open.push(stream);
                }
                VsockEvent::Dialed { .. } => self.answers += 1,
            }
        }
    }

    fn act(&mut self, guest: &mut Guest, act: &HostileAction) {
        let driver = &mut guest.driver;
        match *act {
            HostileAction::Describe(queue, index, buffer, flags, next) => {
                driver.describe(queue, index % QUEUE_SIZE, buffer, flags, next);
            }
            HostileAction::Offer(queue, head, kick) => {
                driver.offer(queue, head);
                if kick {
                    driver.kick(queue);
                }
            }
            HostileAction::Jump(queue, by) => driver.jump(queue, by),
            HostileAction::Poke(at, value) => driver.put(at, value),
            HostileAction::Packet(slot, ref header, len) => {
                let at = BUFFERS + SLOT * u64::from(slot);
                driver.write(at, &header.to_bytes());
                driver.describe(TX, slot, (at, HEADER_SIZE as u32 + len), 0, 0);
                driver.offer(TX, slot);
                driver.kick(TX);
            }
            HostileAction::Buffer(slot, len) => {
                let at = (8 << 20) + SLOT * u64::from(slot);
                driver.describe(RX, slot, (at, len), WRITE, 0);
                driver.offer(RX, slot);
                driver.kick(RX);
            }
            HostileAction::Kick(queue) => driver.kick(queue),
            HostileAction::Dial => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                ours.set_nonblocking(true).unwrap();
                self.open.push(ours);
                self.dials += 1;
                guest
                    .device
                    .handle()
                    .dial(self.dials, 80, vec![], theirs.into());
            }
            HostileAction::Write(len) => {
                if let Some(stream) = self.open.last_mut() {
                    // The guest may have ended it.
                    let _ = stream.write(&vec![1; len]);
                }
            }
            HostileAction::Read => {
                for stream in &mut self.open {
                    let _ = stream.read(&mut [0; 8192]);
                }
            }
            HostileAction::Close => drop(self.open.pop()),
            HostileAction::Reset => {
                guest.device.reset();
                guest.start();
            }
        }
        self.take_events(guest);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 200, failure_persistence: None, ..crate::property::cases(150) })]

    #[test]
    fn a_reset_recovers_from_any_ring_content(
        acts in prop::collection::vec(action(), 1..150),
        event_idx: bool,
    ) {
        let features = if event_idx { EVENT_IDX } else { 0 };
        let none = Buffers { count: 0, ..Buffers::default() };
        let mut guest = Guest::with(none, features);
        let mut host = Host { open: Vec::new(), dials: 0, answers: 0 };
        for act in &acts {
            host.act(&mut guest, act);
        }
        (0..3).for_each(|queue| guest.driver.kick(queue));
        guest.device.reset();
        host.take_events(&guest);
        prop_assert_eq!(host.answers, host.dials, "every dial has one result");
        for stream in &mut host.open {
            // Blocking: a child of another test may hold a duplicate until its exec.
            stream.set_nonblocking(false).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut part = [0; 8192];
            let end = loop {
                match stream.read(&mut part) {
                    Ok(0) => break true,
                    Ok(_) => {}
                    Err(error) => break error.kind() == ErrorKind::ConnectionReset,
                }
            };
            prop_assert!(end, "a connection outlived the reset");
        }
        guest.start();
        guest.offer_buffers(Buffers::default());
        let mut stream = guest.connect(PORT, 1);
        guest.data(PORT, 1, b"well");
        let mut text = [0; 4];
        stream.read_exact(&mut text).unwrap();
        prop_assert_eq!(&text, b"well");
        stream.write_all(b"done").unwrap();
        prop_assert_eq!(guest.receive().1, b"done");
    }
}

/// Sets the flag when dropped, also by a panic.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Packets per kick while their header changes.
const ROUND: usize = 64;

/// Offers one packet with 8 bytes of payload again and again, while another thread
/// alternates the length in its header between `lengths`. Returns the number of
/// packets: those of 100 rounds with a race, or a maximum for a single core.
fn race(guest: &mut Guest, lengths: [u32; 2], mut after_round: impl FnMut()) -> usize {
    guest.settle();
    let at = 8 << 20;
    let mut header = Guest::header(Operation::Data, PORT, 1);
    header.len = lengths[0];
    let memory = guest.driver.memory.clone();
    guest.driver.write(at, &header.to_bytes());
    guest.driver.write(at + HEADER_SIZE as u64, b"abcdefgh");
    let stop = AtomicBool::new(false);
    let changes = AtomicUsize::new(0);
    let (mut packets, mut raced) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for length in lengths.iter().cycle() {
                let address = GuestAddress(at + 24);
                memory.store(*length, address, Ordering::Relaxed).unwrap();
                changes.fetch_add(1, Ordering::Relaxed);
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        let _stop = StopOnDrop(&stop);
        guest
            .driver
            .describe(TX, 0, (at, HEADER_SIZE as u32 + 8), 0, 0);
        while raced < 100 && packets < 2000 * ROUND {
            let before = changes.load(Ordering::Relaxed);
            for _ in 0..ROUND {
                guest.driver.offer(TX, 0);
            }
            guest.driver.kick(TX);
            for _ in 0..ROUND {
                guest.driver.wait_used(TX);
            }
            raced += usize::from(changes.load(Ordering::Relaxed) > before + ROUND);
            packets += ROUND;
            after_round();
        }
    });
    packets
}

#[test]
fn a_header_that_changes_during_the_read_is_read_once() {
    let mut guest = Guest::new();
    let mut host = guest.connect(PORT, 1);
    host.set_nonblocking(true).unwrap();
    let mut all = Vec::new();
    let packets = race(&mut guest, [3, 8], || {
        let mut part = [0; 8 * ROUND];
        if let Ok(count) = host.read(&mut part) {
            all.extend(&part[..count]);
        }
    });
    guest.shutdown(PORT, 1, 2);
    host.set_nonblocking(false).unwrap();
    host.read_to_end(&mut all).unwrap();
    // The counted bytes are those delivered: whole packets, each once.
    guest.control(Operation::CreditRequest, PORT, 1);
    while guest.receive().0.fwd_cnt as usize != all.len() {}
    let mut rest = all.as_slice();
    for n in 0..packets {
        let long = rest.strip_prefix(b"abcdefgh");
        let short = || rest.strip_prefix(b"abc");
        rest = long.or_else(short).unwrap_or_else(|| panic!("packet {n}"));
    }
    assert!(rest.is_empty());

    // A valid and an impossible length: each packet is delivered or resets its
    // connection, and no byte outside of the chain is read.
    let mut guest = Guest::new();
    let mut host = guest.connect(PORT, 1);
    race(&mut guest, [8, u32::MAX], || ());
    let mut invalid = Guest::header(Operation::Data, PORT, 1);
    invalid.len = u32::MAX;
    guest.send(&invalid, b"abcdefgh");
    let mut text = Vec::new();
    host.read_to_end(&mut text).unwrap();
    assert!(text.chunks(8).all(|part| part == b"abcdefgh"));
    guest.wait_connections(0);
    assert_eq!(guest.driver.interrupt.violations(), 0);
    guest.control(Operation::Request, PORT, 1);
    while guest.receive().0.operation() != Some(Operation::Response) {}
}

/// A log in memory.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn repeated_violations_are_logged_at_a_limited_rate() {
    if !alone("vsock::tests::hostile::repeated_violations_are_logged_at_a_limited_rate") {
        return;
    }
    let log = Log::default();
    let writer = log.clone();
    let lines = tracing_subscriber::fmt()
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::set_global_default(lines).unwrap();
    let mut guest = Guest::new();
    for round in 1..=300 {
        let mut forged = Guest::header(Operation::Data, PORT, 1);
        for _ in 0..50 {
            guest.send(&forged, &[]);
        }
        forged.src_cid = 77;
        for _ in 0..50 {
            guest.send(&forged, &[]);
        }
        guest.settle();
        let interrupt = guest.driver.interrupt.clone();
        guest.driver.jump(TX, QUEUE_SIZE + 1);
        guest.driver.kick(TX);
        guest
            .driver
            .wait_until("DEVICE_NEEDS_RESET", |_| interrupt.is_broken());
        assert_eq!(interrupt.violations(), round);
        let reason = interrupt.reason();
        assert_eq!(reason, "available index is 257 ahead in a queue of 256");
        guest.device.reset();
        guest.start();
        assert!(!interrupt.is_broken());
    }
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let lines = text.lines().count();
    assert!((2..40).contains(&lines), "{text}");
    assert!(text.contains("available index is 257 ahead"), "{text}");
}
