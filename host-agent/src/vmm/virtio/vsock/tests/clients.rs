//! Clients of endpoints: how their connections end.

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, connect, setsockopt, socket, sockopt,
};
use vmbus::channel::TUNNEL_PORT;

use super::driver::*;
use crate::vmm::control::DialOutcome;
use crate::vmm::virtio::Device;
use crate::vmm::virtio::vsock::TimeLimits;
use crate::vmm::virtio::vsock::packet::Operation;

/// An endpoint.
const WEB: (u32, &[u8]) = (TUNNEL_PORT, b"web");

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
