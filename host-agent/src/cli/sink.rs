//! Bytes to a stream, none of them dropped, by a thread: a reader that pauses
//! holds up what it reads, and no signal.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsFd;

use tokio::sync::{mpsc, oneshot};

use super::error::CliError;
use super::output::cannot_write;

/// Pieces that may wait for the reader.
const AHEAD: usize = 4;

/// A stream in the hands of its thread.
#[derive(Debug)]
pub struct Sink {
    pieces: mpsc::Sender<Vec<u8>>,
    written: oneshot::Receiver<io::Result<()>>,
}

/// Room for one piece.
pub type Place<'a> = mpsc::Permit<'a, Vec<u8>>;

impl Sink {
    /// A sink to where `file` leads.
    ///
    /// # Errors
    /// No descriptor or no thread is to be had.
    pub fn to(file: impl AsFd) -> io::Result<Self> {
        let mut file = File::from(file.as_fd().try_clone_to_owned()?);
        let (pieces, mut waiting) = mpsc::channel::<Vec<u8>>(AHEAD);
        let (told, written) = oneshot::channel();
        // It ends with the process: a write to a full pipe cannot be called off.
        std::thread::Builder::new()
            .name("output".into())
            .spawn(move || {
                let mut result = Ok(());
                while result.is_ok()
                    && let Some(piece) = waiting.blocking_recv()
                {
                    result = file.write_all(&piece);
                }
                // Whoever waits no longer does not care.
                let _ = told.send(result);
            })?;
        Ok(Self { pieces, written })
    }

    /// Waits for room for a piece; `None` when the reader is gone. Cancelling
    /// loses nothing.
    pub async fn place(&self) -> Option<Place<'_>> {
        self.pieces.reserve().await.ok()
    }

    /// Waits until the reader is gone.
    pub async fn broken(&self) {
        self.pieces.closed().await;
    }

    /// Waits until everything is written. Cancelling gives up what is not.
    ///
    /// # Errors
    /// Something was not written.
    pub async fn finish(self) -> Result<(), CliError> {
        drop(self.pieces);
        // The thread always tells, unless it panicked, which has been printed.
        let written = self.written.await.unwrap_or(Ok(()));
        written.map_err(|error| cannot_write(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::exit::Exit;
    use std::io::Read as _;

    #[tokio::test(flavor = "current_thread")]
    async fn a_reader_that_pauses_is_waited_for_and_misses_nothing() {
        let (mut reader, writer) = io::pipe().unwrap();
        let sink = Sink::to(writer).unwrap();
        let mut sent = 0;
        let mut put = |place: Option<Place<'_>>| {
            place.unwrap().send(vec![b'x'; 64 * 1024]);
            sent += 64 * 1024;
        };
        // Nobody reads: at some point there is no room.
        loop {
            tokio::select! {
                biased;
                place = sink.place() => put(place),
                () = std::future::ready(()) => break,
            }
        }
        let reading = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all.len()
        });
        put(sink.place().await);
        sink.finish().await.unwrap();
        assert_eq!(reading.await.unwrap(), sent);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_reader_that_went_away_is_noticed_and_is_a_broken_pipe() {
        let (reader, writer) = io::pipe().unwrap();
        let sink = Sink::to(writer).unwrap();
        drop(reader);
        sink.place().await.unwrap().send(b"lost".to_vec());
        sink.broken().await;
        assert!(sink.place().await.is_none());
        assert_eq!(sink.finish().await.unwrap_err().exit(), Exit::Signal(13));
    }
}
