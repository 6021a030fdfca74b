//! Limits of a vsock device: connections, memory, receive buffers and descriptors.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown as Half;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::channel;
use std::time::Instant;

use super::driver::*;
use crate::vmm::control::DialOutcome;
use crate::vmm::virtio::Device;
use crate::vmm::virtio::queue::EVENT_IDX;
use crate::vmm::virtio::test_driver::open_files_and_threads;
use crate::vmm::virtio::vsock::RESET_STEPS;
use crate::vmm::virtio::vsock::connection::HOST_BUFFER;
use crate::vmm::virtio::vsock::connection_table::{MAX_CONNECTIONS, MAX_REPLIES};
use crate::vmm::virtio::vsock::packet::Operation;

/// No receive buffers.
const NONE: Buffers = Buffers {
    count: 0,
    payload: 4096,
    split: true,
};

pub(super) fn assert_ended(stream: &mut UnixStream) {
    let mut part = [0; 4096];
    loop {
        match stream.read(&mut part) {
            Ok(0) => return,
            Ok(_) => {}
            // The device closed its end with unread data.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Writes until the socket is full; the number of bytes written.
pub(super) fn fill(mut stream: &UnixStream, limit: usize) -> usize {
    stream.set_nonblocking(true).unwrap();
    let mut total = 0;
    while total < limit {
        match stream.write(&[7; 4096]) {
            Ok(count) => total += count,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                break;
            }
        }
    }
    stream.set_nonblocking(false).unwrap();
    total
}

/// Bytes that a socket pair buffers for a reader.
pub(super) fn socket_capacity() -> usize {
    let (near, _far) = UnixStream::pair().unwrap();
    fill(&near, usize::MAX)
}

#[test]
fn connection_1024_is_refused_until_another_one_ends() {
    crate::descriptors::raise_limit();
    let mut guest = Guest::with(Buffers::default(), EVENT_IDX);
    let ports = |n: usize| (PORT + n as u32 % 7, n as u32 / 7);
    let mut hosts: Vec<UnixStream> = (0..MAX_CONNECTIONS)
        .map(|n| guest.connect(ports(n).0, ports(n).1))
        .collect();
    assert_eq!(hosts.len(), 1023);
    for (n, host) in hosts.iter_mut().enumerate() {
        let text = n.to_le_bytes();
        guest.data(ports(n).0, ports(n).1, &text);
        assert_eq!(read_exactly(host, 8), text);
        host.write_all(&text).unwrap();
        let (header, payload) = guest.receive();
        assert_eq!((header.src_port, header.dst_port), ports(n));
        assert_eq!(payload, text);
    }
    let refused = |guest: &mut Guest| {
        guest.control(Operation::Request, PORT, 1000);
        guest.expect(Operation::Reset, PORT, 1000);
        let (_ours, theirs) = UnixStream::pair().unwrap();
        guest.device.handle().dial(1, 80, vec![], theirs.into());
        assert_eq!(guest.dialed(), (1, DialOutcome::Unavailable));
    };
    refused(&mut guest);
    // Either end can end a connection, which admits one more.
    let (host_port, guest_port) = ports(500);
    guest.control(Operation::Reset, host_port, guest_port);
    assert_ended(&mut hosts[500]);
    let mut again = guest.connect(PORT, 1000);
    guest.data(PORT, 1000, b"new");
    assert_eq!(read_exactly(&mut again, 3), b"new");
    let more = Guest::header(Operation::Request, PORT, 1001);
    guest.send(&more, &[]);
    guest.expect(Operation::Reset, PORT, 1001);
    drop(again);
    guest.expect_end(PORT, 1000);
    guest.control(Operation::Reset, PORT, 1000);
    hosts[500] = guest.connect(host_port, guest_port);
    refused(&mut guest);
    guest.wait_connections(MAX_CONNECTIONS as u32);
}

#[test]
fn false_credit_claims_cost_the_host_no_memory() {
    let capacity = socket_capacity();
    // To a guest with credit for 4 GiB and no receive buffer.
    let mut guest = Guest::with(NONE, 0);
    let mut request = Guest::header(Operation::Request, PORT, 1);
    request.buf_alloc = u32::MAX;
    guest.send(&request, &[]);
    let host = guest.opened();
    guest.settle();
    let taken = fill(&host, 64 << 20);
    assert!(
        taken <= capacity,
        "{taken} bytes, a socket holds {capacity}"
    );
    // From a guest that sends beyond its credit, on many connections.
    let mut guest = Guest::new();
    for port in 1..=16 {
        let mut host = guest.connect(PORT, port);
        let mut sent = 0_usize;
        let ended = 'sending: loop {
            guest.data(PORT, port, &[7; 16 * 1024]);
            guest.settle();
            sent += 16 * 1024;
            while let Some((header, _)) = guest.try_receive() {
                if header.operation() == Some(Operation::Reset) {
                    break 'sending header;
                }
            }
            let bound = capacity + 2 * HOST_BUFFER as usize;
            assert!(sent <= bound, "{sent} bytes taken, {bound} is the bound");
        };
        assert_eq!((ended.src_port, ended.dst_port), (PORT, port));
        // The device returns a packet before it sends the reset, so the guest may
        // have sent one more packet. Wait for the reset of a later packet.
        guest.data(PORT, 99, b"?");
        while guest.receive().0.dst_port != 99 {}
        // The host gets what its socket accepted, in order, then the end.
        let mut all = Vec::new();
        host.read_to_end(&mut all).unwrap();
        assert!(all.len() < sent && all.iter().all(|byte| *byte == 7));
    }
    guest.wait_connections(0);
}

#[test]
fn packets_wait_for_the_guest_to_offer_receive_buffers() {
    for features in [0, EVENT_IDX] {
        let mut guest = Guest::with(NONE, features);
        guest.control(Operation::Request, PORT, 1);
        let mut host = guest.opened();
        // Its own data arrives meanwhile.
        for n in 0..100_u8 {
            guest.data(PORT, 1, &[n; 100]);
            assert_eq!(read_exactly(&mut host, 100), [n; 100]);
        }
        let text: Vec<u8> = (0..150_000_u32).map(|n| (n % 251) as u8).collect();
        let mut written = 0;
        host.set_nonblocking(true).unwrap();
        while let Ok(count) = host.write(&text[written..]) {
            written += count;
            if written == text.len() {
                break;
            }
        }
        // Resets wait as well, up to a limit.
        for n in 0..2 * MAX_REPLIES {
            guest.control(Operation::Request, 9, n as u32);
        }
        guest.settle();
        guest.offer_buffers(Buffers {
            count: 3,
            payload: 50,
            split: false,
        });
        let mut refused = 0;
        let mut got = Vec::new();
        let mut response = false;
        while got.len() < written || refused < MAX_REPLIES {
            let (header, payload) = guest.receive();
            match header.operation().unwrap() {
                Operation::Reset => {
                    assert_eq!((header.src_port, header.dst_port), (9, refused as u32));
                    refused += 1;
                }
                Operation::Response => response = true,
                Operation::Data => {
                    assert!(response, "data before the response");
                    assert!(payload.len() <= 50);
                    assert_eq!(header.fwd_cnt, 10_000);
                    got.extend(payload);
                }
                Operation::CreditUpdate => {}
                other => panic!("{other:?}"),
            }
        }
        assert!(got == text[..written]);
        // No other packet was waiting.
        guest.control(Operation::CreditRequest, PORT, 1);
        guest.expect(Operation::CreditUpdate, PORT, 1);
    }
}

#[test]
fn a_flood_of_refused_requests_delays_no_connection() {
    for count in [1, 3] {
        let mut guest = Guest::with(NONE, 0);
        guest.control(Operation::Request, PORT, 1);
        let mut host = guest.opened();
        host.write_all(b"are you alive?").unwrap();
        for n in 0..2 * MAX_REPLIES {
            guest.control(Operation::Request, 9, n as u32);
        }
        guest.settle();
        guest.offer_buffers(Buffers {
            count,
            ..Buffers::default()
        });
        let mut packets = (0..8).map(|_| guest.receive());
        let data = packets.find(|(header, _)| header.operation() == Some(Operation::Data));
        assert_eq!(data.expect("none in eight packets").1, b"are you alive?");
    }
}

#[test]
fn a_late_reset_does_not_reach_a_newer_connection() {
    let mut guest = Guest::with(NONE, 0);
    // Other resets wait for a receive buffer first.
    for n in 0..4 {
        guest.control(Operation::Request, 9, n);
    }
    guest.control(Operation::Request, PORT, 1);
    let _old = guest.opened();
    guest.shutdown(PORT, 1, 3);
    guest.control(Operation::Request, PORT, 1);
    let mut host = guest.opened();
    host.write_all(b"new").unwrap();
    guest.settle();
    guest.offer_buffers(Buffers::default());
    let mut operations = Vec::new();
    let mut refused = 0;
    while refused < 4 || operations.len() < 2 {
        let (header, _) = guest.receive();
        match header.src_port {
            9 => refused += 1,
            _ => operations.push(header.operation()),
        }
    }
    let expected = [Operation::Response, Operation::Data].map(Some);
    assert_eq!(operations, expected);
    guest.data(PORT, 1, b"works");
    assert_eq!(read_exactly(&mut host, 5), b"works");
    // No other packet was waiting.
    guest.control(Operation::CreditRequest, PORT, 1);
    guest.expect(Operation::CreditUpdate, PORT, 1);
}

#[test]
fn receive_buffers_without_payload_space_are_returned() {
    let mut guest = Guest::with(NONE, 0);
    guest.control(Operation::Request, PORT, 1);
    let mut host = guest.opened();
    host.write_all(b"patience").unwrap();
    // The largest of these buffers has space for a header and no payload.
    for round in 0..100 {
        for len in [0, 1, 43, 44] {
            let index = 4 * (round % 10) + len as u16 % 4;
            let at = 0x20_0000 + 64 * u64::from(index);
            let flags = crate::vmm::virtio::test_driver::WRITE;
            guest.driver.describe(RX, index, (at, len), flags, 0);
            guest.driver.offer(RX, index);
            guest.driver.kick(RX);
            assert_eq!(guest.driver.wait_used(RX), (u32::from(index), 0));
        }
    }
    guest.offer_buffers(Buffers {
        count: 2,
        payload: 1,
        split: false,
    });
    guest.expect(Operation::Response, PORT, 1);
    for byte in b"patience" {
        let (header, payload) = guest.receive();
        assert_eq!(header.operation(), Some(Operation::Data));
        assert_eq!(payload, [*byte]);
    }
}

#[test]
fn a_draining_connection_does_not_affect_its_successor() {
    let mut guest = Guest::new();
    let host = guest.connect(PORT, 1);
    // The reader is slow, so the device buffers the last bytes.
    let mut sent = 0;
    while sent < socket_capacity() + 32 * 1024 {
        guest.data(PORT, 1, &[1; 4096]);
        sent += 4096;
    }
    guest.shutdown(PORT, 1, 3);
    loop {
        let (header, _) = guest.receive();
        if header.operation() == Some(Operation::Reset) {
            break;
        }
    }
    let mut successor = guest.connect(PORT, 1);
    guest.wait_connections(2);
    // The reader closes with unread bytes: the device gets an error.
    drop(host);
    guest.wait_connections(1);
    guest.data(PORT, 1, b"still");
    assert_eq!(read_exactly(&mut successor, 5), b"still");
    successor.write_all(b"here").unwrap();
    let (header, payload) = guest.receive();
    assert_eq!(header.operation(), Some(Operation::Data), "{header:?}");
    assert_eq!(payload, b"here");
}

#[test]
fn a_reset_ends_all_connections_and_leaks_nothing() {
    // In a process of its own, because it counts descriptors and threads.
    if !alone("vsock::tests::limits::a_reset_ends_all_connections_and_leaks_nothing") {
        return;
    }
    let [before, _] = open_files_and_threads();
    let mut guest = Guest::new();
    let mut idle = None;
    for _ in 0..20 {
        let [quiet, _] = open_files_and_threads();
        assert_eq!(*idle.get_or_insert(quiet), quiet, "descriptors leak");
        let mut hosts: Vec<UnixStream> = (0..60).map(|n| guest.connect(PORT, n)).collect();
        let dialed = UnixStream::pair().unwrap();
        guest.device.handle().dial(7, 80, vec![], dialed.1.into());
        guest.device.handle().probe(8, 81);
        guest.receive();
        guest.receive();
        for (n, host) in (0..).zip(&mut hosts) {
            match n % 6 {
                // Idle; unread by the host; unread by the guest.
                0 => {}
                1 => guest.data(PORT, n, &vec![1; 60_000]),
                2 => host.write_all(&vec![2; 100_000]).unwrap(),
                // Half closed by either end; draining.
                3 => guest.shutdown(PORT, n, 2),
                4 => host.shutdown(Half::Write).unwrap(),
                _ => {
                    for _ in 0..socket_capacity() / 4096 + 8 {
                        guest.data(PORT, n, &[1; 4096]);
                    }
                    guest.shutdown(PORT, n, 3);
                }
            }
        }
        guest.settle();
        guest.device.reset();
        let mut outcomes = [guest.dialed(), guest.dialed()];
        outcomes.sort_by_key(|(id, _)| *id);
        let unavailable = DialOutcome::Unavailable;
        assert_eq!(outcomes, [(7, unavailable), (8, unavailable)]);
        for host in &mut hosts {
            assert_ended(host);
        }
        assert_ended(&mut { dialed.0 });
        guest.wait_connections(0);
        guest.start();
    }
    // The worker ends with the device, even with a handle and a host socket left.
    let handle = guest.device.handle();
    let mut host = guest.connect(PORT, 1);
    drop(guest);
    let start = Instant::now();
    while open_files_and_threads()[1] > 2 {
        assert!(start.elapsed() < PATIENCE, "the worker is still there");
        std::thread::yield_now();
    }
    assert_ended(&mut host);
    handle.probe(9, 80);
    drop((host, handle));
    assert_eq!(open_files_and_threads()[0], before);
}

#[test]
fn a_connection_without_a_socket_on_the_host_is_reset() {
    // In a process of its own, because it uses up the descriptors.
    const NAME: &str = "vsock::tests::limits::a_connection_without_a_socket_on_the_host_is_reset";
    if !alone(NAME) {
        return;
    }
    let mut guest = Guest::new();
    let mut used: Vec<UnixStream> = Vec::new();
    while let Ok((near, far)) = UnixStream::pair() {
        used.extend([near, far]);
    }
    for port in 0..3 {
        guest.control(Operation::Request, PORT, port);
        guest.expect(Operation::Reset, PORT, port);
    }
    assert!(guest.events.try_recv().is_err());
    drop(used);
    guest.connect(PORT, 3);
    assert_eq!(guest.device.handle().connections(), 1);
}

#[test]
fn a_reset_is_not_acknowledged_while_the_thread_hangs() {
    let (entered, has_entered) = channel();
    let (release, released) = channel::<()>();
    let sink = Box::new(move |_| {
        entered.send(()).unwrap();
        // An error: the test releases the thread.
        let _ = released.recv();
    });
    let mut guest = Guest::with_sink(Buffers::default(), 0, sink, channel().1);
    guest.control(Operation::Request, PORT, 1);
    has_entered.recv_timeout(PATIENCE).unwrap();
    guest.device.reset_steps = 3;
    // In a VMM process a panic ends the process.
    let reset = catch_unwind(AssertUnwindSafe(|| guest.device.reset()));
    assert!(reset.is_err());
    drop(release);
    guest.device.reset_steps = RESET_STEPS;
    guest.device.reset();
    // The driver uses the memory for something else.
    let pattern = vec![0x5a; 0x3_0000];
    guest.driver.write(0, &pattern);
    guest.driver.kick(TX);
    guest.device.reset();
    assert!(guest.driver.read(0, pattern.len()) == pattern);
}
