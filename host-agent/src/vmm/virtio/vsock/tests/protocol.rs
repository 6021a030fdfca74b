//! The protocol of a vsock device, packet by packet.

use std::io::{Read, Write};
use std::net::Shutdown as Half;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::driver::*;
use crate::vmm::control::DialOutcome;
use crate::vmm::virtio::Device;
use crate::vmm::virtio::vsock::VsockEvent;
use crate::vmm::virtio::vsock::connection::HOST_BUFFER;
use crate::vmm::virtio::vsock::muxer::CLOSE_LIMIT;
use crate::vmm::virtio::vsock::packet::{HEADER_SIZE, Operation};

fn pair() -> (UnixStream, OwnedFd) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    (ours, theirs.into())
}

#[test]
fn a_connection_carries_bytes_both_ways() {
    let mut guest = Guest::new();
    guest.control(Operation::Request, PORT, 700);
    let response = guest.expect(Operation::Response, PORT, 700);
    assert_eq!((response.buf_alloc, response.fwd_cnt), (HOST_BUFFER, 0));
    let VsockEvent::Opened {
        port,
        source_port,
        fd,
    } = guest.event()
    else {
        panic!("not opened");
    };
    assert_eq!((port, source_port), (PORT, 700));
    let mut host = UnixStream::from(fd);
    guest.data(PORT, 700, b"up");
    assert_eq!(read_exactly(&mut host, 2), b"up");
    host.write_all(b"down").unwrap();
    let (header, payload) = guest.receive();
    assert_eq!(header.operation(), Some(Operation::Data));
    assert_eq!((payload.as_slice(), header.fwd_cnt), (&b"down"[..], 2));
}

#[test]
fn a_packet_may_be_split_over_descriptors_anywhere() {
    let mut guest = Guest::new();
    let mut host = guest.connect(PORT, 1);
    let payload: Vec<u8> = (0..150_u8).collect();
    let whole = HEADER_SIZE + payload.len();
    let mut layouts: Vec<Vec<usize>> = (0..=whole).map(|cut| vec![cut, whole - cut]).collect();
    for pieces in 1..=16 {
        // Even pieces; single bytes with the rest at the end; empty descriptors
        // in between.
        let mut even = vec![whole / pieces; pieces];
        even[pieces - 1] += whole % pieces;
        let mut bytes = vec![1; pieces];
        bytes[pieces - 1] = whole - (pieces - 1);
        let gaps = even.iter().flat_map(|len| [0, *len, 0]).collect();
        layouts.extend([even, bytes, gaps]);
    }
    layouts.push(vec![1; whole]);
    for lens in layouts {
        let mut header = Guest::header(Operation::Data, PORT, 1);
        header.len = payload.len() as u32;
        guest.send_in(&header, &payload, &lens);
        assert_eq!(read_exactly(&mut host, payload.len()), payload, "{lens:?}");
        while guest.try_receive().is_some() {}
    }
}

#[test]
fn payloads_up_to_the_credit_arrive_complete() {
    let mut guest = Guest::new();
    let mut host = guest.connect(PORT, 1);
    for len in [1, 4095, 4096, 4097, 65_535, 65_536] {
        let payload: Vec<u8> = (0..len).map(|n| (n % 251) as u8).collect();
        guest.data(PORT, 1, &payload);
        assert_eq!(read_exactly(&mut host, len), payload);
    }
}

