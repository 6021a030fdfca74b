//! Listening sockets that the VMM processes of a role hold too, so that they outlive this
//! process: connections wait in their backlog for the next one.
//!
//! A VMM process may have been taken over by its guest. What it hands over is used only if
//! it is a listening TCP socket with exactly the address of an endpoint.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{SockType, SockaddrStorage, getsockname, getsockopt, sockopt};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::closer::Closer;

/// The listening sockets of a role by their address. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct HeldListeners(watch::Sender<Sockets>);

type Sockets = BTreeMap<SocketAddr, Arc<OwnedFd>>;

/// The changes of [`HeldListeners`].
pub type ListenerChanges = watch::Receiver<Sockets>;

impl HeldListeners {
    /// Holds a duplicate of `listener` in place of the socket before it.
    pub(super) fn set(&self, address: SocketAddr, listener: &TcpListener) -> io::Result<()> {
        let copy = Arc::new(listener.as_fd().try_clone_to_owned()?);
        self.0.send_modify(|held| {
            held.insert(address, copy);
        });
        Ok(())
    }

    /// Closes the socket of `address`.
    pub(super) fn remove(&self, address: SocketAddr) {
        self.0.send_modify(|held| {
            held.remove(&address);
        });
    }

    /// Closes the sockets.
    pub fn clear(&self) {
        self.0.send_replace(Sockets::new());
    }

    /// Changes from now on.
    pub fn changes(&self) -> ListenerChanges {
        self.0.subscribe()
    }

    /// A duplicate of each socket, for a VMM process.
    pub fn duplicates(&self) -> io::Result<Vec<OwnedFd>> {
        let held = self.0.borrow();
        held.values().map(|socket| socket.try_clone()).collect()
    }
}

/// What a VMM process handed over as the listening sockets of its role. Dropped, the rest is
/// closed on another thread.
#[derive(Debug)]
pub struct HandedOver {
    files: Vec<OwnedFd>,
    closer: Closer,
}

impl HandedOver {
    /// Takes descriptors from a VMM process, whose [`Closer`] closes them.
    pub const fn new(files: Vec<OwnedFd>, closer: Closer) -> Self {
        Self { files, closer }
    }

    /// Takes the socket that listens on `address`.
    pub fn take(&mut self, address: SocketAddr) -> Option<TcpListener> {
        let mut files = self.files.iter();
        let at = files.position(|file| listens_on(file) == Some(address))?;
        let listener = std::net::TcpListener::from(self.files.swap_remove(at));
        // The flag is shared with every process that has the socket.
        listener.set_nonblocking(true).ok()?;
        TcpListener::from_std(listener).ok()
    }

    /// Descriptors that listen on none of `addresses`.
    pub fn foreign(&self, addresses: &[SocketAddr]) -> usize {
        let is_foreign =
            |file: &&OwnedFd| !listens_on(file).is_some_and(|address| addresses.contains(&address));
        self.files.iter().filter(is_foreign).count()
    }
}

impl Drop for HandedOver {
    fn drop(&mut self) {
        self.closer.close(std::mem::take(&mut self.files));
    }
}

/// The address of a TCP socket that listens. No call waits, whatever the descriptor is.
pub(super) fn listens_on(file: &impl AsFd) -> Option<SocketAddr> {
    let file = file.as_fd();
    if getsockopt(&file, sockopt::SockType) != Ok(SockType::Stream)
        || getsockopt(&file, sockopt::AcceptConn) != Ok(true)
    {
        return None;
    }
    let address = getsockname::<SockaddrStorage>(file.as_raw_fd()).ok()?;
    let v4 = address.as_sockaddr_in().copied();
    let v6 = address.as_sockaddr_in6().copied();
    let v4 = v4.map(|address| SocketAddr::V4(SocketAddrV4::from(address)));
    v4.or_else(|| v6.map(|address| SocketAddr::V6(SocketAddrV6::from(address))))
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpStream};
    use std::os::unix::net::UnixListener;

    use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};

    use super::*;
    use crate::closer::tests::{busy, is_open};
    use crate::endpoints::listen;

    fn handed_over(files: Vec<OwnedFd>) -> HandedOver {
        HandedOver::new(files, Closer::default())
    }

    fn local() -> (TcpListener, SocketAddr) {
        let listener = listen("ep", (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_client_of_a_held_listener_is_served_by_its_next_owner() {
        let (listener, address) = local();
        let held = HeldListeners::default();
        held.set(address, &listener).unwrap();
        let mut changes = held.changes();
        let mut files = held.duplicates().unwrap();
        // Of a second instance of the role.
        files.extend(held.duplicates().unwrap());
        held.clear();
        drop(listener);
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        let client = TcpStream::connect(address).unwrap();
        // As a process without a sandbox may leave it.
        fcntl(&files[0], FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        let mut handed_over = handed_over(files);
        assert_eq!(handed_over.foreign(&[address]), 0);
        let listener = handed_over.take(address).unwrap();
        let flags = fcntl(&listener, FcntlArg::F_GETFL).unwrap();
        assert!(OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK));
        let flags = fcntl(&listener, FcntlArg::F_GETFD).unwrap();
        assert!(FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC));
        let (_, from) = listener.accept().await.unwrap();
        assert_eq!(from, client.local_addr().unwrap());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn only_a_listening_socket_of_the_endpoint_is_taken() {
        let (listener, address) = local();
        let (other, other_address) = local();
        let connected = TcpStream::connect(address).unwrap();
        let bound = tokio::net::TcpSocket::new_v4().unwrap();
        bound.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let bound_address = bound.local_addr().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let unix = UnixListener::bind(dir.path().join("socket")).unwrap();
        let udp = std::net::UdpSocket::bind(address).unwrap();
        let connected_address = connected.local_addr().unwrap();
        let files = vec![
            connected.into(),
            bound.as_fd().try_clone_to_owned().unwrap(),
            unix.into(),
            udp.into(),
            tempfile::tempfile().unwrap().into(),
            other.as_fd().try_clone_to_owned().unwrap(),
        ];
        let count = files.len();
        let mut handed_over = handed_over(files);
        for wanted in [address, bound_address, connected_address] {
            assert!(handed_over.take(wanted).is_none(), "{wanted}");
        }
        assert_eq!(handed_over.foreign(&[address]), count);
        assert_eq!(handed_over.foreign(&[address, other_address]), count - 1);
        drop(listener);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_is_not_taken_is_closed_by_the_closer() {
        let closer = Closer::default();
        let busy = busy(&closer);
        let (end, file) = std::os::unix::net::UnixStream::pair().unwrap();
        drop(HandedOver::new(vec![file.into()], closer));
        assert!(is_open(&end));
        drop(busy);
        while is_open(&end) {
            tokio::task::yield_now().await;
        }
    }
}
