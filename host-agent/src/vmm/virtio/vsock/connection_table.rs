//! Which vsock connection a packet belongs to, which one sends next, and when
//! each must have made progress. Pure: sockets are an opaque `T`.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Instant;

use vmbus::channel::{Channel, HOST_CID, PRIVILEGED_PORTS};

use super::connection::{Connection, Phase, Ports};
use super::packet::{Header, Operation, TYPE_STREAM};

/// Most connections of a guest at a time, those that still drain included. A
/// connection costs two file descriptors of a process and at most 64 KiB.
pub const MAX_CONNECTIONS: usize = 1023;

/// Connections that dials leave free for the guest's channels: clients of its
/// endpoints, however many, shall not keep its agents from dialing again.
pub const CHANNEL_RESERVE: usize = 2 * Channel::ALL.len();

/// Most refusals that wait for the guest to offer receive buffers. A guest
/// that sends without receiving loses those beyond: its connects time out
/// instead, and nothing grows.
pub const MAX_REPLIES: usize = 1024;

/// Host ports for dials: above every channel's and every port that a program
/// would choose, and below `VMADDR_PORT_ANY`.
const DIAL_PORTS: std::ops::Range<u32> = 0x4000_0000..0x8000_0000;

/// Names one connection for the life of the process. Ports are used again,
/// this is not: what is late for a closed connection cannot meet its successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(pub u64);

/// A connection and what the caller keeps with it.
#[derive(Debug)]
pub struct TableEntry<T> {
    /// Its state.
    pub connection: Connection,
    /// The caller's part.
    pub endpoint: T,
    deadline: Option<Instant>,
    queued: bool,
}

/// Where a packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Nowhere: forged, or needs no answer.
    Drop(&'static str),
    /// Nowhere, and the guest is told.
    Refuse(&'static str),
    /// To a connection.
    Known(ConnectionId),
    /// It asks for a connection that may be made.
    Accept,
}

/// What the next receive buffer of the guest is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// A packet that belongs to no connection.
    Reply(Header),
    /// This connection's turn.
    Turn(ConnectionId),
}

/// The connections of one device.
#[derive(Debug)]
pub struct ConnectionTable<T> {
    guest_cid: u64,
    entries: HashMap<ConnectionId, TableEntry<T>>,
    by_ports: HashMap<Ports, ConnectionId>,
    last_id: u64,
    next_port: u32,
    ready: VecDeque<ConnectionId>,
    replies: VecDeque<Header>,
    replied_last: bool,
    deadlines: BTreeSet<(Instant, ConnectionId)>,
}

impl<T> ConnectionTable<T> {
    /// No connections. Identifiers begin above `reserved`.
    pub fn new(guest_cid: u64, reserved: u64) -> Self {
        Self {
            guest_cid,
            entries: HashMap::new(),
            by_ports: HashMap::new(),
            last_id: reserved,
            next_port: DIAL_PORTS.start,
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            replied_last: false,
            deadlines: BTreeSet::new(),
        }
    }

    /// Connections held.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether every connection is taken.
    pub fn is_full(&self) -> bool {
        self.entries.len() >= MAX_CONNECTIONS
    }

    /// Whether there is a place for one more dial.
    pub fn can_dial(&self) -> bool {
        self.entries.len() < MAX_CONNECTIONS - CHANNEL_RESERVE
    }

