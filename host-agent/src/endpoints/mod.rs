//! Public listeners: each accepted connection goes to the next instance in
//! rotation, which passes the socket to its VMM process.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc::{self, error::TrySendError};

/// Connections that the kernel queues until they are accepted.
const BACKLOG: u32 = 1024;

/// Pause after `accept` failed.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// Bytes for each direction of a client's socket, of which the kernel reserves twice as
/// many. Left to itself it lets a client that does not read take 4 MiB (`tcp_wmem`, tcp(7)),
/// times a thousand connections for each guest. Enough for 100 MB/s at 1 ms.
const SOCKET_BUFFER: u32 = 128 * 1024;

/// A client that is silent for this long is asked whether it is there (`SO_KEEPALIVE`).
const KEEPALIVE_AFTER: Duration = Duration::from_secs(60);
/// Time between two questions.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(15);
/// Unanswered questions after which the connection ends.
const KEEPALIVE_QUESTIONS: u32 = 4;

/// A connection for an instance.
#[derive(Debug)]
pub struct Incoming {
    /// The client's socket.
    pub socket: OwnedFd,
    /// TCP port of the role in the guest.
    pub local_port: u16,
}

/// The instances of a role that take connections.
#[derive(Debug, Clone, Default)]
pub struct Rotation(Arc<Mutex<Members>>);

#[derive(Debug, Default)]
struct Members {
    ready: Vec<(String, mpsc::Sender<Incoming>)>,
    next: usize,
}

impl Rotation {
    /// Adds or removes an instance.
    pub fn set(&self, instance: &str, sender: Option<mpsc::Sender<Incoming>>) {
        let mut members = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        members.ready.retain(|(name, _)| name != instance);
        if let Some(sender) = sender {
            members.ready.push((instance.to_owned(), sender));
        }
    }

    /// Gives `incoming` to the next instance whose queue is not full. If there
    /// is none, the socket closes.
    fn dispatch(&self, mut incoming: Incoming) {
        let mut members = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..members.ready.len() {
            members.next = (members.next + 1) % members.ready.len();
            match members.ready[members.next].1.try_send(incoming) {
                Ok(()) => return,
                Err(TrySendError::Full(returned) | TrySendError::Closed(returned)) => {
                    incoming = returned;
                }
            }
        }
    }
}

/// A public port on which the host cannot listen.
#[derive(Debug, thiserror::Error)]
#[error("endpoint {endpoint}: cannot listen on {address}")]
pub struct ListenError {
    /// Name of the endpoint.
    pub endpoint: String,
    /// Address and port of the host.
    pub address: SocketAddr,
    /// Error of the system call.
    #[source]
    pub source: std::io::Error,
}

/// Listens on `address` for an endpoint. While no instance is in rotation,
/// [`serve`] closes each new connection at once.
pub fn listen(endpoint: &str, address: SocketAddr) -> Result<TcpListener, ListenError> {
    let open = || {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        }?;
        socket.set_reuseaddr(true)?;
        bound(&socket)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    open().map_err(|source| ListenError {
        endpoint: endpoint.to_owned(),
        address,
        source,
    })
}

/// Sets what each accepted socket inherits: its memory is bounded, and it ends when the
/// client's machine is gone.
fn bound(socket: &TcpSocket) -> std::io::Result<()> {
    let seconds = |time: Duration| u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
    socket.set_send_buffer_size(SOCKET_BUFFER)?;
    socket.set_recv_buffer_size(SOCKET_BUFFER)?;
    socket.set_keepalive(true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &seconds(KEEPALIVE_AFTER))?;
    setsockopt(socket, sockopt::TcpKeepInterval, &seconds(KEEPALIVE_EVERY))?;
    setsockopt(socket, sockopt::TcpKeepCount, &KEEPALIVE_QUESTIONS)?;
    // The same limit for data that a client's machine does not acknowledge, in milliseconds.
    let limit = KEEPALIVE_AFTER + KEEPALIVE_EVERY * KEEPALIVE_QUESTIONS;
    let limit = seconds(limit).saturating_mul(1000);
    setsockopt(socket, sockopt::TcpUserTimeout, &limit)?;
    Ok(())
}

