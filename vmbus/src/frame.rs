//! Frames: a little-endian `u32` length, then a body of that many bytes.
//!
//! A body is JSON, or for the streams of `exec` and logs a [`crate::piece`] of raw bytes:
//! [`Message`] says which for each type. The peer is hostile: a length over the cap is
//! refused before a byte of the body is buffered, so a decoder never holds more than one
//! frame and the bytes it was last given.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The longest body of a frame, in bytes. The guest agent's program and the bytes of
/// endpoints, which may be more, travel outside of frames.
pub const MAX_BODY: usize = 1 << 20;

/// Bytes of the length that precedes a body.
pub const HEADER: usize = 4;

/// Capacity that a decoder keeps between frames, in bytes.
const KEPT: usize = 64 * 1024;

/// Why bytes are not a frame, or a frame is not the message expected.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The peer announced, or the caller built, a body over the limit.
    #[error("frame of {length} bytes is over the limit of {limit}")]
    TooLong {
        /// The announced length.
        length: usize,
        /// [`MAX_BODY`], or less for a part of a body.
        limit: usize,
    },
    /// The body is not JSON of the expected shape.
    #[error("frame is not a valid message")]
    Malformed(#[from] serde_json::Error),
    /// A piece of a stream is empty or too long.
    #[error("piece of {length} bytes is not within 1 to {limit}")]
    Piece {
        /// Length of the piece.
        length: usize,
        /// The longest of its kind.
        limit: usize,
    },
}

/// What a frame holds. The body is JSON unless the type overrides both methods.
pub trait Message: Serialize + DeserializeOwned {
    /// Appends the body to `body`.
    fn write(&self, body: &mut Vec<u8>) -> Result<(), FrameError> {
        write_json(self, body)
    }

    /// The message in `body`, which is of one whole frame.
    fn read(body: &[u8]) -> Result<Self, FrameError> {
        parse(body)
    }
}

/// Encodes one message as a frame.
pub fn encode<T: Message>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut frame = vec![0; HEADER];
    message.write(&mut frame)?;
    let length = frame.len() - HEADER;
    if length > MAX_BODY {
        return Err(too_long(length));
    }
    let header = u32::try_from(length).expect("MAX_BODY fits in 32 bits");
    frame[..HEADER].copy_from_slice(&header.to_le_bytes());
    Ok(frame)
}

/// Length of the JSON encoding of `message` in bytes.
pub fn encoded_length<T: Serialize>(message: &T) -> Result<usize, FrameError> {
    Ok(serde_json::to_vec(message)?.len())
}

const fn too_long(length: usize) -> FrameError {
    FrameError::TooLong {
        length,
        limit: MAX_BODY,
    }
}

/// The length of the body announced by `header`, if it is within the cap.
pub fn body_length(header: [u8; HEADER]) -> Result<usize, FrameError> {
    let length = u32::from_le_bytes(header) as usize;
    if length > MAX_BODY {
        return Err(too_long(length));
    }
    Ok(length)
}

/// Appends the JSON encoding of `message` to `body`.
pub fn write_json<T: Serialize>(message: &T, body: &mut Vec<u8>) -> Result<(), FrameError> {
    Ok(serde_json::to_writer(body, message)?)
}

/// Parses JSON. Unknown fields are ignored, so that later versions can add fields.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
    Ok(serde_json::from_slice(body)?)
}

/// Cuts a byte stream into frames.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    /// An empty decoder.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes as they arrive. Call [`Decoder::take_frame`] until it is `None`
    /// before pushing more, so that what is buffered stays bounded.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, parsed, or `None` when more bytes are needed.
    /// After an error the stream has no frame boundary left: close it.
    pub fn take_frame<T: Message>(&mut self) -> Result<Option<T>, FrameError> {
        let Some(header) = self.buffer.first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let end = HEADER + body_length(*header)?;
        if self.buffer.len() < end {
            return Ok(None);
        }
        let message = T::read(&self.buffer[HEADER..end]);
        self.buffer.drain(..end);
        // One large frame must not keep its memory for as long as the connection.
        self.buffer.shrink_to(KEPT);
        message.map(Some)
    }

    /// Whether every byte pushed was part of a frame that was taken.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Moves bytes that follow the last frame into `buffer`; returns how many.
    pub fn take(&mut self, buffer: &mut [u8]) -> usize {
        let count = buffer.len().min(self.buffer.len());
        buffer[..count].copy_from_slice(&self.buffer[..count]);
        self.buffer.drain(..count);
        count
    }

    /// Bytes that were pushed and are not part of a frame taken by [`Decoder::take_frame`]:
    /// the first raw bytes on a channel that changes from frames to bytes.
    pub fn into_rest(self) -> Vec<u8> {
        self.buffer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl Message for String {}

    #[test]
    fn a_length_over_the_cap_is_refused_before_the_body_arrives() {
        let mut decoder = Decoder::new();
        decoder.push(&u32::MAX.to_le_bytes());
        assert!(matches!(
            decoder.take_frame::<String>(),
            Err(FrameError::TooLong { .. })
        ));
        let exact = "x".repeat(MAX_BODY - 2);
        assert!(encode(&exact).is_ok());
        assert!(encode(&format!("{exact}y")).is_err());
    }

    #[test]
    fn deep_nesting_is_an_error_and_not_a_stack_overflow() {
        let body = "[".repeat(MAX_BODY);
        assert!(parse::<serde_json::Value>(body.as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn messages_survive_any_cut_of_the_stream(
            messages in proptest::collection::vec(".{0,40}", 0..8),
            cuts in proptest::collection::vec(1usize..9, 1..64),
        ) {
            let mut stream = Vec::new();
            for message in &messages {
                stream.extend(encode(message).unwrap());
            }
            let mut decoder = Decoder::new();
            let mut seen: Vec<String> = Vec::new();
            let mut rest = stream.as_slice();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                decoder.push(now);
                while let Some(message) = decoder.take_frame().unwrap() {
                    seen.push(message);
                }
                rest = later;
            }
            prop_assert_eq!(seen, messages);
        }

        /// As the stream reader calls the decoder, with arbitrary bytes.
        #[test]
        fn the_decoder_keeps_at_most_a_frame_of_any_bytes(
            parts in proptest::collection::vec((0..200_u32, any::<u8>(), 0..3_usize), 0..40),
        ) {
            let mut decoder = Decoder::new();
            for (length, byte, kind) in parts {
                let bytes = match kind {
                    0 => length.to_le_bytes().to_vec(),
                    1 => vec![byte; length as usize],
                    _ => encode(&crate::message::ToHost::ShutdownBegun {}).unwrap(),
                };
                decoder.push(&bytes);
                loop {
                    match decoder.take_frame::<crate::message::ToHost>() {
                        Ok(Some(_)) | Err(FrameError::Malformed(_) | FrameError::Piece { .. }) => {}
                        Ok(None) => break,
                        Err(FrameError::TooLong { length, .. }) => {
                            prop_assert!(length > MAX_BODY);
                            return Ok(());
                        }
                    }
                }
                prop_assert!(decoder.buffer.len() < HEADER + MAX_BODY);
                let left = decoder.buffer.first_chunk::<HEADER>();
                let whole = left.map(|header| HEADER + body_length(*header).unwrap());
                prop_assert!(whole.is_none_or(|whole| decoder.buffer.len() < whole));
            }
        }
    }
}
