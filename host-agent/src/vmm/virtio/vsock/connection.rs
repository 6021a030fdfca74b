//! One vsock connection: its state and its credit. Pure; no I/O, no clock.
//!
//! Credit (virtio 1.2, 5.10.6.3) is what keeps a stalled reader from stalling
//! anybody else. Towards the guest the device sends no more than the guest has
//! buffer for, straight from the host socket into guest memory, so whatever
//! the guest claims costs the host nothing. From the guest it takes
//! [`HOST_BUFFER`] bytes at most, and what the host socket does not take at
//! once is all that is ever kept.

use std::num::Wrapping;

use super::packet::{Header, MAX_PAYLOAD, Operation, TYPE_STREAM};

/// Bytes of a guest's data that the host keeps for one connection at most,
/// and the buffer advertised to the guest.
pub const HOST_BUFFER: u32 = 64 * 1024;

/// The guest is told of freed buffer at the latest when this much was freed.
/// A quarter, so that a sender with a full window gets going again while the
/// rest still drains, and no more than one update in four packets.
const CREDIT_STEP: u32 = HOST_BUFFER / 4;

/// Both ends' ports; what names a connection on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ports {
    /// Port on the host.
    pub host: u32,
    /// Port in the guest.
    pub guest: u32,
}

/// Directions that one end has finished (virtio 1.2, 5.10.6.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shutdown {
    /// It receives no more.
    pub receive: bool,
    /// It sends no more.
    pub send: bool,
}

impl Shutdown {
    /// Both directions.
    pub const BOTH: Self = Self {
        receive: true,
        send: true,
    };

    /// From the flags of a packet; unknown flags are ignored.
    pub const fn from_flags(flags: u32) -> Self {
        Self {
            receive: flags & 1 != 0,
            send: flags & 2 != 0,
        }
    }

    /// As flags of a packet.
    pub const fn flags(self) -> u32 {
        self.receive as u32 | (self.send as u32) << 1
    }

    /// What either names: a direction once finished stays so.
    pub const fn and(self, other: Self) -> Self {
        Self {
            receive: self.receive || other.receive,
            send: self.send || other.send,
        }
    }

    /// Whether both directions are finished.
    pub const fn is_both(self) -> bool {
        self.receive && self.send
    }
}

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The host dialed; the guest has not answered.
    Dialing,
    /// Data flows.
    Open,
    /// The host finished both directions; the guest's reset is awaited.
    Closing,
    /// The guest is done and was told so; buffered data still drains to the
    /// host socket.
    Draining,
}

/// What a packet from the guest asks the caller to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing but to send what may have become due.
    Nothing,
    /// The guest accepted the dial.
    Connected,
    /// Write this many bytes of payload to the host socket or buffer them.
    Deliver(u32),
    /// The guest finished one direction or both; see [`Connection::guest_done`].
    Finished,
    /// The guest ended the connection.
    Reset,
    /// The guest broke the protocol: reset the connection. Says how.
    Violation(&'static str),
}

/// State and credit of one connection.
#[derive(Debug, Clone)]
pub struct Connection {
    ports: Ports,
    guest_cid: u64,
    phase: Phase,
    to_guest: ToGuest,
    from_guest: FromGuest,
    guest_done: Shutdown,
    host_done: Shutdown,
    pending: Pending,
}

/// Credit in the direction host to guest.
#[derive(Debug, Clone, Copy, Default)]
struct ToGuest {
    /// Bytes sent, modulo 2^32.
    sent: Wrapping<u32>,
    /// Bytes that the guest said it consumed.
    consumed: Wrapping<u32>,
    /// The guest's buffer.
    buffer: u32,
    /// The guest was asked for credit and has given none since.
    asked: bool,
}

/// Credit in the direction guest to host.
#[derive(Debug, Clone, Copy, Default)]
struct FromGuest {
    /// Bytes received, modulo 2^32.
    received: Wrapping<u32>,
    /// Bytes that the host socket took.
    forwarded: Wrapping<u32>,
    /// What the guest was last told of `forwarded`.
    told: Wrapping<u32>,
}