    /// Decides on a packet of the guest.
    pub fn route(&self, header: &Header) -> Route {
        if header.src_cid != self.guest_cid {
            return Route::Drop("source is not this guest");
        }
        if header.dst_cid != u64::from(HOST_CID) {
            return Route::Drop("destination is not the host");
        }
        let is_reset = header.operation() == Some(Operation::Reset);
        if header.kind != TYPE_STREAM {
            return if is_reset {
                Route::Drop("reset of another socket type")
            } else {
                Route::Refuse("socket type is not stream")
            };
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        if let Some(id) = self.by_ports.get(&ports) {
            return Route::Known(*id);
        }
        match header.operation() {
            // An answer to a reset would be answered by a reset.
            Some(Operation::Reset) => Route::Drop("reset of no connection"),
            Some(Operation::Request) => self.admit(ports),
            _ => Route::Refuse("no such connection"),
        }
    }

    fn admit(&self, ports: Ports) -> Route {
        if Channel::from_port(ports.host).is_none() {
            return Route::Refuse("nothing is served on the port");
        }
        if ports.guest >= PRIVILEGED_PORTS {
            return Route::Refuse("channel dialed from an unprivileged port");
        }
        if self.is_full() {
            return Route::Refuse("every connection is taken");
        }
        Route::Accept
    }

    /// Identifier of the next connection to be [inserted](Self::insert).
    pub fn next_id(&self) -> ConnectionId {
        ConnectionId(self.last_id + 1)
    }

    /// Adds a connection. Its ports must be free and the table not full.
    /// Replies to an earlier use of the ports are dropped: who dials anew has
    /// forgotten it, and would take them for the end of this connection.
    pub fn insert(&mut self, connection: Connection, endpoint: T) -> ConnectionId {
        debug_assert!(!self.is_full());
        let id = self.next_id();
        self.last_id = id.0;
        let ports = connection.ports();
        let earlier = self.by_ports.insert(ports, id);
        debug_assert!(earlier.is_none());
        self.replies.retain(|reply| {
            (reply.src_port, reply.dst_port, reply.kind) != (ports.host, ports.guest, TYPE_STREAM)
        });
        self.entries.insert(
            id,
            TableEntry {
                connection,
                endpoint,
                deadline: None,
                queued: false,
            },
        );
        id
    }

    /// A host port from which `guest` is not dialed at present.
    pub fn dial_ports(&mut self, guest: u32) -> Ports {
        // The table holds fewer connections than there are ports, so that this
        // ends; and a port comes back only after a thousand million others.
        loop {
            let host = self.next_port;
            self.next_port += 1;
            if self.next_port == DIAL_PORTS.end {
                self.next_port = DIAL_PORTS.start;
            }
            let ports = Ports { host, guest };
            if !self.by_ports.contains_key(&ports) {
                return ports;
            }
        }
    }

    /// A connection.
    pub fn get_mut(&mut self, id: ConnectionId) -> Option<&mut TableEntry<T>> {
        self.entries.get_mut(&id)
    }

    /// Ends a connection: nothing of it remains.
    pub fn remove(&mut self, id: ConnectionId) -> Option<TableEntry<T>> {
        let entry = self.entries.remove(&id)?;
        self.free_ports(entry.connection.ports(), id);
        if let Some(deadline) = entry.deadline {
            self.deadlines.remove(&(deadline, id));
        }
        if entry.queued {
            // The line may not move for long, when the guest is stuck.
            self.ready.retain(|queued| *queued != id);
        }
        Some(entry)
    }

    /// The guest is done with a connection of which data still drains to the
    /// host: its ports are free, its place is not.
    pub fn detach(&mut self, id: ConnectionId) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.connection.drain();
            if std::mem::take(&mut entry.queued) {
                self.ready.retain(|queued| *queued != id);
            }
            let ports = entry.connection.ports();
            self.free_ports(ports, id);
        }
    }

    fn free_ports(&mut self, ports: Ports, id: ConnectionId) {
        if self.by_ports.get(&ports) == Some(&id) {
            self.by_ports.remove(&ports);
        }
    }

    /// Ends every connection and forgets what was to be said.
    pub fn clear(&mut self) -> Vec<TableEntry<T>> {
        self.by_ports.clear();
        self.ready.clear();
        self.replies.clear();
        self.deadlines.clear();
        self.entries.drain().map(|(_, entry)| entry).collect()
    }

    /// Puts a connection at the end of the line for the guest's receive
    /// buffers, unless it waits there already.
    pub fn schedule(&mut self, id: ConnectionId) {
        if let Some(entry) = self.entries.get_mut(&id)
            && !entry.queued
            && entry.connection.phase() != Phase::Draining
        {
            entry.queued = true;
            self.ready.push_back(id);
        }
    }

    /// What the next receive buffer is for, taken out of its line. A reply and
    /// a connection in turn: whoever asks for what is refused, however often,
    /// must not keep heartbeats from the guest.
    pub fn next_output(&mut self) -> Option<Output> {
        let reply = if self.replied_last && !self.ready.is_empty() {
            None
        } else {
            self.replies.pop_front()
        };
        self.replied_last = reply.is_some();
        reply.map(Output::Reply).or_else(|| {
            let id = self.ready.pop_front()?;
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.queued = false;
            }
            Some(Output::Turn(id))
        })
    }

    /// Puts back at the head of the line what [`Self::next_output`] gave: no
    /// buffer was left for it.
    pub fn put_back(&mut self, id: ConnectionId) {
        if let Some(entry) = self.entries.get_mut(&id)
            && !entry.queued
        {
            entry.queued = true;
            self.ready.push_front(id);
        }
    }

    /// Whether anything waits for a receive buffer.
    pub fn has_output(&self) -> bool {
        !self.replies.is_empty() || !self.ready.is_empty()
    }

    /// Queues a packet that belongs to no connection (any more).
    pub fn reply(&mut self, header: Header) {
        if self.replies.len() < MAX_REPLIES {
            self.replies.push_back(header);
        }
    }

    /// Sets or clears the time by which a connection must have moved on.
    pub fn set_deadline(&mut self, id: ConnectionId, deadline: Option<Instant>) {
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        if let Some(earlier) = std::mem::replace(&mut entry.deadline, deadline) {
            self.deadlines.remove(&(earlier, id));
        }
        if let Some(deadline) = deadline {
            self.deadlines.insert((deadline, id));
        }
    }

    /// The first deadline.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// A connection whose deadline is not after `now`; it has none any more.
    pub fn pop_expired(&mut self, now: Instant) -> Option<ConnectionId> {
        let (deadline, id) = *self.deadlines.first()?;
        if deadline > now {
            return None;
        }
        self.set_deadline(id, None);
        Some(id)
    }
}
