//! Closes descriptors that another process has had, away from the runtime's thread.
//!
//! `close(2)` of the last reference may wait as long as the other process wants: a TCP
//! socket with `SO_LINGER` (socket(7)) waits for its peer, a file for its file system, and
//! a Unix socket closes every descriptor that is still in its queue.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::net::UnixStream;
use tokio::runtime::Handle;

/// Closes descriptors of one guest. Clones share one blocking thread, so that a guest
/// whose descriptors do not close takes no thread of the others.
#[derive(Clone, Default)]
pub struct Closer(Arc<Mutex<Queue>>);

#[derive(Default)]
struct Queue {
    waiting: Vec<OwnedFd>,
    has_thread: bool,
}

impl Closer {
    /// Closes `files` soon. Never waits, unless no runtime is left whose tasks could be
    /// delayed.
    pub fn close(&self, files: impl IntoIterator<Item = OwnedFd>) {
        let mut queue = self.lock();
        queue.waiting.extend(files);
        if queue.waiting.is_empty() || queue.has_thread {
            return;
        }
        let Ok(runtime) = Handle::try_current() else {
            queue.waiting.clear();
            return;
        };
        queue.has_thread = true;
        drop(queue);
        let this = self.clone();
        runtime.spawn_blocking(move || this.run());
    }

    fn run(&self) {
        loop {
            let mut queue = self.lock();
            let files = std::mem::take(&mut queue.waiting);
            if files.is_empty() {
                queue.has_thread = false;
                return;
            }
            // Not under the lock: this may wait.
            drop(queue);
            drop(files);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Closer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Closer")
    }
}

/// A Unix socket whose other end another process has. A [`Closer`] closes it, because
/// unread packets may carry descriptors, which close with the socket.
#[derive(Debug)]
pub struct PeerSocket {
    /// `None` only while the value is dropped.
    stream: Option<UnixStream>,
    closer: Closer,
}

impl PeerSocket {
    /// Wraps `stream`, which must not block.
    pub const fn new(stream: UnixStream, closer: Closer) -> Self {
        Self {
            stream: Some(stream),
            closer,
        }
    }

    /// Closes the socket, and what the other process sends over it.
    pub const fn closer(&self) -> &Closer {
        &self.closer
    }
}

impl Deref for PeerSocket {
    type Target = UnixStream;

    fn deref(&self) -> &UnixStream {
        self.stream.as_ref().expect("only Drop takes the stream")
    }
}

impl DerefMut for PeerSocket {
    fn deref_mut(&mut self) -> &mut UnixStream {
        self.stream.as_mut().expect("only Drop takes the stream")
    }
}

impl Drop for PeerSocket {
    fn drop(&mut self) {
        if let Some(Ok(stream)) = self.stream.take().map(UnixStream::into_std) {
            self.closer.close([stream.into()]);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::{ErrorKind, Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use nix::sys::socket::{setsockopt, sockopt};
    use tokio::io::AsyncReadExt as _;

    use super::*;

    /// Time for which the close of [`lingering`] waits.
    pub(crate) const LINGER: Duration = Duration::from_secs(60);

    /// A TCP socket whose close waits until the second socket is closed.
    pub(crate) fn lingering() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (theirs, _) = listener.accept().unwrap();
        ours.set_nonblocking(true).unwrap();
        // More than the receiver's buffer takes stays unsent.
        while ours.write(&[0; 4096]).is_ok() {}
        let linger = libc::linger {
            l_onoff: 1,
            l_linger: LINGER.as_secs() as i32,
        };
        setsockopt(&ours, sockopt::Linger, &linger).unwrap();
        (ours, theirs)
    }

    /// Keeps `closer` busy, so that it closes nothing else until the returned socket is dropped.
    pub(crate) fn busy(closer: &Closer) -> TcpStream {
        let (slow, peer) = lingering();
        closer.close([OwnedFd::from(slow)]);
        peer
    }

    /// Whether some process still has the other end of `end`.
    pub(crate) fn is_open(end: &UnixStream) -> bool {
        end.set_nonblocking(true).unwrap();
        let mut end = end;
        end.read(&mut [0])
            .is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_close_that_waits_delays_no_task() {
        let (slow, peer) = lingering();
        let (end, mut closed) = tokio::net::UnixStream::pair().unwrap();
        let closer = Closer::default();
        let started = std::time::Instant::now();
        closer.close([OwnedFd::from(slow)]);
        closer.close([OwnedFd::from(end.into_std().unwrap())]);
        assert!(started.elapsed() < LINGER / 4);
        // The reset of its peer ends the wait, and the next one is closed too.
        drop(peer);
        assert_eq!(closed.read(&mut [0]).await.unwrap(), 0);
        assert!(started.elapsed() < LINGER / 2);
    }
}