/// Packets without payload that are due.
#[derive(Debug, Clone, Copy, Default)]
struct Pending {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    shutdown: bool,
}

impl Connection {
    /// A connection that the guest asked for with `request`; the response is
    /// due.
    pub fn accepted(request: &Header) -> Self {
        let ports = Ports {
            host: request.dst_port,
            guest: request.src_port,
        };
        let mut connection = Self::new(ports, request.src_cid, Phase::Open);
        connection.to_guest.buffer = request.buf_alloc;
        connection.pending.response = true;
        connection
    }

    /// A connection that the host asks the guest for; the request is due.
    pub fn dialing(ports: Ports, guest_cid: u64) -> Self {
        let mut connection = Self::new(ports, guest_cid, Phase::Dialing);
        connection.pending.request = true;
        connection
    }

    fn new(ports: Ports, guest_cid: u64, phase: Phase) -> Self {
        Self {
            ports,
            guest_cid,
            phase,
            to_guest: ToGuest::default(),
            from_guest: FromGuest::default(),
            guest_done: Shutdown::default(),
            host_done: Shutdown::default(),
            pending: Pending::default(),
        }
    }

    /// Its ports.
    pub const fn ports(&self) -> Ports {
        self.ports
    }

    /// Where it is in its life.
    pub const fn phase(&self) -> Phase {
        self.phase
    }

    /// What the guest finished.
    pub const fn guest_done(&self) -> Shutdown {
        self.guest_done
    }

    /// What the host finished.
    pub const fn host_done(&self) -> Shutdown {
        self.host_done
    }

    /// Whether the guest is still to be told that there is a connection.
    pub const fn is_opening(&self) -> bool {
        self.pending.request || self.pending.response
    }

    /// Whether the guest ever heard of this connection.
    pub const fn was_announced(&self) -> bool {
        !self.pending.request
    }

    /// Takes a packet of the guest on this connection. `payload` is what the
    /// descriptors hold beyond the header.
    pub fn receive(&mut self, header: &Header, payload: u32) -> Verdict {
        let Some(operation) = header.operation() else {
            return Verdict::Violation("unknown operation");
        };
        if operation == Operation::Reset {
            return Verdict::Reset;
        }
        self.take_credit(header);
        match (self.phase, operation) {
            (Phase::Dialing, Operation::Response) if !self.pending.request => {
                self.phase = Phase::Open;
                Verdict::Connected
            }
            (Phase::Dialing, _) => Verdict::Violation("packet before the connection is made"),
            (_, Operation::Request) => Verdict::Violation("request for ports in use"),
            (_, Operation::Response) => Verdict::Violation("response without a request"),
            (_, Operation::CreditUpdate) => Verdict::Nothing,
            (_, Operation::CreditRequest) => {
                self.pending.credit_update = true;
                Verdict::Nothing
            }
            (_, Operation::Data) => self.take_data(header.len, payload),
            (_, Operation::Shutdown) => {
                self.guest_done = self.guest_done.and(header.shutdown());
                Verdict::Finished
            }
            (_, Operation::Reset) => Verdict::Reset,
        }
    }

    fn take_credit(&mut self, header: &Header) {
        let credit = &mut self.to_guest;
        credit.buffer = header.buf_alloc;
        // Counters may arrive out of order, as two threads of a guest can fill
        // headers in one order and queue them in the other. What lies outside
        // of [consumed, sent] is such an old value, or a lie; either way the
        // better knowledge stays.
        let consumed = Wrapping(header.fwd_cnt);
        if consumed - credit.consumed <= credit.sent - credit.consumed {
            credit.consumed = consumed;
        }
        if self.allowance() > 0 {
            self.to_guest.asked = false;
        }
    }

    fn take_data(&mut self, len: u32, payload: u32) -> Verdict {
        if self.guest_done.send {
            return Verdict::Violation("data after the end of data");
        }
        if len > MAX_PAYLOAD || len > payload {
            return Verdict::Violation("length beyond the payload");
        }
        if len > HOST_BUFFER.saturating_sub(self.buffered()) {
            return Verdict::Violation("data beyond the credit");
        }
        self.from_guest.received += len;
        if self.host_done.receive {
            // The guest may not know yet that nobody reads any more.
            self.forwarded(len);
            return Verdict::Nothing;
        }
        Verdict::Deliver(len)
    }

