//! The multiplexer: applies packets, socket events and deadlines to connections.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing::{debug, warn};
use vm_memory::GuestMemoryMmap;
use vmbus::channel::EXEC_PORT;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Connection, Phase, Shutdown, Verdict};
use super::connection_table::{
    ConnectionId, ConnectionTable, Destination, Output, Purpose, Route, TableEntry,
};
use super::endpoint::{Endpoint, Origin};
use super::packet::{HEADER_SIZE, Header, MAX_PAYLOAD};
use super::rings::Rings;
use super::socket;
use super::{EventSink, TimeLimits, VsockCounters, VsockEvent};
use crate::token_bucket::{LogLimit, VMM_LOG};
use crate::vmm::control::DialOutcome;
use crate::vmm::virtio::queue::{Chain, QueueError};

/// Time for the guest to answer a shutdown of both directions; after it the device
/// sends a reset. Linux answers only once its reader has read everything.
pub const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// Most bytes that a connection sends to the guest per turn.
const TURN: u32 = MAX_PAYLOAD;

/// The connections of one device, with their sockets.
pub struct Muxer {
    guest_cid: u64,
    limits: TimeLimits,
    table: ConnectionTable<Endpoint>,
    poll: Arc<Epoll>,
    sink: EventSink,
    counters: Arc<VsockCounters>,
    dropped: LogLimit<Instant>,
    refused: LogLimit<Instant>,
    host_errors: LogLimit<Instant>,
    unavailable: LogLimit<Instant>,
    idle_ended: LogLimit<Instant>,
}

impl Muxer {
    /// A multiplexer without connections. It uses epoll tokens above `reserved`.
    pub fn new(
        guest_cid: u64,
        reserved: u64,
        poll: Arc<Epoll>,
        limits: TimeLimits,
        counters: Arc<VsockCounters>,
        sink: EventSink,
    ) -> Self {
        Self {
            guest_cid,
            limits,
            table: ConnectionTable::new(guest_cid, reserved),
            poll,
            sink,
            counters,
            dropped: LogLimit::new(VMM_LOG),
            refused: LogLimit::new(VMM_LOG),
            host_errors: LogLimit::new(VMM_LOG),
            unavailable: LogLimit::new(VMM_LOG),
            idle_ended: LogLimit::new(VMM_LOG),
        }
    }

    /// Number of connections.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether a packet waits for a receive buffer.
    pub fn has_output(&self) -> bool {
        self.table.has_output()
    }