#[test]
fn forged_headers_are_dropped_or_answered_by_a_reset() {
    let mut guest = Guest::new();
    let mut host = guest.connect(PORT, 5);
    let good = Guest::header(Operation::Data, PORT, 5);
    let mut dropped = Vec::new();
    for src_cid in [0, 1, 2, 4, u64::from(u32::MAX), CID | 1 << 32] {
        let mut forged = good;
        forged.src_cid = src_cid;
        dropped.push(forged);
    }
    for dst_cid in [0, 1, 3, u64::from(u32::MAX), 2 | 1 << 32] {
        let mut forged = good;
        forged.dst_cid = dst_cid;
        dropped.push(forged);
    }
    let mut stray_reset = Guest::header(Operation::Reset, PORT, 6);
    dropped.push(stray_reset);
    stray_reset.kind = 2;
    dropped.push(stray_reset);
    for mut forged in dropped {
        forged.len = 3;
        guest.send(&forged, b"bad");
    }
    let mut refused = Vec::new();
    for kind in [0, 2, 3, u16::MAX] {
        let mut forged = good;
        forged.kind = kind;
        refused.push(forged);
    }
    for (host_port, guest_port) in [(PORT, 6), (11, 5), (0, 0), (u32::MAX, u32::MAX)] {
        for operation in [
            Operation::Response,
            Operation::Shutdown,
            Operation::Data,
            Operation::CreditUpdate,
            Operation::CreditRequest,
        ] {
            refused.push(Guest::header(operation, host_port, guest_port));
        }
    }
    // Not the port of a channel, or a channel from an unprivileged port.
    for (host_port, guest_port) in [
        (9, 6),
        (17, 6),
        (0, 6),
        (1024, 6),
        (PORT, 1024),
        (PORT, 1 << 31),
    ] {
        refused.push(Guest::header(Operation::Request, host_port, guest_port));
    }
    let mut unknown = Guest::header(Operation::Request, PORT, 6);
    for op in [0, 8, u16::MAX] {
        unknown.op = op;
        refused.push(unknown);
    }
    for forged in refused {
        guest.send(&forged, &[]);
        let (reset, _) = guest.receive();
        assert_eq!(reset, forged.reset());
    }
    // The connection with these ports is unaffected.
    guest.data(PORT, 5, b"good");
    assert_eq!(read_exactly(&mut host, 4), b"good");
    host.set_nonblocking(true).unwrap();
    assert!(host.read(&mut [0]).is_err());
    assert!(guest.events.try_recv().is_err());
}

#[test]
fn a_violation_resets_only_its_own_connection() {
    let mut guest = Guest::new();
    let mut bystander = guest.connect(PORT, 1);
    let mut lie = Guest::header(Operation::Data, PORT, 2);
    lie.len = 5;
    let mut huge = lie;
    huge.len = u32::MAX;
    let mut unknown = lie;
    unknown.op = 99;
    let again = Guest::header(Operation::Request, PORT, 2);
    let response = Guest::header(Operation::Response, PORT, 2);
    for violation in [lie, huge, unknown, again, response] {
        let mut host = guest.connect(PORT, 2);
        guest.send(&violation, b"four");
        guest.expect(Operation::Reset, PORT, 2);
        assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
    }
    guest.data(PORT, 1, b"fine");
    assert_eq!(read_exactly(&mut bystander, 4), b"fine");
}

#[test]
fn a_guest_that_finished_sending_still_receives() {
    let mut guest = Guest::new();
    let mut host = guest.connect(PORT, 1);
    guest.data(PORT, 1, b"last words");
    guest.shutdown(PORT, 1, 2);
    let mut all = Vec::new();
    host.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last words");
    host.write_all(b"answer").unwrap();
    let (_, payload) = guest.receive();
    assert_eq!(payload, b"answer");
    // The host ends the other direction, which ends the connection.
    host.shutdown(Half::Write).unwrap();
    let end = guest.expect(Operation::Shutdown, PORT, 1);
    assert_eq!(end.flags & 2, 2);
    guest.control(Operation::Reset, PORT, 1);
    drop(host);
    guest.connect(PORT, 1);
}

