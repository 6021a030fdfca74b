//! vsock credit, against a model of both ends: what is in flight never exceeds
//! what the receiver has room for, and every byte arrives once and in order.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;

use proptest::prelude::*;

use super::driver::*;
use crate::vmm::virtio::queue::EVENT_IDX;
use crate::vmm::virtio::vsock::connection::{Connection, HOST_BUFFER, Verdict};
use crate::vmm::virtio::vsock::packet::{Header, MAX_PAYLOAD, Operation};

/// A channel's host port.
const PORT: u32 = 10;
/// Connections of a session; they share the rings.
const STREAMS: u32 = 3;
/// The guest's buffer at first.
const FIRST_BUFFER: u32 = 10_000;

/// Something that one of the ends does.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// The guest sends as much of this as it has credit for.
    Send(u32),
    /// The guest's reader takes as much of this as was received.
    Consume(u32),
    /// The guest says what credit it gives.
    Tell,
    /// The guest asks for credit.
    Ask,
    /// The guest's buffer becomes this long, with more in it if need be.
    Resize(u32),
    /// The host writes as much of this as its socket takes.
    Write(u32),
    /// The host reads as much of this as there is.
    Read(u32),
    /// The guest takes this many packets, if there are.
    Take(u32),
}

/// One connection, as its two ends see it. Byte counts are since its begin.
struct Stream {
    ports: (u32, u32),
    host: UnixStream,
    /// Host to guest: written to the socket, received, taken by the reader.
    written: u64,
    received: u64,
    consumed: u64,
    buffer: u32,
    /// The device may not send beyond this byte.
    edge: u64,
    /// Guest to host: sent, read from the socket.
    sent: u64,
    read: u64,
    /// What the device said that it forwarded.
    forwarded: u64,
}

struct Session {
    guest: Guest,
    streams: Vec<Stream>,
}