    /// The earliest deadline.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.table.next_deadline()
    }

    fn report(&mut self, event: VsockEvent) {
        (self.sink)(event);
    }

    /// Dials `port` of the guest for `endpoint`.
    pub fn dial(&mut self, endpoint: Endpoint, port: u32, now: Instant) {
        let purpose = match endpoint.origin {
            Origin::Probe(_) => Purpose::Probe,
            _ if port == EXEC_PORT => Purpose::Exec,
            _ => Purpose::Client(Destination {
                port,
                first: endpoint.first().to_vec(),
            }),
        };
        if !self.table.can_dial(&purpose) && !self.end_idle(&purpose, now) {
            if let Some(suppressed) = self.unavailable.allow(now) {
                warn!(port, suppressed, "vsock: no connection is free for a dial");
            }
            self.answer(endpoint.origin, DialOutcome::Unavailable);
            return;
        }
        let ports = self.table.dial_ports(port);
        let connection = Connection::dialing(ports, self.guest_cid);
        let id = self.table.dial(connection, endpoint, purpose, now);
        self.table.set_deadline(id, Some(now + self.limits.dial));
        self.table.schedule(id);
    }

    /// Ends the longest idle connection of the endpoint that a new client wants, which takes
    /// its place. False if there is none.
    fn end_idle(&mut self, purpose: &Purpose, now: Instant) -> bool {
        let Purpose::Client(destination) = purpose else {
            return false;
        };
        let limit = self.limits.idle;
        let Some(id) = self.table.longest_idle(destination, now, limit) else {
            return false;
        };
        if let Some(suppressed) = self.idle_ended.allow(now) {
            let port = destination.port;
            warn!(
                port,
                suppressed, "vsock: an idle connection ended for a new client"
            );
        }
        self.abort(id);
        true
    }

    /// Reports the result of a dial.
    pub fn answer(&mut self, origin: Origin, outcome: DialOutcome) {
        match origin {
            Origin::Guest => {}
            Origin::Dial(id) | Origin::Probe(id) => self.report(VsockEvent::Dialed { id, outcome }),
        }
    }

    /// Receives a packet of the guest.
    pub fn packet(&mut self, chain: &Chain, memory: &GuestMemoryMmap, now: Instant) {
        let mut raw = [0; HEADER_SIZE];
        if chain.read_at(memory, 0, &mut raw) != HEADER_SIZE {
            self.count_malformed("shorter than a header");
            return;
        }
        // The guest can still change the header in its memory: use only this copy.
        let header = Header::parse(&raw);
        let payload = chain.readable_len() - HEADER_SIZE as u32;
        match self.table.route(&header) {
            Route::Drop(why) => self.count_malformed(why),
            Route::Refuse(why) => self.refuse(&header, why),
            Route::Accept => self.accept(&header, now),
            Route::Known(id) => {
                let Some(entry) = self.table.get_mut(id) else {
                    return;
                };
                match entry.connection.receive(&header, payload) {
                    Verdict::Update => self.settle(id, now),
                    Verdict::Connected => self.connected(id),
                    Verdict::Deliver(len) => {
                        let result = entry.endpoint.deliver(chain, memory, len);
                        self.written(id, result, now);
                    }
                    Verdict::Reset => self.reset_by_guest(id, now),
                    Verdict::Violation(why) => {
                        let dialing = entry.connection.phase() == Phase::Dialing;
                        let origin = entry.endpoint.origin;
                        self.count_malformed(why);
                        self.abort(id);
                        if dialing {
                            self.answer(origin, DialOutcome::Refused);
                        }
                    }
                }
            }
        }
    }

    fn accept(&mut self, header: &Header, now: Instant) {
        let id = self.table.next_id();
        let pair = UnixStream::pair().and_then(|(ours, theirs)| {
            watch(&self.poll, &ours, id)?;
            Ok((OwnedFd::from(ours), OwnedFd::from(theirs)))
        });
        let (ours, theirs) = match pair {
            Ok(pair) => pair,
            Err(error) => {
                self.host_error(&error);
                self.refuse(header, "no socket on the host");
                return;
            }
        };
        self.table.accept(
            Connection::accepted(header),
            Endpoint::new(Origin::Guest, Some(ours)),
            now,
        );
        self.table.schedule(id);
        self.report(VsockEvent::Opened {
            port: header.dst_port,
            source_port: header.src_port,
            fd: theirs,
        });
    }

    fn connected(&mut self, id: ConnectionId) {
        self.table.set_deadline(id, None);
        let Some(entry) = self.table.get_mut(id) else {
            return;
        };
        let origin = entry.endpoint.origin;
        match entry.endpoint.stream().map(|fd| watch(&self.poll, &fd, id)) {
            Some(Ok(())) => {}
            // A probe only needs the answer.
            None => self.abort(id),
            Some(Err(error)) => {
                self.host_error(&error);
                self.abort(id);
                self.answer(origin, DialOutcome::Unavailable);
                return;
            }
        }
        self.answer(origin, DialOutcome::Connected);
        self.schedule_if_due(id);
    }

    /// Applies the result of a write to the host socket.
    fn written(&mut self, id: ConnectionId, result: io::Result<u32>, now: Instant) {
        let Some(entry) = self.table.get_mut(id) else {
            return;
        };
        match result {
            Ok(count) => {
                entry.connection.forwarded(count);
                if count > 0 {
                    entry.last_active = now;
                }
                if count > 0 && entry.connection.phase() == Phase::Draining {
                    self.table.set_deadline(id, Some(now + self.limits.drain));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                entry.endpoint.drop_backlog();
                entry.connection.finish(Shutdown {
                    receive: true,
                    send: false,
                });
            }
            // The connection has ended for the guest: its ports may be in use again.
            Err(_) if entry.connection.phase() == Phase::Draining => {
                return self.drop_connection(id);
            }
            Err(_) => return self.abort(id),
        }
        self.settle(id, now);
    }

    /// Applies the epoll event `ready` of a socket.
    pub fn socket_ready(&mut self, id: ConnectionId, ready: EventSet, now: Instant) {
        let Some(entry) = self.table.get_mut(id) else {
            return;
        };
        let endpoint = &mut entry.endpoint;
        endpoint.hung_up |= ready.contains(EventSet::HANG_UP);
        if ready
            .intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR)
        {
            endpoint.readable = true;
        }
        if ready.intersects(EventSet::OUT | EventSet::HANG_UP | EventSet::ERROR) {
            endpoint.set_writable();
            if endpoint.backlog() > 0 {
                let result = endpoint.flush();
                return self.written(id, result, now);
            }
        }
        self.settle(id, now);
    }

    /// Moves a connection on after its state or its socket changed.
    fn settle(&mut self, id: ConnectionId, now: Instant) {
        let Some(entry) = self.table.get_mut(id) else {
            return;
        };
        let (connection, endpoint) = (&mut entry.connection, &mut entry.endpoint);
        let guest = connection.guest_done();
        let drained = endpoint.backlog() == 0;
        if connection.phase() == Phase::Draining {
            if drained {
                endpoint.finish_writing();
                self.drop_connection(id);
            }
            return;
        }
        if guest.send && drained {
            endpoint.finish_writing();
        }
        if guest.receive {
            endpoint.finish_reading();
        }
        if guest.is_both() {
            return self.finished_by_guest(id, now);
        }
        if connection.phase() == Phase::Open {
            // The host's data was read to its end, or the guest receives no more.
            let host_done = connection.host_done().send || guest.receive;
            if host_done && (endpoint.hung_up || (guest.send && drained)) {
                endpoint.drop_backlog();
                connection.finish(Shutdown::BOTH);
            }
        }
        if connection.phase() == Phase::Closing && endpoint.stream().is_some() {
            close(entry, &self.poll);
            self.table.set_deadline(id, Some(now + CLOSE_LIMIT));
        }
        self.schedule_if_due(id);
    }

    fn schedule_if_due(&mut self, id: ConnectionId) {
        let Some(entry) = self.table.get_mut(id) else {
            return;
        };
        let connection = &mut entry.connection;
        if entry.endpoint.readable && connection.allowance() == 0 {
            connection.request_credit();
        }
        if connection.has_control() || (entry.endpoint.readable && connection.allowance() > 0) {
            self.table.schedule(id);
        }
    }

    /// The guest finished both directions: answers at once, and still delivers the
    /// backlog to the host.
    fn finished_by_guest(&mut self, id: ConnectionId, now: Instant) {
        let Some(entry) = self.table.get_mut(id) else {
            return;
        };
        if entry.endpoint.backlog() == 0 {
            self.abort(id);
        } else {
            let reset = entry.connection.reset_header();
            self.table.reply(reset);
            self.table.detach(id);
            self.table.set_deadline(id, Some(now + self.limits.drain));
        }
    }

    fn reset_by_guest(&mut self, id: ConnectionId, now: Instant) {
        let Some(entry) = self.table.get_mut(id) else {
            return;
        };
        let connection = &entry.connection;
        if connection.phase() == Phase::Dialing {
            let origin = entry.endpoint.origin;
            self.drop_connection(id);
            self.answer(origin, DialOutcome::Refused);
        } else if connection.guest_done().send && entry.endpoint.backlog() > 0 {
            // The guest had finished sending, so the backlog is complete: deliver it.
            self.table.detach(id);
            self.table.set_deadline(id, Some(now + self.limits.drain));
        } else {
            self.drop_connection(id);
        }
    }

    /// Ends a connection with a reset.
    fn abort(&mut self, id: ConnectionId) {
        if let Some(entry) = self.table.get_mut(id) {
            let reset = entry.connection.reset_header();
            self.table.reply(reset);
            self.drop_connection(id);
        }
    }

    fn drop_connection(&mut self, id: ConnectionId) {
        if let Some(mut entry) = self.table.remove(id) {
            close(&mut entry, &self.poll);
        }
    }

    /// Ends connections whose deadline has passed.
    pub fn expire(&mut self, now: Instant) {
        while let Some(id) = self.table.pop_expired(now) {
            let Some(entry) = self.table.get_mut(id) else {
                continue;
            };
            match entry.connection.phase() {
                Phase::Dialing => {
                    let origin = entry.endpoint.origin;
                    if entry.connection.is_known_to_guest() {
                        self.abort(id);
                    } else {
                        self.drop_connection(id);
                    }
                    self.answer(origin, DialOutcome::TimedOut);
                }
                Phase::Closing => self.abort(id),
                Phase::Draining => self.drop_connection(id),
                Phase::Open => {}
            }
        }
    }

    /// Fills receive buffers until none is left, nothing waits for one, or `turns`
    /// turns are over.
    pub fn output(
        &mut self,
        rings: &mut Rings,
        now: Instant,
        turns: usize,
    ) -> Result<(), QueueError> {
        for _ in 0..turns {
            if !self.table.has_output() || !rings.reserve(0)? {
                return Ok(());
            }
            match self.table.next_output() {
                Some(Output::Reply(reply)) => {
                    rings.send(&reply)?;
                }
                Some(Output::Turn(id)) => self.turn(id, rings, now)?,
                None => {}
            }
        }
        Ok(())
    }

    fn turn(
        &mut self,
        id: ConnectionId,
        rings: &mut Rings,
        now: Instant,
    ) -> Result<(), QueueError> {
        let Some(entry) = self.table.get_mut(id) else {
            return Ok(());
        };
        let connection = &mut entry.connection;
        if connection.is_opening() && connection.phase() == Phase::Open {
            // The response must precede data.
            if let Some(header) = connection.next_control() {
                rings.send(&header)?;
            }
        }
        let want = connection.allowance().min(TURN);
        if entry.endpoint.readable && want > 0 {
            if !rings.reserve(want)? {
                self.table.put_back(id);
                return Ok(());
            }
            let received = match entry.endpoint.take_first(rings.payload_slices(want)) {
                0 => receive(entry.endpoint.stream(), rings, want),
                count => Ok(count),
            };
            match received {
                Ok(0) => {
                    entry.endpoint.readable = false;
                    let receive = entry.endpoint.hung_up;
                    entry.connection.finish(Shutdown {
                        receive,
                        send: true,
                    });
                    if receive {
                        entry.endpoint.drop_backlog();
                    }
                }
                Ok(mut count) => {
                    entry.last_active = now;
                    while count > 0 {
                        let len = count.min(rings.next_capacity());
                        let header = entry.connection.data_header(len);
                        rings.send(&header)?;
                        count -= len;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    entry.endpoint.readable = false;
                }
                Err(error) => {
                    debug!(%error, "vsock: host socket failed");
                    self.abort(id);
                    return Ok(());
                }
            }
        }
        if let Some(entry) = self.table.get_mut(id)
            && entry.connection.has_control()
            && rings.reserve(0)?
            && let Some(header) = entry.connection.next_control()
        {
            rings.send(&header)?;
        }
        self.settle(id, now);
        Ok(())
    }

    /// Ends every connection: the device is reset or broken.
    pub fn clear(&mut self) {
        for mut entry in self.table.clear() {
            close(&mut entry, &self.poll);
            if entry.connection.phase() == Phase::Dialing {
                self.answer(entry.endpoint.origin, DialOutcome::Unavailable);
            }
        }
    }

    fn refuse(&mut self, header: &Header, why: &'static str) {
        self.counters.refused.fetch_add(1, Ordering::Relaxed);
        if let Some(suppressed) = self.refused.allow(Instant::now()) {
            debug!(
                why,
                suppressed,
                port = header.dst_port,
                source_port = header.src_port,
                "vsock: packet refused"
            );
        }
        self.table.reply(header.reset());
    }

    /// Logs at a limited rate, because the guest sets the rate of connections.
    fn host_error(&mut self, error: &io::Error) {
        if let Some(suppressed) = self.host_errors.allow(Instant::now()) {
            warn!(%error, suppressed, "vsock: no host socket for a connection");
        }
    }

    fn count_malformed(&mut self, why: &'static str) {
        self.counters.refused.fetch_add(1, Ordering::Relaxed);
        if let Some(suppressed) = self.dropped.allow(Instant::now()) {
            warn!(why, suppressed, "vsock: malformed packet of the guest");
        }
    }
}

