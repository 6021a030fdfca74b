//! State and credit of one vsock connection. Pure: no I/O, no clock.
//!
//! Credit (virtio 1.2, 5.10.6.3) keeps a stalled reader from blocking other
//! connections. Data for the guest goes from the host socket straight into guest
//! memory, within the buffer that the guest advertises, so a false claim of the
//! guest costs no host memory. Data of the guest is limited to [`HOST_BUFFER`]
//! bytes; only bytes that the host socket does not accept at once are buffered.

use std::num::Wrapping;

use super::packet::{Header, MAX_PAYLOAD, Operation, TYPE_STREAM};

/// Most bytes of a guest's data that the host buffers for one connection, and the
/// `buf_alloc` advertised to the guest.
pub const HOST_BUFFER: u32 = 64 * 1024;

/// A credit update is due once this many bytes were freed. With a quarter of the
/// buffer, a sender with a full window continues while the rest drains, and there
/// is at most one update for four full packets.
const CREDIT_STEP: u32 = HOST_BUFFER / 4;

/// The ports of both ends, which identify a connection.
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
    /// The end receives no more.
    pub receive: bool,
    /// The end sends no more.
    pub send: bool,
}

impl Shutdown {
    /// Both directions.
    pub const BOTH: Self = Self {
        receive: true,
        send: true,
    };

    /// Parses the flags of a packet; unknown flags are ignored.
    pub const fn from_flags(flags: u32) -> Self {
        Self {
            receive: flags & 1 != 0,
            send: flags & 2 != 0,
        }
    }

    /// The flags of a packet.
    pub const fn flags(self) -> u32 {
        self.receive as u32 | (self.send as u32) << 1
    }

    /// The union of both: a finished direction stays finished.
    pub const fn union(self, other: Self) -> Self {
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

/// Phase of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The host dialed; the guest has not answered.
    Dialing,
    /// The connection is established.
    Open,
    /// The host finished both directions and waits for the guest's reset.
    Closing,
    /// The connection has ended for the guest; buffered data still drains to the
    /// host socket.
    Draining,
}

/// What the caller must do for a packet of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Act on the new state: see [`Connection::guest_done`] and
    /// [`Connection::has_control`].
    Update,
    /// The guest accepted the dial.
    Connected,
    /// Write this many bytes of payload to the host socket, or buffer them.
    Deliver(u32),
    /// The guest ended the connection.
    Reset,
    /// The guest violated the protocol: reset the connection.
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
    /// Bytes that the guest reports as consumed (`fwd_cnt`).
    consumed: Wrapping<u32>,
    /// The guest's buffer (`buf_alloc`).
    buffer: u32,
    /// A credit request was sent and not answered yet.
    requested: bool,
}

/// Credit in the direction guest to host.
#[derive(Debug, Clone, Copy, Default)]
struct FromGuest {
    /// Bytes received, modulo 2^32.
    received: Wrapping<u32>,
    /// Bytes that the host socket accepted.
    forwarded: Wrapping<u32>,
    /// The last value of `forwarded` that was sent to the guest.
    reported: Wrapping<u32>,
}

/// Control packets (without payload) that are due.
#[derive(Debug, Clone, Copy, Default)]
struct Pending {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    shutdown: bool,
}

impl Connection {
    /// A connection that the guest requested; the response is due.
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

    /// A connection that the host dials; the request is due.
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

    /// Its phase.
    pub const fn phase(&self) -> Phase {
        self.phase
    }

    /// The directions that the guest finished.
    pub const fn guest_done(&self) -> Shutdown {
        self.guest_done
    }

    /// The directions that the host finished.
    pub const fn host_done(&self) -> Shutdown {
        self.host_done
    }

    /// Whether the request or response was not sent yet.
    pub const fn is_opening(&self) -> bool {
        self.pending.request || self.pending.response
    }

    /// Whether the guest knows the connection: a dial's request was sent.
    pub const fn is_known_to_guest(&self) -> bool {
        !self.pending.request
    }

