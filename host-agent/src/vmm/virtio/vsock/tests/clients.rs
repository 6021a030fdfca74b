//! Clients of endpoints: which of them get a connection, and how their connections end.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, connect, setsockopt, socket, sockopt,
};
use vmbus::channel::{EXEC_PORT, TUNNEL_PORT};

use super::driver::*;
use super::limits::assert_ended;
use crate::vmm::control::DialOutcome;
use crate::vmm::virtio::Device;
use crate::vmm::virtio::vsock::TimeLimits;
use crate::vmm::virtio::vsock::connection::{Connection, Verdict};
use crate::vmm::virtio::vsock::connection_table::{
    CHANNEL_RESERVE, ConnectionId, ConnectionTable, Destination, EXEC_RESERVE, MAX_CONNECTIONS,
    Purpose,
};
use crate::vmm::virtio::vsock::packet::Operation;

/// Connections of ten endpoints whose clients take what they get, one endpoint after the
/// other: each takes half of what is free.
const SHARES: [usize; 10] = [489, 244, 122, 61, 31, 15, 8, 4, 2, 1];

/// An endpoint.
const WEB: (u32, &[u8]) = (TUNNEL_PORT, b"web");

/// A client of an endpoint.
fn client(endpoint: u8) -> Purpose {
    Purpose::Client(Destination {
        port: TUNNEL_PORT,
        first: vec![endpoint],
    })
}

/// Adds a connection of a client that the guest has accepted.
fn accepted(table: &mut ConnectionTable<()>, endpoint: u8, now: Instant) -> ConnectionId {
    let ports = table.dial_ports(TUNNEL_PORT);
    let mut connection = Connection::dialing(ports, CID);
    connection.next_control();
    let response = Guest::header(Operation::Response, ports.host, ports.guest);
    assert_eq!(connection.receive(&response, 0), Verdict::Connected);
    table.dial(connection, (), client(endpoint), now)
}

#[test]
fn an_endpoint_has_at_most_as_many_clients_as_are_free() {
    let now = Instant::now();
    let mut table = ConnectionTable::new(CID, 0);
    let mut ids = Vec::new();
    for (endpoint, share) in (0..).zip(SHARES) {
        for _ in 0..share {
            assert!(table.can_dial(&client(endpoint)));
            ids.push(accepted(&mut table, endpoint, now));
        }
        assert!(!table.can_dial(&client(endpoint)));
    }
    assert_eq!(ids.len(), MAX_CONNECTIONS - CHANNEL_RESERVE - EXEC_RESERVE);
    assert!(!table.can_dial(&client(99)));
    // One that drains still counts, as a connection and for its endpoint.
    table.detach(ids[0]);
    assert!(!table.can_dial(&client(99)));
    table.remove(ids[0]);
    assert!(table.can_dial(&client(99)));
    // The first endpoint gets more when it has fewer than are free: 488 - n < 1 + n.
    for (count, id) in (1..=244).zip(&ids[1..]) {
        assert!(!table.can_dial(&client(0)), "{count}");
        table.remove(*id);
    }
    assert!(table.can_dial(&client(0)));
    for id in ids {
        table.remove(id);
    }
    for _ in 0..SHARES[0] {
        assert!(table.can_dial(&client(0)));
        accepted(&mut table, 0, now);
    }
    assert!(!table.can_dial(&client(0)));
    table.clear();
    assert!(table.can_dial(&client(0)));
}

#[test]
fn the_longest_idle_client_is_one_of_the_endpoint() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let limit = Duration::from_secs(60);
    let mut table = ConnectionTable::new(CID, 0);
    let of = |table: &ConnectionTable<()>, endpoint, seconds| {
        let Purpose::Client(destination) = client(endpoint) else {
            unreachable!();
        };
        table.longest_idle(&destination, at(seconds), limit)
    };
    assert_eq!(of(&table, 0, 1000), None);
    let other = accepted(&mut table, 1, at(0));
    let first = accepted(&mut table, 0, at(1));
    let second = accepted(&mut table, 0, at(2));
    assert_eq!(of(&table, 0, 60), None);
    assert_eq!(of(&table, 0, 61), Some(first));
    assert_eq!(of(&table, 1, 61), Some(other));
    table.get_mut(first).unwrap().last_active = at(30);
    assert_eq!(of(&table, 0, 61), None);
    assert_eq!(of(&table, 0, 62), Some(second));
    // It ends by another limit.
    table.detach(second);
    assert_eq!(of(&table, 0, 89), None);
    assert_eq!(of(&table, 0, 90), Some(first));
    table.remove(first);
    let ports = table.dial_ports(TUNNEL_PORT);
    table.dial(Connection::dialing(ports, CID), (), client(0), at(100));
    assert_eq!(of(&table, 0, 1000), None);
}

