//! The vsock connections of a device: admission, routing of packets, order of sending,
//! and deadlines. Pure: sockets are an opaque `T`.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmbus::channel::{Channel, HOST_CID, PRIVILEGED_PORTS};

use super::connection::{Connection, Phase, Ports};
use super::packet::{Header, Operation, TYPE_STREAM};

/// Most connections of a guest at a time, including draining ones. A connection
/// costs up to two file descriptors and 64 KiB.
pub const MAX_CONNECTIONS: usize = 1023;

/// Connections that dials must leave free for the guest's channels, so that any
/// number of endpoint clients leaves its agents able to reconnect.
pub const CHANNEL_RESERVE: usize = 2 * Channel::ALL.len();

/// Connections that clients of endpoints must leave free for `exec`, so that an operator
/// reaches a guest whose endpoints are full.
pub const EXEC_RESERVE: usize = 32;

/// Most replies that wait for receive buffers of the guest. Further replies are
/// dropped: the connects of a guest that never receives time out.
pub const MAX_REPLIES: usize = 1024;

/// Host ports for dials: above every channel's port and usual program ports, and
/// below `VMADDR_PORT_ANY`.
const DIAL_PORTS: std::ops::Range<u32> = 0x4000_0000..0x8000_0000;

/// What the host dials the guest for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Purpose {
    /// To test whether the guest answers.
    Probe,
    /// A command of the operator.
    Exec,
    /// A client of an endpoint.
    Client(Destination),
}

/// An endpoint in the guest, as a dial names it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Destination {
    /// Port of the tunnels.
    pub port: u32,
    /// The first frame, which names the endpoint.
    pub first: Vec<u8>,
}

/// Identifies a connection. Ids are never reused, so a late event cannot reach a
/// newer connection with the same ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(pub u64);

/// A connection and the caller's data for it.
#[derive(Debug)]
pub struct TableEntry<T> {
    /// The connection.
    pub connection: Connection,
    /// The caller's data.
    pub endpoint: T,
    /// When a byte came from the host's socket, or was accepted by it, for the last time; when
    /// the connection was added, if none was.
    pub last_active: Instant,
    /// Of a client's connection.
    destination: Option<Arc<Destination>>,
    deadline: Option<Instant>,
    queued: bool,
}

/// What to do with a packet of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Drop it: its address is forged, or it must not be answered.
    Drop(&'static str),
    /// Answer it with a reset.
    Refuse(&'static str),
    /// Give it to this connection.
    Known(ConnectionId),
    /// Accept the connection that it requests.
    Accept,
}

/// What to send in the guest's next receive buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// A packet without a connection.
    Reply(Header),
    /// Packets of this connection.
    Turn(ConnectionId),
}

/// The connections of one device.
#[derive(Debug)]
pub struct ConnectionTable<T> {
    guest_cid: u64,
    entries: HashMap<ConnectionId, TableEntry<T>>,
    by_ports: HashMap<Ports, ConnectionId>,
    /// How many connections the clients of each endpoint have. Only endpoints with a
    /// connection are in it.
    clients: HashMap<Arc<Destination>, usize>,
    last_id: u64,
    next_port: u32,
    ready: VecDeque<ConnectionId>,
    replies: VecDeque<Header>,
    replied_last: bool,
    deadlines: BTreeSet<(Instant, ConnectionId)>,
}

impl<T> ConnectionTable<T> {
    /// An empty table. Ids begin above `reserved`.
    pub fn new(guest_cid: u64, reserved: u64) -> Self {
        Self {
            guest_cid,
            entries: HashMap::new(),
            by_ports: HashMap::new(),
            clients: HashMap::new(),
            last_id: reserved,
            next_port: DIAL_PORTS.start,
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            replied_last: false,
            deadlines: BTreeSet::new(),
        }
    }

    /// Number of connections.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether the table is full.
    pub fn is_full(&self) -> bool {
        self.entries.len() >= MAX_CONNECTIONS
    }

    /// Whether one more dial leaves enough connections free for others.
    ///
    /// The clients of an endpoint may have as many connections as are free for clients of
    /// any endpoint: half of the places if no other endpoint has clients. What an endpoint
    /// may have shrinks as others get clients.
    pub fn can_dial(&self, purpose: &Purpose) -> bool {
        match purpose {
            // Clients must not make a probe fail, so it may use the reserves.
            Purpose::Probe => !self.is_full(),
            Purpose::Exec => self.entries.len() < MAX_CONNECTIONS - CHANNEL_RESERVE,
            Purpose::Client(destination) => {
                let places = MAX_CONNECTIONS - CHANNEL_RESERVE - EXEC_RESERVE;
                let held = self.clients.get(destination).copied().unwrap_or_default();
                held < places.saturating_sub(self.entries.len())
            }
        }
    }

