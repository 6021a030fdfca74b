//! Public listeners: each accepted connection goes to the next instance in
//! rotation, which passes the socket to its VMM process.

mod held;
mod rotation;

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};
use vmbus::text::chain;

pub use held::{HandedOver, HeldListeners, ListenerChanges};
pub use rotation::Rotation;

/// Connections that the kernel queues until they are accepted.
const BACKLOG: u32 = 1024;

/// Pause after `accept` failed.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// Pause after the host could not listen on an address again.
const LISTEN_RETRY: Duration = Duration::from_secs(1);

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

const NO_LINGER: libc::linger = libc::linger {
    l_onoff: 0,
    l_linger: 0,
};

/// A connection for an instance.
#[derive(Debug)]
pub struct Incoming {
    /// The client's socket.
    pub socket: OwnedFd,
    /// TCP port of the role in the guest.
    pub local_port: u16,
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

/// Listens on `address` for an endpoint.
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

/// A public endpoint of a role.
#[derive(Debug)]
pub struct Endpoint {
    /// Its name in messages.
    pub label: String,
    /// Address on the host.
    pub address: SocketAddr,
    /// Port on which the role listens in the guest.
    pub local_port: u16,
    /// The instances of the role.
    pub rotation: Rotation,
    /// The listening sockets of the role.
    pub held: HeldListeners,
}

impl Endpoint {
    /// Accepts connections until the future is dropped. Without a `listener`, listens as
    /// soon as the address is free. A VMM process that holds the listener can shut it down:
    /// then it gets no other one to hold.
    ///
    /// While no instance is in rotation, each new connection is closed at once; but clients
    /// may have waited for this host agent, so until the first instance is in rotation they
    /// wait on, for at most `patience`.
    pub async fn serve(
        self,
        mut listener: Option<TcpListener>,
        patience: Duration,
        report: impl Fn(String),
    ) {
        if listener.is_none() {
            let new = self.listen_again(&report).await;
            self.hold(&new);
            listener = Some(new);
        }
        let _ = timeout(patience, self.rotation.began()).await;
        loop {
            if let Some(listener) = listener {
                serve(listener, &self.rotation, self.local_port).await;
                self.held.remove(self.address);
                let Self { label, address, .. } = &self;
                report(format!(
                    "endpoint {label}: a VMM process shut the socket of {address} down; the \
                     next one ends with this host agent"
                ));
            }
            listener = Some(self.listen_again(&report).await);
        }
    }

    /// Tries to listen until it succeeds.
    async fn listen_again(&self, report: &impl Fn(String)) -> TcpListener {
        let mut reported = false;
        loop {
            match self.listen() {
                Ok(listener) => return listener,
                Err(error) if !reported => {
                    reported = true;
                    report(format!("{}; tries again", chain(&error)));
                }
                Err(_) => {}
            }
            sleep(LISTEN_RETRY).await;
        }
    }

    /// Listens on its address.
    ///
    /// # Errors
    /// The address is in use or not permitted.
    pub fn listen(&self) -> Result<TcpListener, ListenError> {
        listen(&self.label, self.address)
    }

    /// Lets the VMM processes of the role hold `listener`.
    pub fn hold(&self, listener: &TcpListener) {
        // No descriptor is left: the socket ends with this process.
        if let Err(error) = self.held.set(self.address, listener) {
            tracing::warn!(endpoint = self.label, %error, "cannot duplicate a listening socket");
        }
    }
}

/// Accepts connections until the socket no longer listens.
async fn serve(listener: TcpListener, rotation: &Rotation, local_port: u16) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                if let Ok(socket) = detach(stream) {
                    rotation.dispatch(Incoming { socket, local_port });
                }
            }
            Err(_) if held::listens_on(&listener).is_none() => return,
            // Descriptors or memory are short: wait until connections close.
            Err(_) => sleep(ACCEPT_RETRY).await,
        }
    }
}

