//! vsock credit against a model of both ends: the bytes in flight never exceed the
//! receiver's buffer, and every byte arrives once and in order.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;

use proptest::prelude::*;

use super::driver::*;
use crate::vmm::virtio::queue::EVENT_IDX;
use crate::vmm::virtio::vsock::connection::{Connection, HOST_BUFFER, Verdict};
use crate::vmm::virtio::vsock::packet::{Header, MAX_PAYLOAD, Operation};

/// Connections of a session, which share the rings.
const STREAMS: u32 = 3;
/// Initial buffer of the guest.
const FIRST_BUFFER: u32 = 10_000;

/// An action of one of the ends.
#[derive(Debug, Clone, Copy)]
enum SessionStep {
    /// The guest sends up to this many bytes, within its credit.
    Send(u32),
    /// The guest's reader consumes up to this many bytes.
    Consume(u32),
    /// The guest sends a credit update.
    UpdateCredit,
    /// The guest sends a credit request.
    RequestCredit,
    /// The guest resizes its buffer, even below its content.
    Resize(u32),
    /// The host writes up to this many bytes.
    Write(u32),
    /// The host reads up to this many bytes.
    Read(u32),
    /// The guest takes up to this many packets.
    Take(u32),
}

/// One connection as seen by both ends, with byte counts since its start.
struct Stream {
    ports: (u32, u32),
    host: UnixStream,
    /// Host to guest: written to the socket, received, consumed by the reader.
    written: u64,
    received: u64,
    consumed: u64,
    buffer: u32,
    /// The device must not send beyond this byte.
    limit: u64,
    /// Guest to host: sent, read from the socket.
    sent: u64,
    read: u64,
    /// The last `fwd_cnt` of the device.
    forwarded: u64,
}

struct Session {
    guest: Guest,
    streams: Vec<Stream>,
}