    /// Of the connections to `destination` the one that is idle for the longest time, if
    /// that is at least `limit`.
    ///
    /// Looks at every connection: there are few, and a dial costs system calls in three
    /// processes anyway.
    pub fn longest_idle(
        &self,
        destination: &Destination,
        now: Instant,
        limit: Duration,
    ) -> Option<ConnectionId> {
        let (shared, _) = self.clients.get_key_value(destination)?;
        let is_to = |entry: &TableEntry<T>| {
            let own = entry.destination.as_ref();
            own.is_some_and(|own| Arc::ptr_eq(own, shared))
        };
        // Others have a deadline already.
        let open = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.connection.phase() == Phase::Open && is_to(entry));
        let (last_active, id) = open.map(|(id, entry)| (entry.last_active, *id)).min()?;
        (now.saturating_duration_since(last_active) >= limit).then_some(id)
    }

    /// Decides about a packet of the guest (virtio 1.2, 5.10.6).
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
            // A reset must not be answered, or both ends could loop.
            Some(Operation::Reset) => Route::Drop("reset of no connection"),
            Some(Operation::Request) => self.admit(ports),
            _ => Route::Refuse("no such connection"),
        }
    }

    fn admit(&self, ports: Ports) -> Route {
        if Channel::from_port(ports.host).is_none() {
            return Route::Refuse("no channel has the port");
        }
        if ports.guest >= PRIVILEGED_PORTS {
            return Route::Refuse("channel dialed from an unprivileged port");
        }
        if self.is_full() {
            return Route::Refuse("too many connections");
        }
        Route::Accept
    }

    /// The id of the next connection to be added.
    pub fn next_id(&self) -> ConnectionId {
        ConnectionId(self.last_id + 1)
    }

    /// Adds a connection that the guest requested.
    pub fn accept(&mut self, connection: Connection, endpoint: T, now: Instant) -> ConnectionId {
        self.insert(connection, endpoint, None, now)
    }

    /// Adds a connection that the host dials.
    pub fn dial(
        &mut self,
        connection: Connection,
        endpoint: T,
        purpose: Purpose,
        now: Instant,
    ) -> ConnectionId {
        let destination = match purpose {
            Purpose::Client(destination) => Some(self.count(destination)),
            Purpose::Probe | Purpose::Exec => None,
        };
        self.insert(connection, endpoint, destination, now)
    }

    /// Counts one more client of an endpoint.
    fn count(&mut self, destination: Destination) -> Arc<Destination> {
        match self.clients.entry(Arc::new(destination)) {
            Entry::Occupied(mut known) => {
                *known.get_mut() += 1;
                Arc::clone(known.key())
            }
            Entry::Vacant(new) => {
                let shared = Arc::clone(new.key());
                new.insert(1);
                shared
            }
        }
    }

    /// Counts one client less.
    fn discount(&mut self, destination: &Destination) {
        if let Some(held) = self.clients.get_mut(destination) {
            *held -= 1;
            if *held == 0 {
                self.clients.remove(destination);
            }
        }
    }

    /// Adds a connection. Its ports must be free and the table not full. Queued
    /// replies for the ports are dropped: the guest would take a reset of the
    /// earlier connection for one of the new connection.
    fn insert(
        &mut self,
        connection: Connection,
        endpoint: T,
        destination: Option<Arc<Destination>>,
        now: Instant,
    ) -> ConnectionId {
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
                last_active: now,
                destination,
                deadline: None,
                queued: false,
            },
        );
        id
    }

    /// Ports of a new dial to port `guest`: the host port is unused for it.
    pub fn dial_ports(&mut self, guest: u32) -> Ports {
        // Ends, because there are far more ports than connections. A port is
        // reused only after all the others.
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

    /// The connection `id`, if it still exists.
    pub fn get_mut(&mut self, id: ConnectionId) -> Option<&mut TableEntry<T>> {
        self.entries.get_mut(&id)
    }

    /// Removes a connection.
    pub fn remove(&mut self, id: ConnectionId) -> Option<TableEntry<T>> {
        let entry = self.entries.remove(&id)?;
        self.free_ports(entry.connection.ports(), id);
        if let Some(destination) = &entry.destination {
            self.discount(destination);
        }
        if let Some(deadline) = entry.deadline {
            self.deadlines.remove(&(deadline, id));
        }
        if entry.queued {
            // A guest without receive buffers would keep the id queued.
            self.ready.retain(|queued| *queued != id);
        }
        Some(entry)
    }

    /// Starts to drain a connection that has ended for the guest. It frees the
    /// ports, and still counts as a connection.
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

    /// Removes every connection and reply.
    pub fn clear(&mut self) -> Vec<TableEntry<T>> {
        self.by_ports.clear();
        self.clients.clear();
        self.ready.clear();
        self.replies.clear();
        self.deadlines.clear();
        self.entries.drain().map(|(_, entry)| entry).collect()
    }

    /// Queues a connection for the guest's receive buffers, unless it is queued.
    pub fn schedule(&mut self, id: ConnectionId) {
        if let Some(entry) = self.entries.get_mut(&id)
            && !entry.queued
            && entry.connection.phase() != Phase::Draining
        {
            entry.queued = true;
            self.ready.push_back(id);
        }
    }

    /// Dequeues what to send next. Replies and connections alternate, so that a
    /// flood of refused requests does not delay heartbeats.
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

    /// Queues a connection first again: there was no receive buffer for it.
    pub fn put_back(&mut self, id: ConnectionId) {
        if let Some(entry) = self.entries.get_mut(&id)
            && !entry.queued
        {
            entry.queued = true;
            self.ready.push_front(id);
        }
    }

    /// Whether a reply or connection waits for a receive buffer.
    pub fn has_output(&self) -> bool {
        !self.replies.is_empty() || !self.ready.is_empty()
    }

    /// Queues a packet without a connection.
    pub fn reply(&mut self, header: Header) {
        if self.replies.len() < MAX_REPLIES {
            self.replies.push_back(header);
        }
    }

    /// Sets or clears the deadline of a connection.
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

    /// The earliest deadline.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// A connection whose deadline has passed; clears the deadline.
    pub fn pop_expired(&mut self, now: Instant) -> Option<ConnectionId> {
        let (deadline, id) = *self.deadlines.first()?;
        if deadline > now {
            return None;
        }
        self.set_deadline(id, None);
        Some(id)
    }
}