/// Byte `at` of a direction of a connection.
fn byte(of: u32, at: u64) -> u8 {
    ((at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 ^ of as u8
}

fn bytes(of: u32, from: u64, len: u64) -> Vec<u8> {
    (from..from + len).map(|at| byte(of, at)).collect()
}

impl Stream {
    /// What the guest may send now.
    fn credit(&self) -> u64 {
        u64::from(HOST_BUFFER) - (self.sent - self.forwarded)
    }

    /// A header that carries the guest's credit.
    fn header(&mut self, operation: Operation) -> Header {
        self.edge = self.edge.max(self.consumed + u64::from(self.buffer));
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

    /// Takes a packet of the device, after what it may send and say.
    fn packet(&mut self, header: &Header, payload: &[u8]) {
        assert_eq!(header.buf_alloc, HOST_BUFFER);
        // The low 32 bits are all of it: nothing here sends more.
        let forwarded = u64::from(header.fwd_cnt);
        assert!(self.forwarded <= forwarded && forwarded <= self.sent);
        self.forwarded = forwarded;
        match header.operation().unwrap() {
            Operation::Data => {
                assert!(!payload.is_empty());
                let expected = bytes(self.ports.1, self.received, payload.len() as u64);
                assert!(payload == expected, "at {}", self.received);
                self.received += payload.len() as u64;
                assert!(self.received <= self.edge, "beyond the credit");
            }
            Operation::CreditUpdate | Operation::CreditRequest => {}
            other => panic!("{other:?} to an honest guest"),
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
                edge: u64::from(FIRST_BUFFER),
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

    fn tell(&mut self, of: usize, operation: Operation) {
        let header = self.streams[of].header(operation);
        self.guest.send(&header, &[]);
    }

    fn step(&mut self, of: usize, step: Step) {
        let stream = &mut self.streams[of];
        match step {
            Step::Send(len) => self.send(of, u64::from(len)),
            Step::Consume(len) => {
                stream.consumed = stream.received.min(stream.consumed + u64::from(len));
            }
            Step::Tell => self.tell(of, Operation::CreditUpdate),
            Step::Ask => self.tell(of, Operation::CreditRequest),
            Step::Resize(len) => {
                stream.buffer = len;
                self.tell(of, Operation::CreditUpdate);
                // The device has taken the new credit, and what it sent after
                // the old one is in the ring: from now on the new one counts.
                self.guest.settle();
                self.take_all();
                let stream = &mut self.streams[of];
                let edge = stream.consumed + u64::from(stream.buffer);
                stream.edge = stream.received.max(edge);
            }
            Step::Write(len) => {
                stream.write(u64::from(len));
            }
            Step::Read(len) => stream.read(u64::from(len)),
            Step::Take(count) => {
                for _ in 0..count {
                    let Some(packet) = self.guest.try_receive() else {
                        break;
                    };
                    self.take(packet);
                }
            }
        }
    }

    /// All of it arrives, and `more` in either direction after it, though each
    /// end sends only after what it was told.
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
            self.tell(of, Operation::CreditUpdate);
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

fn step(payload: u32) -> impl Strategy<Value = Step> {
    // Packets are as small as the receive buffers: no more than some of them.
    let written = (payload * 64).min(100_000);
    prop_oneof![
        4 => (0..70_000_u32).prop_map(Step::Send),
        2 => (0..20_000_u32).prop_map(Step::Consume),
        2 => Just(Step::Tell),
        1 => Just(Step::Ask),
        1 => prop_oneof![Just(0), 1..30_000_u32, Just(u32::MAX)].prop_map(Step::Resize),
        4 => (1..=written).prop_map(Step::Write),
        4 => (1..100_000_u32).prop_map(Step::Read),
        3 => (1..100_u32).prop_map(Step::Take),
    ]
}

/// Receive buffers of every kind: of Linux before and after 6.3, tiny, huge,
/// and too few.
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

fn session() -> impl Strategy<Value = (Buffers, Vec<(usize, Step)>)> {
    buffers().prop_flat_map(|buffers| {
        let step = (0..STREAMS as usize, step(buffers.payload));
        (Just(buffers), prop::collection::vec(step, 1..120))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, max_shrink_iters: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_in_flight_never_exceeds_the_credit_and_every_byte_arrives(
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

/// What the ends of a connection say, true or not, without rings or sockets.
#[derive(Debug, Clone, Copy)]
enum Move {
    /// The guest says that it consumed this much more than was known (which
    /// may be more than was sent), and that its buffer is so long.
    Near(u32, u32),
    /// The guest says any count and any buffer.
    Wild(u32, u32),
    /// The host has this many bytes for the guest.
    Send(u32),
    /// The guest sends a packet of this length.
    Receive(u32),
    /// The host socket takes up to this many.
    Forward(u32),
    /// The device sends what is due.
    Speak,
}

fn claimed_buffer() -> impl Strategy<Value = u32> {
    prop_oneof![3 => 0..5000_u32, 1 => any::<u32>(), 1 => Just(u32::MAX)]
}

fn a_move() -> impl Strategy<Value = Move> {
    let length = || prop_oneof![4 => 0..=MAX_PAYLOAD, 1 => any::<u32>()];
    prop_oneof![
        3 => (0..5000_u32, claimed_buffer()).prop_map(|(count, buffer)| Move::Near(count, buffer)),
        1 => (any::<u32>(), claimed_buffer()).prop_map(|(count, buffer)| Move::Wild(count, buffer)),
        4 => prop_oneof![4 => 0..9000_u32, 1 => any::<u32>()].prop_map(Move::Send),
        4 => length().prop_map(Move::Receive),
        4 => (0..=HOST_BUFFER).prop_map(Move::Forward),
        2 => Just(Move::Speak),
    ]
}

/// Both ends in 64 bits, which never wrap.
#[derive(Debug, Clone, Copy)]
struct Model {
    sent: u64,
    consumed: u64,
    buffer: u32,
    received: u64,
    forwarded: u64,
    /// What the guest was told of `forwarded`.
    told: u64,
}

impl Model {
    fn allowance(&self) -> u64 {
        u64::from(self.buffer).saturating_sub(self.sent - self.consumed)
    }

    fn held(&self) -> u64 {
        self.received - self.forwarded
    }

    /// The guest says `count`: it is the number of bytes between what it said
    /// before and what was sent that looks so in 32 bits, if there is one.
    fn hear(&mut self, count: u32, buffer: u32) {
        self.buffer = buffer;
        let heard = self.consumed + u64::from(count.wrapping_sub(self.consumed as u32));
        if heard <= self.sent {
            self.consumed = heard;
        }
    }

    fn said(&mut self, header: &Header) {
        assert_eq!(header.fwd_cnt, self.forwarded as u32);
        assert_eq!(header.buf_alloc, HOST_BUFFER);
        self.told = self.forwarded;
    }
}

/// A connection on which nearly 4 GiB went either way, and its model: the
/// counters are about to wrap.
static OLD: LazyLock<(Connection, Model)> = LazyLock::new(|| {
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
    let model = Model {
        sent: total,
        consumed: total,
        buffer: header.buf_alloc,
        received: total,
        forwarded: total,
        told: total,
    };
    (connection, model)
});

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_claim_moves_more_than_either_buffer_though_counters_wrap(
        moves in prop::collection::vec(a_move(), 1..100),
    ) {
        let (mut connection, mut model) = OLD.clone();
        let mut header = Guest::header(Operation::CreditUpdate, PORT, 1);
        for next in moves {
            header.op = Operation::CreditUpdate.code();
            header.len = 0;
            header.fwd_cnt = model.consumed as u32;
            header.buf_alloc = model.buffer;
            match next {
                Move::Near(more, buffer) => {
                    header.fwd_cnt = header.fwd_cnt.wrapping_add(more);
                    header.buf_alloc = buffer;
                    prop_assert_eq!(connection.receive(&header, 0), Verdict::Nothing);
                    model.hear(header.fwd_cnt, buffer);
                }
                Move::Wild(count, buffer) => {
                    header.fwd_cnt = count;
                    header.buf_alloc = buffer;
                    prop_assert_eq!(connection.receive(&header, 0), Verdict::Nothing);
                    model.hear(count, buffer);
                }
                Move::Send(wanted) => {
                    let len = wanted.min(connection.allowance());
                    if len > 0 {
                        let said = connection.data_header(len);
                        model.said(&said);
                        prop_assert_eq!(said.len, len);
                        model.sent += u64::from(len);
                        prop_assert!(model.sent - model.consumed <= u64::from(model.buffer));
                    }
                }
                Move::Receive(len) => {
                    header.op = Operation::Data.code();
                    header.len = len;
                    let room = u64::from(HOST_BUFFER) - model.held();
                    let fits = len <= MAX_PAYLOAD && u64::from(len) <= room;
                    match connection.clone().receive(&header, len) {
                        Verdict::Deliver(given) => {
                            prop_assert!(fits && given == len);
                            connection.receive(&header, len);
                            model.received += u64::from(len);
                        }
                        // The connection would end here.
                        Verdict::Violation(_) => prop_assert!(!fits),
                        other => prop_assert!(false, "{:?}", other),
                    }
                }
                Move::Forward(len) => {
                    let len = u64::from(len).min(model.held());
                    connection.forwarded(len as u32);
                    model.forwarded += len;
                }
                Move::Speak => while let Some(said) = connection.next_control() {
                    model.said(&said);
                },
            }
            prop_assert_eq!(u64::from(connection.allowance()), model.allowance());
            prop_assert_eq!(u64::from(connection.buffered()), model.held());
            // A guest that waits for credit hears of it in good time.
            let untold = model.forwarded - model.told;
            prop_assert!(untold < u64::from(HOST_BUFFER / 4) || connection.has_control());
        }
    }
}
