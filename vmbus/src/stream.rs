//! Frames over an asynchronous byte stream, and streams joined with each other.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, copy_buf};

use crate::frame::{self, Decoder, FrameError, Message};

/// Bytes asked of the stream at once. The buffer is part of every future that
/// reads frames, and most frames are far smaller.
const READ_SIZE: usize = 8 * 1024;

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The stream failed.
    #[error("the connection broke")]
    Io(#[from] io::Error),
    /// The peer broke the framing.
    #[error("a frame is not valid")]
    Frame(#[from] FrameError),
}

/// Reads frames. Cancelling [`FrameReader::next`] loses nothing.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    decoder: Decoder,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads from `stream`.
    pub fn new(stream: R) -> Self {
        Self {
            stream,
            decoder: Decoder::new(),
        }
    }

    /// The next message, or `None` when the peer closed between frames.
    pub async fn next<T: Message>(&mut self) -> Result<Option<T>, StreamError> {
        loop {
            if let Some(message) = self.decoder.take_frame()? {
                return Ok(Some(message));
            }
            let mut bytes = [0; READ_SIZE];
            let count = self.stream.read(&mut bytes).await?;
            if count == 0 {
                if self.decoder.is_empty() {
                    return Ok(None);
                }
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            self.decoder.push(&bytes[..count]);
        }
    }

    /// Reads exactly `buffer.len()` raw bytes that follow the last frame.
    pub async fn read_raw(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let buffered = self.decoder.take(buffer);
        self.stream.read_exact(&mut buffer[buffered..]).await?;
        Ok(())
    }

    /// The stream and the bytes read beyond the last frame.
    pub fn into_parts(self) -> (R, Vec<u8>) {
        (self.stream, self.decoder.into_rest())
    }
}

/// Writes one message as a frame.
pub async fn send<W: AsyncWrite + Unpin, T: Message>(
    stream: &mut W,
    message: &T,
) -> Result<(), StreamError> {
    let bytes = frame::encode(message)?;
    stream.write_all(&bytes).await?;
    stream.flush().await?;
    Ok(())
}

/// Joins a client with its server until both directions have ended, or the client takes no
/// more. Each is given as its reading and its writing half; `buffer` bytes are copied at
/// once.
///
/// When the server takes no more, because it ended, output that it wrote before is still
/// delivered.
pub async fn join<C, D, S, T>(mut client: (C, D), mut server: (S, T), buffer: usize)
where
    C: AsyncRead + Unpin,
    D: AsyncWrite + Unpin,
    S: AsyncRead + Unpin,
    T: AsyncWrite + Unpin,
{
    let to_server = async {
        let mut reader = BufReader::with_capacity(buffer, &mut client.0);
        let _ = copy_buf(&mut reader, &mut server.1).await;
        let _ = server.1.shutdown().await;
    };
    let to_client = async {
        let mut reader = BufReader::with_capacity(buffer, &mut server.0);
        copy_buf(&mut reader, &mut client.1).await?;
        client.1.shutdown().await
    };
    tokio::pin!(to_server, to_client);
    tokio::select! {
        () = &mut to_server => {
            let _ = to_client.await;
        }
        result = &mut to_client => {
            if result.is_ok() {
                to_server.await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixStream;

    #[tokio::test(flavor = "current_thread")]
    async fn output_of_a_server_that_ended_reaches_its_client() {
        let (mut client, ours) = UnixStream::pair().unwrap();
        let (theirs, mut server) = UnixStream::pair().unwrap();
        // The server closes without reading what the client sent.
        server.write_all(b"last words").await.unwrap();
        drop(server);
        client.write_all(b"more").await.unwrap();
        join(ours.into_split(), theirs.into_split(), 1024).await;
        let mut received = [0; 10];
        client.read_exact(&mut received).await.unwrap();
        assert_eq!(&received, b"last words");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn either_side_may_close_its_half_first() {
        for client_first in [true, false] {
            let (client, ours) = UnixStream::pair().unwrap();
            let (theirs, server) = UnixStream::pair().unwrap();
            let (mut first, mut second) = if client_first {
                (client, server)
            } else {
                (server, client)
            };
            let joined = tokio::spawn(join(ours.into_split(), theirs.into_split(), 16));
            first.write_all(&[1; 1000]).await.unwrap();
            first.shutdown().await.unwrap();
            let mut seen = Vec::new();
            second.read_to_end(&mut seen).await.unwrap();
            assert_eq!(seen, [1; 1000]);
            second.write_all(&[2; 1000]).await.unwrap();
            second.shutdown().await.unwrap();
            seen.clear();
            first.read_to_end(&mut seen).await.unwrap();
            assert_eq!(seen, [2; 1000]);
            joined.await.unwrap();
        }
    }
}