fn detach(stream: TcpStream) -> std::io::Result<OwnedFd> {
    // Inherited from the listening socket, where a VMM process that holds it can set it: a
    // close would wait (socket(7)).
    setsockopt(&stream, sockopt::Linger, &NO_LINGER)?;
    stream.set_nodelay(true)?;
    Ok(stream.into_std()?.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{Shutdown, getsockopt, shutdown};
    use std::io::Write as _;
    use std::net::Ipv4Addr;
    use std::os::fd::AsRawFd as _;
    use tokio::io::AsyncReadExt;
    use tokio::sync::mpsc;

    fn endpoint(address: SocketAddr, rotation: &Rotation) -> Endpoint {
        Endpoint {
            label: "ep".into(),
            address,
            local_port: 80,
            rotation: rotation.clone(),
            held: HeldListeners::default(),
        }
    }

    fn served(listener: TcpListener, rotation: &Rotation) -> impl Future<Output = ()> + use<> {
        let endpoint = endpoint(listener.local_addr().unwrap(), rotation);
        endpoint.hold(&listener);
        endpoint.serve(Some(listener), Duration::ZERO, |text| panic!("{text}"))
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_waiting_client_is_served_by_the_first_ready_instance() {
        let listener = listen("ep", (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let rotation = Rotation::default();
        let served =
            endpoint(address, &rotation).serve(Some(listener), Duration::from_secs(600), |text| {
                panic!("{text}")
            });
        let task = tokio::spawn(served);
        let mut client = TcpStream::connect(address).await.unwrap();
        let waits = timeout(Duration::from_millis(50), client.read(&mut [0])).await;
        assert!(waits.is_err());
        let (sender, mut incoming) = mpsc::channel(1);
        rotation.set("a", Some(sender));
        assert!(incoming.recv().await.is_some());
        // From now on a client without an instance is closed.
        rotation.set("a", None);
        let mut refused = TcpStream::connect(address).await.unwrap();
        assert_eq!(refused.read(&mut [0]).await.unwrap_or(0), 0);
        task.abort();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_socket_that_a_vmm_process_shut_down_is_replaced() {
        let listener = listen("ep", (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let rotation = Rotation::default();
        let (sender, mut incoming) = mpsc::channel(1);
        rotation.set("a", Some(sender));
        let endpoint = endpoint(address, &rotation);
        endpoint.hold(&listener);
        let held = endpoint.held.clone();
        let [theirs] = &held.duplicates().unwrap()[..] else {
            panic!("not one socket");
        };
        let (reports, mut reported) = mpsc::unbounded_channel();
        let report = move |text| reports.send(text).unwrap();
        let task = tokio::spawn(endpoint.serve(Some(listener), Duration::ZERO, report));
        shutdown(theirs.as_raw_fd(), Shutdown::Both).unwrap();
        let report = reported.recv().await.unwrap();
        assert!(report.contains("shut the socket"), "{report}");
        let _client = loop {
            if let Ok(client) = TcpStream::connect(address).await {
                break client;
            }
        };
        assert!(incoming.recv().await.is_some());
        // It cannot be shut down again.
        assert!(held.duplicates().unwrap().is_empty());
        task.abort();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_address_in_use_is_served_once_it_is_free() {
        let other = listen("ep", (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = other.local_addr().unwrap();
        let rotation = Rotation::default();
        let (sender, mut incoming) = mpsc::channel(1);
        rotation.set("a", Some(sender));
        let endpoint = endpoint(address, &rotation);
        let mut held = endpoint.held.changes();
        let (reports, mut reported) = mpsc::unbounded_channel();
        let report = move |text| reports.send(text).unwrap();
        let task = tokio::spawn(endpoint.serve(None, Duration::ZERO, report));
        let report = reported.recv().await.unwrap();
        assert!(report.contains("cannot listen on"), "{report}");
        drop(other);
        held.changed().await.unwrap();
        let _client = TcpStream::connect(address).await.unwrap();
        assert!(incoming.recv().await.is_some());
        task.abort();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn no_client_socket_lingers_when_it_is_closed() {
        let listener = listen("ep", (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let linger = libc::linger {
            l_onoff: 1,
            l_linger: 60,
        };
        setsockopt(&listener, sockopt::Linger, &linger).unwrap();
        let rotation = Rotation::default();
        let (sender, mut incoming) = mpsc::channel(1);
        rotation.set("a", Some(sender));
        let task = tokio::spawn(served(listener, &rotation));
        let _client = TcpStream::connect(address).await.unwrap();
        let socket = incoming.recv().await.unwrap().socket;
        let linger = getsockopt(&socket, sockopt::Linger).unwrap();
        assert_eq!(linger.l_onoff, 0);
        task.abort();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn connections_rotate_among_ready_instances_or_close() {
        let listener = listen("ep", (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let rotation = Rotation::default();
        let task = tokio::spawn(served(listener, &rotation));
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
        let task = tokio::spawn(served(listener, &rotation));
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