fn receive(
    stream: Option<std::os::fd::BorrowedFd<'_>>,
    rings: &Rings,
    want: u32,
) -> io::Result<u32> {
    let stream = stream.ok_or(io::ErrorKind::WouldBlock)?;
    socket::receive(stream, rings.payload_slices(want)).map(|count| count as u32)
}

/// Watches a socket edge-triggered, so that a stalled reader or an ended stream is
/// reported once and does not keep the worker busy.
fn watch(poll: &Epoll, stream: &impl AsFd, id: ConnectionId) -> io::Result<()> {
    let interest = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    poll.ctl(
        ControlOperation::Add,
        stream.as_fd().as_raw_fd(),
        EpollEvent::new(interest, id.0),
    )
}

/// Closes the socket. It is removed from the epoll set explicitly, because another
/// process may hold a duplicate, which would keep it in the set.
fn close(entry: &mut TableEntry<Endpoint>, poll: &Epoll) {
    // A client whose dial fails has got nothing that could be cut off.
    if entry.connection.phase() != Phase::Dialing {
        entry.endpoint.reset_if_cut_off();
    }
    if let Some(stream) = entry.endpoint.close() {
        let _ = poll.ctl(
            ControlOperation::Delete,
            stream.as_raw_fd(),
            EpollEvent::default(),
        );
    }
}
