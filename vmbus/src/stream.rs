//! Frames over an asynchronous byte stream.

use std::io;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::frame::{self, Decoder, FrameError};

/// Bytes asked of the stream at once. The buffer is part of every future that
/// reads frames, and most frames are far smaller.
const READ_SIZE: usize = 8 * 1024;

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The stream failed.
    #[error("stream")]
    Io(#[from] io::Error),
    /// The peer broke the framing.
    #[error("frame")]
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
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, StreamError> {
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
pub async fn send<W: AsyncWrite + Unpin, T: Serialize>(
    stream: &mut W,
    message: &T,
) -> Result<(), StreamError> {
    let bytes = frame::encode(message)?;
    stream.write_all(&bytes).await?;
    stream.flush().await?;
    Ok(())
}