    /// Bytes received and not yet forwarded.
    pub fn buffered(&self) -> u32 {
        (self.from_guest.received - self.from_guest.forwarded).0
    }

    /// The host socket took `len` bytes, or they were dropped because nobody
    /// reads them.
    pub fn forwarded(&mut self, len: u32) {
        let credit = &mut self.from_guest;
        debug_assert!(len <= (credit.received - credit.forwarded).0);
        credit.forwarded += len;
        if (credit.forwarded - credit.told).0 >= CREDIT_STEP {
            self.pending.credit_update = true;
        }
    }

    /// Bytes that may be sent to the guest now.
    pub fn allowance(&self) -> u32 {
        if self.phase != Phase::Open || self.guest_done.receive || self.host_done.send {
            return 0;
        }
        let in_flight = (self.to_guest.sent - self.to_guest.consumed).0;
        self.to_guest.buffer.saturating_sub(in_flight)
    }

    /// Whether the guest still wants what the host socket says.
    pub const fn wants_host_data(&self) -> bool {
        matches!(self.phase, Phase::Open) && !self.guest_done.receive && !self.host_done.send
    }

    /// There is data for the guest and no credit: ask for it, once.
    pub fn starved(&mut self) {
        if self.wants_host_data() && !self.to_guest.asked {
            self.to_guest.asked = true;
            self.pending.credit_request = true;
        }
    }

    /// The host finished directions. When it has finished both, the connection
    /// closes and its socket is of no more use.
    pub fn finish(&mut self, done: Shutdown) {
        let done = self.host_done.and(done);
        if done != self.host_done {
            self.host_done = done;
            self.pending.shutdown = true;
        }
        if done.is_both() && self.phase == Phase::Open {
            self.phase = Phase::Closing;
        }
        if done.receive {
            let dropped = self.buffered();
            self.forwarded(dropped);
        }
    }

    /// The guest is done; buffered data drains on, and no more is said.
    pub fn drain(&mut self) {
        self.phase = Phase::Draining;
        self.pending = Pending::default();
    }

    /// Whether a packet without payload is due.
    pub const fn has_control(&self) -> bool {
        let due = &self.pending;
        due.request || due.response || due.credit_update || due.credit_request || due.shutdown
    }

    /// The next packet without payload that is due, in the order in which the
    /// guest must see them.
    pub fn next_control(&mut self) -> Option<Header> {
        let due = &mut self.pending;
        let operation = if std::mem::take(&mut due.request) {
            Operation::Request
        } else if std::mem::take(&mut due.response) {
            Operation::Response
        } else if std::mem::take(&mut due.shutdown) {
            Operation::Shutdown
        } else if std::mem::take(&mut due.credit_request) {
            Operation::CreditRequest
        } else if std::mem::take(&mut due.credit_update) {
            Operation::CreditUpdate
        } else {
            return None;
        };
        let mut header = self.header(operation, 0);
        if operation == Operation::Shutdown {
            header.flags = self.host_done.flags();
        }
        Some(header)
    }

    /// The header of a packet with `len` bytes of payload, which counts as
    /// sent.
    pub fn data_header(&mut self, len: u32) -> Header {
        debug_assert!(len <= self.allowance());
        self.to_guest.sent += len;
        self.header(Operation::Data, len)
    }

    /// The packet that ends the connection at once.
    pub fn reset_header(&mut self) -> Header {
        self.header(Operation::Reset, 0)
    }

    /// Every packet carries the credit, so an update that was due is done.
    fn header(&mut self, operation: Operation, len: u32) -> Header {
        self.from_guest.told = self.from_guest.forwarded;
        self.pending.credit_update = false;
        Header {
            src_cid: u64::from(vmbus::channel::HOST_CID),
            dst_cid: self.guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len,
            kind: TYPE_STREAM,
            op: operation.code(),
            flags: 0,
            buf_alloc: HOST_BUFFER,
            fwd_cnt: self.from_guest.forwarded.0,
        }
    }
}
