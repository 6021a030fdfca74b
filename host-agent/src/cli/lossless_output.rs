//! Bytes to standard output or error, none dropped, written by a thread: a reader
//! that pauses blocks neither the event loop nor signals.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};

use tokio::io::Interest;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};

use super::error::CliError;
use super::output::cannot_write;

/// Chunks that may wait for the reader.
const BACKLOG: usize = 4;

/// A stream and the thread that writes to it.
#[derive(Debug)]
pub struct LosslessOutput {
    chunks: mpsc::Sender<Vec<u8>>,
    /// The stream, to notice that its reader is gone.
    watched: OwnedFd,
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
        let watched = file.as_fd().try_clone_to_owned()?;
        let mut file = File::from(watched.try_clone()?);
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
        Ok(Self {
            chunks,
            watched,
            result,
        })
    }

    /// Waits for a slot; `None` after a write failed. Cancel safe.
    pub async fn reserve(&self) -> Option<Slot<'_>> {
        self.chunks.reserve().await.ok()
    }

    /// Waits until a write fails.
    pub async fn broken(&self) {
        self.chunks.closed().await;
    }

    /// Waits until a write fails, or the reader of a pipe or socket closes it.
    pub async fn reader_gone(&self) {
        let closed = async {
            // A file cannot be watched, and has no reader. The stream stays blocking.
            let watched = self.watched.try_clone();
            let Ok(watched) = watched.and_then(pipe::Sender::from_owned_fd_unchecked) else {
                return std::future::pending().await;
            };
            // `EPOLLERR` is reported always (epoll_ctl(2)).
            while let Ok(ready) = watched.ready(Interest::ERROR).await {
                if ready.is_error() {
                    return;
                }
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = self.broken() => {}
            () = closed => {}
        }
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
    async fn a_closed_pipe_is_noticed_without_a_write() {
        let (reader, writer) = io::pipe().unwrap();
        let output = LosslessOutput::to(writer).unwrap();
        output.reserve().await.unwrap().send(b"first".to_vec());
        let mut gone = std::pin::pin!(output.reader_gone());
        tokio::select! {
            biased;
            () = &mut gone => panic!("the reader is there"),
            () = tokio::task::yield_now() => {}
        }
        drop(reader);
        gone.await;
        // A file has no reader that could go.
        let file = LosslessOutput::to(tempfile::tempfile().unwrap()).unwrap();
        let limit = std::time::Duration::from_millis(1);
        tokio::time::timeout(limit, file.reader_gone())
            .await
            .unwrap_err();
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