#[test]
fn a_host_that_finished_sending_still_receives() {
    let mut guest = Guest::new();
    let mut host = guest.connect(PORT, 1);
    host.write_all(b"question").unwrap();
    host.shutdown(Half::Write).unwrap();
    let (_, payload) = guest.receive();
    assert_eq!(payload, b"question");
    let end = guest.expect(Operation::Shutdown, PORT, 1);
    assert_eq!(end.flags, 2);
    guest.data(PORT, 1, b"answer");
    assert_eq!(read_exactly(&mut host, 6), b"answer");
    guest.shutdown(PORT, 1, 3);
    guest.expect(Operation::Reset, PORT, 1);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_guest_that_finished_receiving_breaks_the_host_pipe() {
    let mut guest = Guest::new();
    let mut host = guest.connect(PORT, 1);
    guest.shutdown(PORT, 1, 1);
    guest.data(PORT, 1, b"still talking");
    assert_eq!(read_exactly(&mut host, 13), b"still talking");
    assert_eq!(
        host.write(b"x").unwrap_err().kind(),
        std::io::ErrorKind::BrokenPipe
    );
}

#[test]
fn a_closed_host_socket_ends_the_connection_after_its_data() {
    let mut guest = Guest::new();
    let mut host = guest.connect(PORT, 1);
    host.write_all(&[7; 10_000]).unwrap();
    let started = Instant::now();
    drop(host);
    let mut got = 0;
    let end = loop {
        let (header, payload) = guest.receive();
        if header.operation() != Some(Operation::Data) {
            break header;
        }
        got += payload.len();
    };
    assert_eq!(got, 10_000);
    assert_eq!(end.operation(), Some(Operation::Shutdown));
    if end.flags != 3 {
        // The device met the end of the data before the close of the socket.
        assert_eq!(end.flags, 2);
        guest.expect_end(PORT, 1);
    }
    // The guest does not answer, so the device sends a reset.
    guest.expect(Operation::Reset, PORT, 1);
    assert!(started.elapsed() >= CLOSE_LIMIT);
    guest.wait_connections(0);
}

#[test]
fn data_sent_before_the_close_reaches_a_slow_reader() {
    let mut guest = Guest::new();
    let mut host = guest.connect(PORT, 1);
    let mut sent = 0;
    // Fill the socket, then the device's buffer.
    let mut credit = i64::from(HOST_BUFFER);
    while credit > 0 {
        let part = vec![(sent / 4096 % 256) as u8; 4096];
        guest.data(PORT, 1, &part);
        sent += 4096;
        guest.settle();
        let mut reported = None;
        while let Some((header, _)) = guest.try_receive() {
            reported = Some(header.fwd_cnt);
        }
        credit -= 4096;
        if let Some(forwarded) = reported {
            credit = i64::from(HOST_BUFFER) - (sent as i64 - i64::from(forwarded));
        }
    }
    guest.shutdown(PORT, 1, 3);
    guest.expect(Operation::Reset, PORT, 1);
    // The ports are free although the data still drains.
    guest.connect(PORT, 1);
    let mut all = Vec::new();
    host.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), sent);
    assert!(
        all.iter()
            .enumerate()
            .all(|(at, byte)| *byte == (at / 4096 % 256) as u8)
    );
}

#[test]
fn a_dial_connects_a_socket_to_a_port_of_the_guest() {
    let mut guest = Guest::new();
    let (mut host, theirs) = pair();
    host.write_all(b"early").unwrap();
    guest.device.handle().dial(41, 0x1_0050, vec![], theirs);
    let (request, _) = guest.receive();
    assert_eq!(request.operation(), Some(Operation::Request));
    assert_eq!(request.dst_port, 0x1_0050);
    let (ours, peer) = (request.src_port, request.dst_port);
    guest.control(Operation::Response, ours, peer);
    let (_, payload) = guest.receive();
    assert_eq!(payload, b"early");
    assert_eq!(guest.dialed(), (41, DialOutcome::Connected));
    guest.data(ours, peer, b"hello");
    assert_eq!(read_exactly(&mut host, 5), b"hello");
}

