//! A Unix stream socket whose other end a VMM process has.
//!
//! That end can attach descriptors to its bytes (`SCM_RIGHTS`, unix(7)). `read(2)` drops
//! them in the kernel, on the thread that reads, and the close of a descriptor may wait
//! ([`crate::closer`]). So each read takes them, and the stream fails.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;

use crate::closer::{Closer, PeerSocket};
use crate::vmm::wire;

/// The stream.
#[derive(Debug)]
pub struct GuestStream(PeerSocket);

impl GuestStream {
    /// A stream on `socket`, which must not block.
    pub const fn new(socket: UnixStream, closer: Closer) -> Self {
        Self(PeerSocket::new(socket, closer))
    }

    /// A stream on a socket that a VMM process sent.
    pub fn received(socket: OwnedFd, closer: Closer) -> io::Result<Self> {
        let stream = std::os::unix::net::UnixStream::from(socket);
        stream.set_nonblocking(true)?;
        Ok(Self::new(UnixStream::from_std(stream)?, closer))
    }

    fn writer(&mut self) -> Pin<&mut UnixStream> {
        Pin::new(&mut self.0)
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let stream = &self.0;
        loop {
            ready!(stream.poll_read_ready(context))?;
            let free = buffer.initialize_unfilled();
            let read = stream.try_io(Interest::READABLE, || {
                wire::recv_bytes(stream.as_fd(), free)
            });
            match read {
                Ok((count, files)) if files.is_empty() => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok((_, files)) => {
                    stream.closer().close(files);
                    let text = "descriptors where none belong";
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, text)));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.writer().poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.writer().poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.writer().poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream as Blocking;
    use std::time::Instant;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::closer::tests::{LINGER, lingering};

    fn pair() -> (GuestStream, Blocking) {
        let (ours, theirs) = Blocking::pair().unwrap();
        let ours = GuestStream::received(ours.into(), Closer::default()).unwrap();
        (ours, theirs)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn bytes_pass_in_both_directions_until_the_end() {
        use std::io::{Read as _, Write as _};
        let (mut ours, mut theirs) = pair();
        theirs.write_all(b"hello").unwrap();
        let mut bytes = [0; 9];
        assert_eq!(ours.read(&mut bytes).await.unwrap(), 5);
        ours.write_all(b"guest").await.unwrap();
        theirs.read_exact(&mut bytes[..5]).unwrap();
        assert_eq!(&bytes[..5], b"guest");
        drop(theirs);
        assert_eq!(ours.read(&mut bytes).await.unwrap(), 0);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_descriptor_that_closes_slowly_delays_no_reader() {
        // Read, or left in the queue of the socket.
        for read in [true, false] {
            let (mut ours, theirs) = pair();
            let (slow, peer) = lingering();
            wire::send_bytes(theirs.as_fd(), b"x", &[slow.as_fd()]).unwrap();
            drop(slow);
            let started = Instant::now();
            if read {
                let error = ours.read(&mut [0; 8]).await.unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            }
            drop(ours);
            assert!(started.elapsed() < LINGER / 4);
            drop(peer);
        }
    }
}