/// Dials for `socket`; the guest accepts, and gets `first`. The host port.
fn dial(guest: &mut Guest, id: u64, (port, first): (u32, &[u8]), socket: OwnedFd) -> u32 {
    let handle = guest.device.handle();
    handle.dial(id, port, first.to_vec(), socket);
    let (request, _) = guest.receive();
    assert_eq!(request.operation(), Some(Operation::Request), "{request:?}");
    let host = request.src_port;
    guest.control(Operation::Response, host, port);
    assert_eq!(guest.dialed(), (id, DialOutcome::Connected));
    if !first.is_empty() {
        let (header, payload) = guest.receive();
        assert_eq!((header.src_port, &payload[..]), (host, first));
    }
    host
}

/// A connection that the guest accepts.
fn connected(guest: &mut Guest, id: u64, to: (u32, &[u8])) -> (UnixStream, u32) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let port = dial(guest, id, to, theirs.into());
    (ours, port)
}

fn assert_refused(guest: &Guest, id: u64, (port, first): (u32, &[u8])) {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let handle = guest.device.handle();
    handle.dial(id, port, first.to_vec(), theirs.into());
    assert_eq!(guest.dialed(), (id, DialOutcome::Unavailable));
    assert_ended(&mut ours);
}

#[test]
fn clients_leave_connections_for_exec_channels_and_probes() {
    crate::descriptors::raise_limit();
    let mut guest = Guest::new();
    let mut open = Vec::new();
    // Clients of ten endpoints, then commands of an operator. None is idle for long enough.
    for (endpoint, share) in (0..).zip(SHARES) {
        let to: (u32, &[u8]) = (TUNNEL_PORT, &[endpoint]);
        for _ in 0..share {
            let id = open.len() as u64 + 1;
            open.push(connected(&mut guest, id, to).0);
        }
        assert_refused(&guest, 5000, to);
    }
    assert_refused(&guest, 5000, (TUNNEL_PORT, &[99]));
    for _ in 0..EXEC_RESERVE {
        let id = open.len() as u64 + 1;
        open.push(connected(&mut guest, id, (EXEC_PORT, &[])).0);
    }
    assert_refused(&guest, 5000, (EXEC_PORT, &[]));
    guest.device.handle().probe(5001, 81);
    let (request, _) = guest.receive();
    guest.send(&request.reset(), &[]);
    assert_eq!(guest.dialed(), (5001, DialOutcome::Refused));
    // Agents can open each channel twice: again before the old one has ended.
    for n in 0..CHANNEL_RESERVE as u32 {
        let mut host = guest.connect(PORT, n);
        guest.data(PORT, n, b"hello");
        assert_eq!(read_exactly(&mut host, 5), b"hello");
        open.push(host);
    }
    guest.wait_connections(MAX_CONNECTIONS as u32);
}