/// Byte `at` of the stream `of`.
fn byte(of: u32, at: u64) -> u8 {
    ((at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 ^ of as u8
}

fn bytes(of: u32, from: u64, len: u64) -> Vec<u8> {
    (from..from + len).map(|at| byte(of, at)).collect()
}

impl Stream {
    /// Bytes that the guest may send now.
    fn credit(&self) -> u64 {
        u64::from(HOST_BUFFER) - (self.sent - self.forwarded)
    }

    /// A header that carries the guest's credit.
    fn header(&mut self, operation: Operation) -> Header {
        self.limit = self.limit.max(self.consumed + u64::from(self.buffer));
        Header {
            buf_alloc: self.buffer,
            fwd_cnt: self.consumed as u32,
            ..Guest::header(operation, self.ports.0, self.ports.1)
        }
    }

    fn write(&mut self, len: u64) -> bool {
        let part = bytes(self.ports.1, self.written, len);
        match self.host.write(&part) {
            Ok(count) => {
                self.written += count as u64;
                true
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(error) => panic!("{error}"),
        }
    }

    fn read(&mut self, len: u64) {
        let mut part = vec![0; len as usize];
        match self.host.read(&mut part) {
            Ok(count) => {
                let expected = bytes(!self.ports.1, self.read, count as u64);
                assert!(part[..count] == expected, "at {}", self.read);
                self.read += count as u64;
                assert!(self.read <= self.sent);
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }

    /// Checks a packet of the device against the model.
    fn packet(&mut self, header: &Header, payload: &[u8]) {
        assert_eq!(header.buf_alloc, HOST_BUFFER);
        // No session sends 4 GiB, so the counter does not wrap.
        let forwarded = u64::from(header.fwd_cnt);
        assert!(self.forwarded <= forwarded && forwarded <= self.sent);
        self.forwarded = forwarded;
        match header.operation().unwrap() {
            Operation::Data => {
                assert!(!payload.is_empty());
                let expected = bytes(self.ports.1, self.received, payload.len() as u64);
                assert!(payload == expected, "at {}", self.received);
                self.received += payload.len() as u64;
                assert!(self.received <= self.limit, "beyond the credit");
            }
            Operation::CreditUpdate | Operation::CreditRequest => {}
            other => panic!("{other:?} to a valid guest"),
        }
    }
}

impl Session {
    fn new(buffers: Buffers, features: u64) -> Self {
        let mut guest = Guest::with(buffers, features);
        let streams = (0..STREAMS).map(|n| {
            let mut request = Guest::header(Operation::Request, PORT + n, 100 + n);
            request.buf_alloc = FIRST_BUFFER;
            guest.send(&request, &[]);
            guest.expect(Operation::Response, PORT + n, 100 + n);
            let host = guest.opened();
            host.set_nonblocking(true).unwrap();
            Stream {
                ports: (PORT + n, 100 + n),
                host,
                written: 0,
                received: 0,
                consumed: 0,
                buffer: FIRST_BUFFER,
                limit: u64::from(FIRST_BUFFER),
                sent: 0,
                read: 0,
                forwarded: 0,
            }
        });
        let streams = streams.collect();
        Self { guest, streams }
    }

    fn take(&mut self, (header, payload): (Header, Vec<u8>)) {
        let stream = &mut self.streams[(header.dst_port - 100) as usize];
        assert_eq!(stream.ports, (header.src_port, header.dst_port));
        stream.packet(&header, &payload);
    }

    fn take_all(&mut self) {
        while let Some(packet) = self.guest.try_receive() {
            self.take(packet);
        }
    }

    fn send(&mut self, of: usize, len: u64) {
        let stream = &mut self.streams[of];
        let len = len.min(stream.credit());
        if len > 0 {
            let payload = bytes(!stream.ports.1, stream.sent, len);
            let mut header = stream.header(Operation::Data);
            header.len = len as u32;
            stream.sent += len;
            self.guest.send(&header, &payload);
        }
    }

    fn send_credit(&mut self, of: usize, operation: Operation) {
        let header = self.streams[of].header(operation);
        self.guest.send(&header, &[]);
    }

    fn step(&mut self, of: usize, step: SessionStep) {
        let stream = &mut self.streams[of];
        match step {
            SessionStep::Send(len) => self.send(of, u64::from(len)),
            SessionStep::Consume(len) => {
                stream.consumed = stream.received.min(stream.consumed + u64::from(len));
            }
            SessionStep::UpdateCredit => self.send_credit(of, Operation::CreditUpdate),
            SessionStep::RequestCredit => self.send_credit(of, Operation::CreditRequest),
            SessionStep::Resize(len) => {
                stream.buffer = len;
                self.send_credit(of, Operation::CreditUpdate);
                // After `settle` the device uses the new credit, and all packets
                // within the old one are in the ring.
                self.guest.settle();
                self.take_all();
                let stream = &mut self.streams[of];
                let limit = stream.consumed + u64::from(stream.buffer);
                stream.limit = stream.received.max(limit);
            }
            SessionStep::Write(len) => {
                stream.write(u64::from(len));
            }
            SessionStep::Read(len) => stream.read(u64::from(len)),
            SessionStep::Take(count) => {
                for _ in 0..count {
                    let Some(packet) = self.guest.try_receive() else {
                        break;
                    };
                    self.take(packet);
                }
            }
        }
    }

    /// Delivers everything and `more` bytes in both directions, with each end
    /// sending only within its credit.
    fn finish(&mut self, of: usize, more: u64) {
        self.streams[of].buffer = FIRST_BUFFER;
        let (sent, written) = (
            self.streams[of].sent + more,
            self.streams[of].written + more,
        );
        loop {
            let stream = &mut self.streams[of];
            if stream.received == written {
                break;
            }
            let rest = written - stream.written;
            stream.write(rest);
            stream.consumed = stream.received;
            self.send_credit(of, Operation::CreditUpdate);
            while self.streams[of].received == self.streams[of].consumed {
                let packet = self.guest.receive();
                self.take(packet);
            }
        }
        self.streams[of].host.set_nonblocking(false).unwrap();
        loop {
            self.send(of, sent - self.streams[of].sent);
            let stream = &mut self.streams[of];
            while stream.read < stream.sent {
                stream.read(stream.sent - stream.read);
            }
            if stream.read == sent {
                break;
            }
            while self.streams[of].credit() == 0 {
                let packet = self.guest.receive();
                self.take(packet);
            }
        }
    }
}

fn step(payload: u32) -> impl Strategy<Value = SessionStep> {
    // Packets are as small as the receive buffers: limit their number.
    let written = (payload * 64).min(100_000);
    prop_oneof![
        4 => (0..70_000_u32).prop_map(SessionStep::Send),
        2 => (0..20_000_u32).prop_map(SessionStep::Consume),
        2 => Just(SessionStep::UpdateCredit),
        1 => Just(SessionStep::RequestCredit),
        1 => prop_oneof![Just(0), 1..30_000_u32, Just(u32::MAX)].prop_map(SessionStep::Resize),
        4 => (1..=written).prop_map(SessionStep::Write),
        4 => (1..100_000_u32).prop_map(SessionStep::Read),
        3 => (1..100_u32).prop_map(SessionStep::Take),
    ]
}

/// Receive buffers as in Linux before and after 6.3, tiny, huge, or few.
fn buffers() -> impl Strategy<Value = Buffers> {
    let size = prop_oneof![
        Just((4096, 128)),
        Just((3776, 128)),
        Just((65_536, 40)),
        Just((1, 128)),
        (1..5000_u32, 1..128_u16),
    ];
    (size, any::<bool>()).prop_map(|((payload, count), split)| Buffers {
        count,
        payload,
        split,
    })
}

fn session() -> impl Strategy<Value = (Buffers, Vec<(usize, SessionStep)>)> {
    buffers().prop_flat_map(|buffers| {
        let step = (0..STREAMS as usize, step(buffers.payload));
        (Just(buffers), prop::collection::vec(step, 1..120))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 100, failure_persistence: None, ..crate::property::cases(32) })]

    #[test]
    fn every_byte_arrives_within_the_credit(
        (buffers, steps) in session(),
        event_idx: bool,
    ) {
        let features = if event_idx { EVENT_IDX } else { 0 };
        let mut session = Session::new(buffers, features);
        for (of, step) in steps {
            session.step(of, step);
        }
        let more = u64::from(buffers.payload * 100).min(3 * u64::from(HOST_BUFFER));
        for of in 0..STREAMS as usize {
            session.finish(of, more);
        }
    }
}

/// An event of a connection without rings and sockets.
#[derive(Debug, Clone, Copy)]
enum CreditEvent {
    /// The guest reports this many more consumed bytes, perhaps more than were
    /// sent, and a buffer.
    Near(u32, u32),
    /// The guest reports any counter and any buffer.
    Wild(u32, u32),
    /// The host sends up to this many bytes.
    Send(u32),
    /// The guest sends a packet of this length.
    Receive(u32),
    /// The host socket accepts up to this many bytes.
    Forward(u32),
    /// The device sends the control packets that are due.
    SendControl,
}

fn claimed_buffer() -> impl Strategy<Value = u32> {
    prop_oneof![3 => 0..5000_u32, 1 => any::<u32>(), 1 => Just(u32::MAX)]
}

fn credit_event() -> impl Strategy<Value = CreditEvent> {
    let length = || prop_oneof![4 => 0..=MAX_PAYLOAD, 1 => any::<u32>()];
    prop_oneof![
        3 => (0..5000_u32, claimed_buffer()).prop_map(|(count, buffer)| CreditEvent::Near(count, buffer)),
        1 => (any::<u32>(), claimed_buffer()).prop_map(|(count, buffer)| CreditEvent::Wild(count, buffer)),
        4 => prop_oneof![4 => 0..9000_u32, 1 => any::<u32>()].prop_map(CreditEvent::Send),
        4 => length().prop_map(CreditEvent::Receive),
        4 => (0..=HOST_BUFFER).prop_map(CreditEvent::Forward),
        2 => Just(CreditEvent::SendControl),
    ]
}

/// The counters of both ends in 64 bits, which never wrap.
#[derive(Debug, Clone, Copy)]
struct CreditModel {
    sent: u64,
    consumed: u64,
    buffer: u32,
    received: u64,
    forwarded: u64,
    /// The last value of `forwarded` that was sent to the guest.
    reported: u64,
}

impl CreditModel {
    fn allowance(&self) -> u64 {
        u64::from(self.buffer).saturating_sub(self.sent - self.consumed)
    }

    fn held(&self) -> u64 {
        self.received - self.forwarded
    }

    /// Applies the guest's `fwd_cnt`: the value from `consumed` up to `sent` with
    /// these low 32 bits, if there is one.
    fn receive_credit(&mut self, count: u32, buffer: u32) {
        self.buffer = buffer;
        let consumed = self.consumed + u64::from(count.wrapping_sub(self.consumed as u32));
        if consumed <= self.sent {
            self.consumed = consumed;
        }
    }

    fn check_header(&mut self, header: &Header) {
        assert_eq!(header.fwd_cnt, self.forwarded as u32);
        assert_eq!(header.buf_alloc, HOST_BUFFER);
        self.reported = self.forwarded;
    }
}

/// A connection after nearly 4 GiB in both directions, and its model: its counters
/// are about to wrap.
static NEARLY_WRAPPED: LazyLock<(Connection, CreditModel)> = LazyLock::new(|| {
    let mut header = Guest::header(Operation::Request, PORT, 1);
    let mut connection = Connection::accepted(&header);
    while connection.next_control().is_some() {}
    header.op = Operation::Data.code();
    header.len = MAX_PAYLOAD - 1;
    let part = u64::from(header.len);
    let mut total = 0;
    while total + part < 1 << 32 {
        total += part;
        connection.data_header(header.len);
        header.fwd_cnt = total as u32;
        let verdict = connection.receive(&header, header.len);
        assert_eq!(verdict, Verdict::Deliver(header.len));
        connection.forwarded(header.len);
        while connection.next_control().is_some() {}
    }
    let model = CreditModel {
        sent: total,
        consumed: total,
        buffer: header.buf_alloc,
        received: total,
        forwarded: total,
        reported: total,
    };
    (connection, model)
});

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..crate::property::cases(500) })]

    #[test]
    fn no_claim_exceeds_a_buffer_while_counters_wrap(
        events in prop::collection::vec(credit_event(), 1..100),
    ) {
        let (mut connection, mut model) = NEARLY_WRAPPED.clone();
        let mut header = Guest::header(Operation::CreditUpdate, PORT, 1);
        for next in events {
            header.op = Operation::CreditUpdate.code();
            header.len = 0;
            header.fwd_cnt = model.consumed as u32;
            header.buf_alloc = model.buffer;
            match next {
                CreditEvent::Near(more, buffer) => {
                    header.fwd_cnt = header.fwd_cnt.wrapping_add(more);
                    header.buf_alloc = buffer;
                    prop_assert_eq!(connection.receive(&header, 0), Verdict::Update);
                    model.receive_credit(header.fwd_cnt, buffer);
                }
                CreditEvent::Wild(count, buffer) => {
                    header.fwd_cnt = count;
                    header.buf_alloc = buffer;
                    prop_assert_eq!(connection.receive(&header, 0), Verdict::Update);
                    model.receive_credit(count, buffer);
                }
                CreditEvent::Send(wanted) => {
                    let len = wanted.min(connection.allowance());
                    if len > 0 {
                        let sent = connection.data_header(len);
                        model.check_header(&sent);
                        prop_assert_eq!(sent.len, len);
                        model.sent += u64::from(len);
                        prop_assert!(model.sent - model.consumed <= u64::from(model.buffer));
                    }
                }
                CreditEvent::Receive(len) => {
                    header.op = Operation::Data.code();
                    header.len = len;
                    let free = u64::from(HOST_BUFFER) - model.held();
                    let fits = len <= MAX_PAYLOAD && u64::from(len) <= free;
                    match connection.clone().receive(&header, len) {
                        Verdict::Deliver(given) => {
                            prop_assert!(fits && given == len);
                            connection.receive(&header, len);
                            model.received += u64::from(len);
                        }
                        // The muxer would reset the connection.
                        Verdict::Violation(_) => prop_assert!(!fits),
                        other => prop_assert!(false, "{:?}", other),
                    }
                }
                CreditEvent::Forward(len) => {
                    let len = u64::from(len).min(model.held());
                    connection.forwarded(len as u32);
                    model.forwarded += len;
                }
                CreditEvent::SendControl => while let Some(sent) = connection.next_control() {
                    model.check_header(&sent);
                },
            }
            prop_assert_eq!(u64::from(connection.allowance()), model.allowance());
            prop_assert_eq!(u64::from(connection.buffered()), model.held());
            // A guest that waits for credit gets an update in time.
            let unreported = model.forwarded - model.reported;
            prop_assert!(unreported < u64::from(HOST_BUFFER / 4) || connection.has_control());
        }
    }
}
