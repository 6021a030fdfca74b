//! Operations that a guest repeats without end: they must not use up anything.

use std::net::Shutdown as Half;
use std::path::Path;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::driver::*;
use super::limits::{fill, socket_capacity};
use crate::vmm::control::DialOutcome;
use crate::vmm::virtio::queue::EVENT_IDX;
use crate::vmm::virtio::test_driver::{BUFFERS, RAM, memory_for};
use crate::vmm::virtio::vsock::QUEUE_SIZE;
use crate::vmm::virtio::vsock::packet::{MAX_PAYLOAD, Operation};

/// Length of a buffer, and `len` of a packet in 255 such buffers.
const PAGE: (u32, u32) = (4096, MAX_PAYLOAD);
const PAGE_FALSE_LEN: (u32, u32) = (4096, u32::MAX);
const ALL: (u32, u32) = ((RAM - BUFFERS) as u32, MAX_PAYLOAD);

#[test]
fn refused_requests_use_up_no_connections() {
    let mut guest = Guest::with(Buffers::default(), EVENT_IDX);
    for n in 0..100_000_u32 {
        // Not a channel's port; an unprivileged port; another socket type.
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

/// CPU time of the worker; the process must have exactly one.
fn cpu_time() -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let read = |task: &Path, what| std::fs::read_to_string(task.join(what)).unwrap();
    let thread = tasks
        .map(|task| task.unwrap().path())
        .find(|task| read(task, "comm") == "vsock\n")
        .unwrap();
    let times = read(&thread, "schedstat");
    Duration::from_nanos(times.split(' ').next().unwrap().parse().unwrap())
}

/// CPU use of the worker (1.0 is a whole core) during the limit of a dial.
fn load(guest: &Guest) -> f64 {
    let (start, before) = (Instant::now(), cpu_time());
    guest.device.handle().probe(7, 80);
    assert_eq!(guest.dialed(), (7, DialOutcome::TimedOut));
    let took = cpu_time().saturating_sub(before);
    took.as_secs_f64() / start.elapsed().as_secs_f64()
}

#[test]
fn stalled_readers_cost_no_cpu_time() {
    // In a process of its own, so that there is one worker.
    if !alone("vsock::tests::endurance::stalled_readers_cost_no_cpu_time") {
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
    // A host and a guest that do not read, and a half-closed connection.
    for _ in 0..socket_capacity() / 4096 + 8 {
        guest.data(PORT, 1, &[1; 4096]);
    }
    fill(&full, usize::MAX);
    half.shutdown(Half::Write).unwrap();
    guest.settle();
    let part = load(&guest);
    assert!(part < 0.02, "{part} of a core for stalled readers");

    // A guest that reads until it has no receive buffer left.
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
    assert!(part < 0.02, "{part} of a core without receive buffers");
}

#[test]
fn overlapping_buffers_cost_no_memory() {
    // In a process of its own, because it measures the memory of the process.
    if !alone("vsock::tests::endurance::overlapping_buffers_cost_no_memory") {
        return;
    }
    // From the guest: a header, and one range listed 255 times. The device resets
    // the connection once the credit is used up, or at once for a false length.
    let mut guest = Guest::new();
    let at = RAM - 4096;
    let used = memory_for(&guest.driver.memory.clone(), || {
        for (round, (part, len)) in (0..).zip([PAGE, PAGE_FALSE_LEN, ALL].repeat(10)) {
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