    /// Receives a packet of the guest. `payload` is the number of bytes in the
    /// chain after the header.
    pub fn receive(&mut self, header: &Header, payload: u32) -> Verdict {
        let Some(operation) = header.operation() else {
            return Verdict::Violation("unknown operation");
        };
        self.take_credit(header);
        match (self.phase, operation) {
            (_, Operation::Reset) => Verdict::Reset,
            (Phase::Dialing, Operation::Response) if !self.pending.request => {
                self.phase = Phase::Open;
                Verdict::Connected
            }
            (Phase::Dialing, _) => Verdict::Violation("packet before the connection is accepted"),
            (_, Operation::Request) => Verdict::Violation("request for ports in use"),
            (_, Operation::Response) => Verdict::Violation("response without a request"),
            (_, Operation::CreditUpdate) => Verdict::Update,
            (_, Operation::CreditRequest) => {
                self.pending.credit_update = true;
                Verdict::Update
            }
            (_, Operation::Data) => self.take_data(header.len, payload),
            (_, Operation::Shutdown) => {
                self.guest_done = self.guest_done.union(header.shutdown());
                Verdict::Update
            }
        }
    }

    fn take_credit(&mut self, header: &Header) {
        let credit = &mut self.to_guest;
        credit.buffer = header.buf_alloc;
        // Counters may arrive out of order, because two guest threads can fill
        // headers in one order and queue them in the other. A value outside of
        // [consumed, sent] is outdated or false, and is ignored.
        let consumed = Wrapping(header.fwd_cnt);
        if consumed - credit.consumed <= credit.sent - credit.consumed {
            credit.consumed = consumed;
        }
        if self.allowance() > 0 {
            self.to_guest.requested = false;
        }
    }

    fn take_data(&mut self, len: u32, payload: u32) -> Verdict {
        if self.guest_done.send {
            return Verdict::Violation("data after the guest finished sending");
        }
        if len > MAX_PAYLOAD || len > payload {
            return Verdict::Violation("length beyond the payload");
        }
        if len > HOST_BUFFER.saturating_sub(self.buffered()) {
            return Verdict::Violation("data beyond the credit");
        }
        self.from_guest.received += len;
        if self.host_done.receive {
            // The shutdown may not have reached the guest yet: drop the data.
            self.forwarded(len);
            return Verdict::Update;
        }
        Verdict::Deliver(len)
    }

    /// Bytes received and not forwarded yet.
    pub fn buffered(&self) -> u32 {
        (self.from_guest.received - self.from_guest.forwarded).0
    }

    /// The host socket accepted `len` bytes, or the device dropped them because
    /// the host receives no more.
    pub fn forwarded(&mut self, len: u32) {
        let credit = &mut self.from_guest;
        debug_assert!(len <= (credit.received - credit.forwarded).0);
        credit.forwarded += len;
        if (credit.forwarded - credit.reported).0 >= CREDIT_STEP {
            self.pending.credit_update = true;
        }
    }

    /// Bytes that the device may send to the guest now.
    pub fn allowance(&self) -> u32 {
        if !self.can_send() {
            return 0;
        }
        let in_flight = (self.to_guest.sent - self.to_guest.consumed).0;
        self.to_guest.buffer.saturating_sub(in_flight)
    }

    /// Whether data can still be sent to the guest.
    pub const fn can_send(&self) -> bool {
        matches!(self.phase, Phase::Open) && !self.guest_done.receive && !self.host_done.send
    }

    /// Requests credit, once: there is data for the guest and no credit.
    pub fn request_credit(&mut self) {
        if self.can_send() && !self.to_guest.requested {
            self.to_guest.requested = true;
            self.pending.credit_request = true;
        }
    }

    /// The host finished the directions `done`. If it has finished both, the
    /// connection closes and no longer needs its socket.
    pub fn finish(&mut self, done: Shutdown) {
        let done = self.host_done.union(done);
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

    /// The connection has ended for the guest: only buffered data remains, and no
    /// packet is sent.
    pub fn drain(&mut self) {
        self.phase = Phase::Draining;
        self.pending = Pending::default();
    }

    /// Whether a control packet is due.
    pub const fn has_control(&self) -> bool {
        let due = &self.pending;
        due.request || due.response || due.credit_update || due.credit_request || due.shutdown
    }

    /// The next control packet that is due, in the order that the protocol
    /// requires.
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

    /// The header of a packet with `len` bytes of payload, which are counted as
    /// sent.
    pub fn data_header(&mut self, len: u32) -> Header {
        debug_assert!(len <= self.allowance());
        self.to_guest.sent += len;
        self.header(Operation::Data, len)
    }

    /// The reset that ends the connection.
    pub fn reset_header(&mut self) -> Header {
        self.header(Operation::Reset, 0)
    }

    /// Every header carries the credit, so a due update is done.
    fn header(&mut self, operation: Operation, len: u32) -> Header {
        self.from_guest.reported = self.from_guest.forwarded;
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