#[test]
fn first_bytes_of_a_dial_precede_those_of_its_socket() {
    let mut guest = Guest::new();
    let (mut host, theirs) = pair();
    host.write_all(b" later").unwrap();
    let handle = guest.device.handle();
    handle.dial(41, 21, b"request".to_vec(), theirs);
    let (request, _) = guest.receive();
    guest.control(Operation::Response, request.src_port, request.dst_port);
    let mut seen = Vec::new();
    while seen.len() < 13 {
        seen.extend(guest.receive().1);
    }
    assert_eq!(seen, b"request later");
    assert_eq!(guest.dialed(), (41, DialOutcome::Connected));
    // The first bytes need no byte of the socket.
    let (_silent, theirs) = pair();
    handle.dial(42, 21, b"request".to_vec(), theirs);
    let (request, _) = guest.receive();
    guest.control(Operation::Response, request.src_port, request.dst_port);
    assert_eq!(guest.receive().1, b"request");
}

#[test]
fn every_dial_has_a_result() {
    let mut guest = Guest::new();
    let handle = guest.device.handle();
    // The guest refuses.
    handle.dial(1, 80, vec![], pair().1);
    let (request, _) = guest.receive();
    guest.send(&request.reset(), &[]);
    assert_eq!(guest.dialed(), (1, DialOutcome::Refused));
    // The guest sends data before it accepts.
    handle.dial(2, 80, vec![], pair().1);
    let (request, _) = guest.receive();
    guest.data(request.src_port, 80, b"x");
    guest.expect(Operation::Reset, request.src_port, 80);
    assert_eq!(guest.dialed(), (2, DialOutcome::Refused));
    // A probe ends once it is accepted.
    handle.probe(3, 80);
    let (request, _) = guest.receive();
    guest.control(Operation::Response, request.src_port, 80);
    guest.expect(Operation::Reset, request.src_port, 80);
    assert_eq!(guest.dialed(), (3, DialOutcome::Connected));
    // The guest does not answer: the deadline ends the probe without another event.
    let started = Instant::now();
    handle.probe(4, 80);
    let (request, _) = guest.receive();
    assert_eq!(guest.dialed(), (4, DialOutcome::TimedOut));
    assert!(started.elapsed() >= LIMITS.dial);
    assert!(started.elapsed() < LIMITS.dial * 3);
    guest.expect(Operation::Reset, request.src_port, 80);
    // The guest answers too late.
    guest.control(Operation::Response, request.src_port, 80);
    guest.expect(Operation::Reset, request.src_port, 80);
    // The guest resets the device during the dial; then no driver is active.
    handle.dial(5, 80, vec![], pair().1);
    guest.receive();
    guest.device.reset();
    assert_eq!(guest.dialed(), (5, DialOutcome::Unavailable));
    handle.dial(6, 80, vec![], pair().1);
    assert_eq!(guest.dialed(), (6, DialOutcome::Unavailable));
}

#[test]
fn credit_requests_are_answered_and_sent_without_credit() {
    let mut guest = Guest::new();
    let mut host = guest.connect(PORT, 1);
    guest.control(Operation::CreditRequest, PORT, 1);
    guest.expect(Operation::CreditUpdate, PORT, 1);
    let mut update = Guest::header(Operation::CreditUpdate, PORT, 1);
    update.buf_alloc = 10;
    guest.send(&update, &[]);
    guest.settle();
    host.write_all(&[1; 25]).unwrap();
    let mut counts = Vec::new();
    for consumed in [10, 20, 25] {
        let (header, payload) = guest.receive();
        assert_eq!(header.operation(), Some(Operation::Data));
        counts.push(payload.len());
        if consumed < 25 {
            guest.expect(Operation::CreditRequest, PORT, 1);
        }
        update.fwd_cnt = consumed;
        guest.send(&update, &[]);
    }
    assert_eq!(counts, [10, 10, 5]);
}
