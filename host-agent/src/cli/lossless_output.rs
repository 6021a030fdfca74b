//! Bytes to standard output or error, none dropped, written by a thread: a reader
//! that pauses blocks neither the event loop nor signals.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsFd;

use tokio::sync::{mpsc, oneshot};

use super::error::CliError;
use super::output::cannot_write;

/// Chunks that may wait for the reader.
const BACKLOG: usize = 4;

/// A stream and the thread that writes to it.
#[derive(Debug)]
pub struct LosslessOutput {
    chunks: mpsc::Sender<Vec<u8>>,
    result: oneshot::Receiver<io::Result<()>>,
}

/// A reserved place in the queue for one chunk.
pub type Slot<'a> = mpsc::Permit<'a, Vec<u8>>;

impl LosslessOutput {
    /// Starts a thread that writes to a duplicate of `file`.
    ///
    /// # Errors
    /// `dup` or the start of the thread failed.
    pub fn to(file: impl AsFd) -> io::Result<Self> {
        let mut file = File::from(file.as_fd().try_clone_to_owned()?);
        let (chunks, mut queue) = mpsc::channel::<Vec<u8>>(BACKLOG);
        let (sender, result) = oneshot::channel();
        // Not joined: a write to a full pipe cannot be cancelled.
        std::thread::Builder::new()
            .name("output".into())
            .spawn(move || {
                let mut result = Ok(());
                while result.is_ok()
                    && let Some(chunk) = queue.blocking_recv()
                {
                    result = file.write_all(&chunk);
                }
                // Fails if the receiver is gone: then nobody needs the result.
                let _ = sender.send(result);
            })?;
        Ok(Self { chunks, result })
    }

    /// Waits for a slot; `None` after a write failed. Cancel safe.
    pub async fn reserve(&self) -> Option<Slot<'_>> {
        self.chunks.reserve().await.ok()
    }

    /// Waits until a write fails.
    pub async fn broken(&self) {
        self.chunks.closed().await;
    }

    /// Waits until everything is written. Cancelling gives up what is not.
    ///
    /// # Errors
    /// A write failed.
    pub async fn finish(self) -> Result<(), CliError> {
        drop(self.chunks);
        // No result means that the thread panicked, which printed a message.
        let written = self.result.await.unwrap_or(Ok(()));
        written.map_err(|error| cannot_write(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::exit::Exit;
    use std::io::Read as _;

    #[tokio::test(flavor = "current_thread")]
    async fn a_reader_that_pauses_loses_nothing() {
        let (mut reader, writer) = io::pipe().unwrap();
        let output = LosslessOutput::to(writer).unwrap();
        let mut sent = 0;
        let mut put = |slot: Option<Slot<'_>>| {
            slot.unwrap().send(vec![b'x'; 64 * 1024]);
            sent += 64 * 1024;
        };
        // Nothing reads: at some point the pipe and the queue are full.
        loop {
            tokio::select! {
                biased;
                slot = output.reserve() => put(slot),
                () = std::future::ready(()) => break,
            }
        }
        let reading = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all.len()
        });
        put(output.reserve().await);
        output.finish().await.unwrap();
        assert_eq!(reading.await.unwrap(), sent);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_closed_reader_is_noticed_and_reported_as_sigpipe() {
        let (reader, writer) = io::pipe().unwrap();
        let output = LosslessOutput::to(writer).unwrap();
        drop(reader);
        output.reserve().await.unwrap().send(b"lost".to_vec());
        output.broken().await;
        assert!(output.reserve().await.is_none());
        assert_eq!(output.finish().await.unwrap_err().exit(), Exit::Signal(13));
    }
}
