//! What a guest repeats without end costs no more than once.

use std::net::Shutdown as Half;
use std::path::Path;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::driver::*;
use super::limits::{fill, read_exactly, socket_room};
use crate::vmm::control::DialOutcome;
use crate::vmm::virtio::queue::EVENT_IDX;
use crate::vmm::virtio::test_driver::{BUFFERS, RAM, memory_for};
use crate::vmm::virtio::vsock::packet::{MAX_PAYLOAD, Operation};
use crate::vmm::virtio::vsock::{QUEUE_SIZE, VsockEvent};

/// A channel's host port.
const PORT: u32 = 10;

/// Lengths of a buffer, and of the payload that a packet in 255 of them claims.
const PAGE: (u32, u32) = (4096, MAX_PAYLOAD);
const PAGE_AND_LIE: (u32, u32) = (4096, u32::MAX);
const ALL: (u32, u32) = ((RAM - BUFFERS) as u32, MAX_PAYLOAD);

#[test]
fn a_hundred_thousand_failed_connects_leave_every_place_free() {
    let mut guest = Guest::with(Buffers::default(), EVENT_IDX);
    for n in 0..100_000_u32 {
        // A port without service, from an unprivileged port, of another type.
        let (host, from) = match n % 3 {
            0 => (9, n % 1000),
            1 => (PORT, 1024 + n),
            _ => (PORT, n % 1000),
        };
        let mut request = Guest::header(Operation::Request, host, from);
        if n % 3 == 2 {
            request.kind = 2;
        }
        guest.send(&request, &[]);
        guest.expect(Operation::Reset, host, from);
    }
    assert_eq!(guest.device.handle().refused(), 100_000);
    let mut host = guest.connect(PORT, 1);
    guest.data(PORT, 1, b"first");
    assert_eq!(read_exactly(&mut host, 5), b"first");
    guest.wait_connections(1);
}

/// Time that the processors gave to the device's thread, of which there must
/// be one in the process.
fn processor_time() -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let read = |task: &Path, what| std::fs::read_to_string(task.join(what)).unwrap();
    let thread = tasks
        .map(|task| task.unwrap().path())
        .find(|task| read(task, "comm") == "vsock\n")
        .unwrap();
    let times = read(&thread, "schedstat");
    Duration::from_nanos(times.split(' ').next().unwrap().parse().unwrap())
}

/// The part of a processor that the device's thread takes until the guest's
/// time to answer a dial is over, which is 2 s.
fn load(guest: &Guest) -> f64 {
    let (start, before) = (Instant::now(), processor_time());
    guest.device.handle().probe(7, 80);
    let outcome = guest.event();
    assert!(matches!(
        outcome,
        VsockEvent::Dialed {
            id: 7,
            outcome: DialOutcome::TimedOut
        }
    ));
    let took = processor_time().saturating_sub(before);
    took.as_secs_f64() / start.elapsed().as_secs_f64()
}

#[test]
fn readers_that_stall_cost_no_processor_time() {
    // Alone, so that the thread is found by its name.
    if !alone("vsock::tests::endurance::readers_that_stall_cost_no_processor_time") {
        return;
    }
    let mut guest = Guest::new();
    let _unread = guest.connect(PORT, 1);
    let mut request = Guest::header(Operation::Request, PORT, 2);
    request.buf_alloc = 100;
    guest.send(&request, &[]);
    guest.expect(Operation::Response, PORT, 2);
    let full = guest.opened();
    let half = guest.connect(PORT, 3);
    // A host and a guest that do not read, and a direction that is over.
    for _ in 0..socket_room() / 4096 + 8 {
        guest.data(PORT, 1, &[1; 4096]);
    }
    fill(&full, usize::MAX);
    half.shutdown(Half::Write).unwrap();
    guest.settle();
    let part = load(&guest);
    assert!(part < 0.02, "{part} of a processor for stalled readers");

    // A guest that takes everything, until it has no receive buffer left.
    while guest.try_receive().is_some() {}
    (request.src_port, request.buf_alloc) = (4, u32::MAX);
    guest.send(&request, &[]);
    let starved = guest.opened();
    let mut used = 0;
    guest.driver.wait_until("use of every buffer", |driver| {
        fill(&starved, usize::MAX);
        while driver.used(RX).is_some() {
            used += 1;
        }
        used == Buffers::default().count
    });
    assert!(fill(&starved, usize::MAX) < usize::MAX);
    let part = load(&guest);
    assert!(part < 0.02, "{part} of a processor without receive buffers");
}

#[test]
fn buffers_that_overlap_cost_no_memory() {
    // Alone, so that nothing else takes any.
    if !alone("vsock::tests::endurance::buffers_that_overlap_cost_no_memory") {
        return;
    }
    // From the guest: a header, and one range 255 times. It ends when a
    // connection has all the credit that there is, or at once for a lie.
    let mut guest = Guest::new();
    let at = RAM - 4096;
    let used = memory_for(&guest.driver.memory.clone(), || {
        for (round, (part, len)) in (0..).zip([PAGE, PAGE_AND_LIE, ALL].repeat(10)) {
            let _host = guest.connect(PORT, round);
            guest.settle();
            let mut header = Guest::header(Operation::Data, PORT, round);
            header.len = len;
            let driver = &mut guest.driver;
            let bytes = header.to_bytes();
            driver.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
            let mut parts = vec![(BUFFERS, part, false); usize::from(QUEUE_SIZE)];
            parts[0] = (at, bytes.len() as u32, false);
            driver.chain(TX, 0, &parts);
            loop {
                guest.driver.offer(TX, 0);
                guest.driver.kick(TX);
                guest.driver.wait_used(TX);
                let packet = guest.try_receive();
                if packet.is_some_and(|(it, _)| it.operation() == Some(Operation::Reset)) {
                    break;
                }
            }
        }
    });
    assert!(used <= 1 << 20, "{used} bytes for packets of the guest");

    // To the guest.
    let mut guest = Guest::with(
        Buffers {
            count: 0,
            ..Buffers::default()
        },
        0,
    );
    let mut request = Guest::header(Operation::Request, PORT, 1);
    request.buf_alloc = u32::MAX;
    guest.send(&request, &[]);
    let host = guest.opened();
    let driver = &mut guest.driver;
    let used = memory_for(&driver.memory.clone(), || {
        for (part, _) in [PAGE, ALL].repeat(50) {
            fill(&host, usize::MAX);
            driver.chain(RX, 0, &vec![(BUFFERS, part, true); usize::from(QUEUE_SIZE)]);
            driver.offer(RX, 0);
            driver.kick(RX);
            let (_, len) = driver.wait_used(RX);
            assert!(len <= 44 + MAX_PAYLOAD);
        }
    });
    assert!(used <= 1 << 20, "{used} bytes for packets to the guest");
}