#[test]
fn an_idle_client_gives_its_place_to_a_new_one() {
    crate::descriptors::raise_limit();
    let mut guest = Guest::with_limits(TimeLimits {
        idle: Duration::ZERO,
        ..LIMITS
    });
    // None ends while there is space.
    let share = SHARES[0] as u64;
    let mut clients: Vec<_> = (0..share)
        .map(|id| connected(&mut guest, id, WEB))
        .collect();
    guest.wait_connections(share as u32);
    // Bytes in either direction.
    guest.data(clients[0].1, TUNNEL_PORT, b"x");
    assert_eq!(read_exactly(&mut clients[0].0, 1), b"x");
    clients[1].0.write_all(b"y").unwrap();
    assert_eq!(guest.receive().1, b"y");

    let (mut new, theirs) = UnixStream::pair().unwrap();
    let handle = guest.device.handle();
    handle.dial(share, TUNNEL_PORT, b"web".to_vec(), theirs.into());
    let mut packets = [guest.receive().0, guest.receive().0];
    packets.sort_by_key(|header| header.op);
    let [request, reset] = packets;
    assert_eq!(request.operation(), Some(Operation::Request));
    assert_eq!(reset.operation(), Some(Operation::Reset));
    assert_eq!(
        (reset.src_port, reset.dst_port),
        (clients[2].1, TUNNEL_PORT)
    );
    assert_ended(&mut clients[2].0);
    guest.control(Operation::Response, request.src_port, TUNNEL_PORT);
    assert_eq!(guest.dialed(), (share, DialOutcome::Connected));
    guest.receive();
    guest.data(request.src_port, TUNNEL_PORT, b"new");
    assert_eq!(read_exactly(&mut new, 3), b"new");
    guest.wait_connections(share as u32);
    // The clients of another endpoint end none of these.
    let _other = connected(&mut guest, share + 1, (TUNNEL_PORT, b"api"));
    guest.wait_connections(share as u32 + 1);
}

/// A TCP connection whose two sockets together hold less than [`SENT`]: the client's
/// socket, and the accepted one.
fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    setsockopt(&listener, sockopt::SndBuf, &1).unwrap();
    let SocketAddr::V4(address) = listener.local_addr().unwrap() else {
        unreachable!();
    };
    let client = client_socket(address);
    (client, listener.accept().unwrap().0)
}

fn client_socket(address: SocketAddrV4) -> TcpStream {
    let flags = SockFlag::SOCK_CLOEXEC;
    let client = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
    // Before the connection begins, for its window.
    setsockopt(&client, sockopt::RcvBuf, &1).unwrap();
    connect(client.as_raw_fd(), &SockaddrIn::from(address)).unwrap();
    let client = TcpStream::from(client);
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client
}

/// Bytes that the guest sends: within its first credit.
const SENT: usize = 60_000;

/// A client that reads nothing, while the guest sends [`SENT`] bytes and closes.
fn stalled(guest: &mut Guest) -> TcpStream {
    let (client, socket) = tcp();
    let port = dial(guest, 1, WEB, socket.into());
    guest.wait_connections(1);
    for _ in 0..SENT / 4000 {
        guest.data(port, TUNNEL_PORT, &[7; 4000]);
    }
    guest.shutdown(port, TUNNEL_PORT, 3);
    while guest.receive().0.operation() != Some(Operation::Reset) {}
    client
}

#[test]
fn a_client_that_is_cut_off_while_it_reads_nothing_is_reset() {
    let mut guest = Guest::with_limits(TimeLimits {
        drain: Duration::from_millis(20),
        ..LIMITS
    });
    let mut client = stalled(&mut guest);
    guest.wait_connections(0);
    let mut all = Vec::new();
    let error = client.read_to_end(&mut all).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(all.len() < SENT, "{}", all.len());
}

#[test]
fn a_slow_client_gets_all_bytes_and_then_the_end() {
    let mut guest = Guest::new();
    let mut client = stalled(&mut guest);
    let mut all = Vec::new();
    client.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), SENT);
}

#[test]
fn a_client_is_reset_if_the_guest_does_not_finish() {
    let ends: [fn(&mut Guest, u32); 3] = [
        |guest, port| guest.control(Operation::Reset, port, TUNNEL_PORT),
        // A violation.
        |guest, port| guest.control(Operation::Request, port, TUNNEL_PORT),
        |guest, _| guest.device.reset(),
    ];
    for end in ends {
        let mut guest = Guest::new();
        let (mut client, socket) = tcp();
        let port = dial(&mut guest, 1, WEB, socket.into());
        guest.data(port, TUNNEL_PORT, b"half");
        let mut half = [0; 4];
        client.read_exact(&mut half).unwrap();
        end(&mut guest, port);
        let error = client.read(&mut half).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
}