/// Accepts connections until the future is dropped.
pub async fn serve(listener: TcpListener, rotation: Rotation, local_port: u16) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                if let Ok(socket) = detach(stream) {
                    rotation.dispatch(Incoming { socket, local_port });
                }
            }
            // Descriptors or memory are short: wait until connections close.
            Err(_) => tokio::time::sleep(ACCEPT_RETRY).await,
        }
    }
}

fn detach(stream: TcpStream) -> std::io::Result<OwnedFd> {
    stream.set_nodelay(true)?;
    Ok(stream.into_std()?.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::getsockopt;
    use std::io::Write as _;
    use std::net::Ipv4Addr;
    use tokio::io::AsyncReadExt;

    #[tokio::test(flavor = "current_thread")]
    async fn connections_rotate_among_ready_instances_or_close() {
        let listener = listen("ep", (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let rotation = Rotation::default();
        let task = tokio::spawn(serve(listener, rotation.clone(), 80));
        let mut refused = TcpStream::connect(address).await.unwrap();
        assert_eq!(refused.read(&mut [0]).await.unwrap_or(0), 0);
        let (a, mut from_a) = mpsc::channel(4);
        let (b, mut from_b) = mpsc::channel(4);
        rotation.set("a", Some(a));
        rotation.set("b", Some(b));
        let mut clients = Vec::new();
        for _ in 0..4 {
            clients.push(TcpStream::connect(address).await.unwrap());
        }
        for receiver in [&mut from_a, &mut from_b] {
            for _ in 0..2 {
                assert_eq!(receiver.recv().await.unwrap().local_port, 80);
            }
        }
        rotation.set("a", None);
        clients.push(TcpStream::connect(address).await.unwrap());
        assert!(from_b.recv().await.is_some() && from_a.try_recv().is_err());
        task.abort();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_port_in_use_names_endpoint_and_address() {
        let first = listen("ep", (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = first.local_addr().unwrap();
        let error = listen("web", address).unwrap_err().to_string();
        assert!(error.contains("web") && error.contains(&address.to_string()));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_client_takes_little_memory_and_ends_with_its_machine() {
        let listener = listen("ep", (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let rotation = Rotation::default();
        let task = tokio::spawn(serve(listener, rotation.clone(), 80));
        let (sender, mut incoming) = mpsc::channel(1);
        rotation.set("a", Some(sender));
        let _client = TcpStream::connect(address).await.unwrap();
        let socket = incoming.recv().await.unwrap().socket;
        let twice = 2 * SOCKET_BUFFER as usize;
        assert!(getsockopt(&socket, sockopt::SndBuf).unwrap() <= twice);
        assert!(getsockopt(&socket, sockopt::RcvBuf).unwrap() <= twice);
        assert!(getsockopt(&socket, sockopt::KeepAlive).unwrap());
        assert_eq!(getsockopt(&socket, sockopt::TcpKeepIdle).unwrap(), 60);
        assert_eq!(getsockopt(&socket, sockopt::TcpKeepInterval).unwrap(), 15);
        assert_eq!(getsockopt(&socket, sockopt::TcpKeepCount).unwrap(), 4);
        let timeout = getsockopt(&socket, sockopt::TcpUserTimeout).unwrap();
        assert_eq!(timeout, 120_000);
        // A client that does not read cannot make the host keep more.
        let mut stream = std::net::TcpStream::from(socket);
        stream.set_nonblocking(true).unwrap();
        let mut kept = 0;
        while let Ok(count) = stream.write(&[0; 4096]) {
            kept += count;
        }
        // Half of it is in the client's socket, whose memory is the client's.
        assert!(kept < 8 << 20, "{kept}");
        task.abort();
    }
}
