//! A guest that keeps to no rule: it breaks its own device and nothing else.

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

/// A channel's host port.
const PORT: u32 = 10;
/// The three queues lie below this address, 64 KiB each.
const RINGS_END: u64 = 0x3_0000;
/// Where each queue's available and used rings begin.
const AVAIL: u64 = 0x8000;
const USED: u64 = 0xc000;
/// Room for a packet or a receive buffer of a hostile guest.
const SLOT: u64 = 0x1000;

/// Something that a guest does, or its host.
#[derive(Debug, Clone)]
enum Act {
    /// A descriptor: queue, index, buffer, flags, next.
    Describe(usize, u16, (u64, u32), u16, u16),
    /// A head, and whether the device is told.
    Offer(usize, u16, bool),
    /// The available index moves without a chain.
    Jump(usize, u16),
    /// Two bytes of any ring change, behind the back of either side.
    Poke(u64, u16),
    /// A packet that is well laid out, whatever it says.
    Packet(u16, Header, u32),
    /// A receive buffer.
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

fn act() -> impl Strategy<Value = Act> {
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
        // Flags, index, first entries, and the event index behind the ring.
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
            .prop_map(|(queue, at, buffer, flags, next)| Act::Describe(queue, at, buffer, flags, next)),
        3 => (0..3_usize, index(), any::<bool>())
            .prop_map(|(queue, head, kick)| Act::Offer(queue, head, kick)),
        1 => (0..3_usize, step).prop_map(|(queue, by)| Act::Jump(queue, by)),
        1 => (field, any::<u16>()).prop_map(|(at, value)| Act::Poke(at, value)),
        12 => (0..64_u16, header(), 0..4000_u32)
            .prop_map(|(slot, header, len)| Act::Packet(slot, header, len)),
        8 => (0..64_u16, 0..4000_u32).prop_map(|(slot, len)| Act::Buffer(slot, len)),
        2 => (0..3_usize).prop_map(Act::Kick),
        1 => Just(Act::Dial),
        3 => (0..20_000_usize).prop_map(Act::Write),
        3 => Just(Act::Read),
        1 => Just(Act::Close),
        1 => Just(Act::Reset),
    ]
}

/// The host's side of a hostile session.
struct Host {
    open: Vec<UnixStream>,
    dials: u64,
    answers: u64,
}

impl Host {
    fn look(&mut self, guest: &Guest) {
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

    fn act(&mut self, guest: &mut Guest, act: &Act) {
        let driver = &mut guest.driver;
        match *act {
            Act::Describe(queue, index, buffer, flags, next) => {
                driver.describe(queue, index % QUEUE_SIZE, buffer, flags, next);
            }
            Act::Offer(queue, head, kick) => {
                driver.offer(queue, head);
                if kick {
                    driver.kick(queue);
                }
            }
            Act::Jump(queue, by) => driver.jump(queue, by),
            Act::Poke(at, value) => driver.memory.write_obj(value, GuestAddress(at)).unwrap(),
            Act::Packet(slot, ref header, len) => {
                let at = BUFFERS + SLOT * u64::from(slot);
                let bytes = header.to_bytes();
                driver.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
                driver.describe(TX, slot, (at, HEADER_SIZE as u32 + len), 0, 0);
                driver.offer(TX, slot);
                driver.kick(TX);
            }
            Act::Buffer(slot, len) => {
                let at = (8 << 20) + SLOT * u64::from(slot);
                driver.describe(RX, slot, (at, len), WRITE, 0);
                driver.offer(RX, slot);
                driver.kick(RX);
            }
            Act::Kick(queue) => driver.kick(queue),
            Act::Dial => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                ours.set_nonblocking(true).unwrap();
                self.open.push(ours);
                self.dials += 1;
                guest.device.handle().dial(self.dials, 80, theirs.into());
            }
            Act::Write(len) => {
                if let Some(stream) = self.open.last_mut() {
                    // The guest may have ended it.
                    let _ = stream.write(&vec![1; len]);
                }
            }
            Act::Read => {
                for stream in &mut self.open {
                    let _ = stream.read(&mut [0; 8192]);
                }
            }
            Act::Close => drop(self.open.pop()),
            Act::Reset => {
                guest.device.reset();
                guest.start();
            }
        }
        self.look(guest);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_guest_puts_on_its_rings_a_reset_makes_the_device_whole(
        acts in prop::collection::vec(act(), 1..150),
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
        host.look(&guest);
        prop_assert_eq!(host.answers, host.dials, "every dial is answered once");
        for stream in &mut host.open {
            // Waited for: another test's child may hold a copy until it runs.
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

/// Ends a thread when it goes, also by a panic.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Packets that are offered at once while their header changes.
const ROUND: usize = 64;

/// Offers one packet of 8 bytes of payload again and again while another
/// processor changes the length in its header from one of `lengths` to the
/// other. How many packets: enough rounds in which it did, or as many as make
/// no difference on a machine with a single processor.
fn race(guest: &mut Guest, lengths: [u32; 2], mut after_round: impl FnMut()) -> usize {
    guest.settle();
    let at = 8 << 20;
    let mut header = Guest::header(Operation::Data, PORT, 1);
    header.len = lengths[0];
    let memory = guest.driver.memory.clone();
    memory
        .write_slice(&header.to_bytes(), GuestAddress(at))
        .unwrap();
    memory
        .write_slice(b"abcdefgh", GuestAddress(at + HEADER_SIZE as u64))
        .unwrap();
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
        let _stop = Stop(&stop);
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
fn a_header_rewritten_after_it_was_offered_is_one_of_the_two_throughout() {
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
    // What was counted is what was delivered: whole packets, none twice.
    guest.send(&Guest::header(Operation::CreditRequest, PORT, 1), &[]);
    while guest.receive().0.fwd_cnt as usize != all.len() {}
    let mut rest = all.as_slice();
    for n in 0..packets {
        let long = rest.strip_prefix(b"abcdefgh");
        let short = || rest.strip_prefix(b"abc");
        rest = long.or_else(short).unwrap_or_else(|| panic!("packet {n}"));
    }
    assert!(rest.is_empty());

    // Between a length that is true and one that no chain has: each packet is
    // taken or ends its connection, and nothing beyond the chain is touched.
    let mut guest = Guest::new();
    let mut host = guest.connect(PORT, 1);
    race(&mut guest, [8, u32::MAX], || ());
    let mut lie = Guest::header(Operation::Data, PORT, 1);
    lie.len = u32::MAX;
    guest.send(&lie, b"abcdefgh");
    let mut text = Vec::new();
    host.read_to_end(&mut text).unwrap();
    assert!(text.chunks(8).all(|part| part == b"abcdefgh"));
    guest.wait_connections(0);
    assert_eq!(guest.driver.interrupt.violations(), 0);
    guest.send(&Guest::header(Operation::Request, PORT, 1), &[]);
    while guest.receive().0.operation() != Some(Operation::Response) {}
}

/// A log that is looked at.
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
fn a_guest_that_never_ceases_to_break_its_device_fills_no_log() {
    if !alone("vsock::tests::hostile::a_guest_that_never_ceases_to_break_its_device_fills_no_log") {
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
            .wait_until("reset wanted", |_| interrupt.is_broken());
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
