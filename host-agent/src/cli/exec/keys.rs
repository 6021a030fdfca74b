//! What a user sends to a program: standard input, no more than it takes, and
//! signals.

use std::io::{self, Read as _};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use vmbus::message::{EXEC_PIECE, EXEC_WINDOW, ExecInput};

use super::super::error::{CliError, Code};

/// Pieces of standard input that were read ahead.
const AHEAD: usize = 4;

/// Standard input.
#[derive(Debug)]
pub struct Keys {
    pieces: mpsc::Receiver<ExecInput>,
    /// Bytes sent that the program has not taken.
    underway: usize,
}

impl Keys {
    /// Reads standard input in a thread: it cannot be polled when it is a file.
    pub fn read() -> Self {
        let (sender, pieces) = mpsc::channel(AHEAD);
        std::thread::spawn(move || {
            let mut piece = vec![0; EXEC_PIECE];
            loop {
                let read = io::stdin().lock().read(&mut piece);
                let input = match read {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Ok(0) | Err(_) => ExecInput::StdinEnd {},
                    Ok(count) => ExecInput::Stdin {
                        bytes: piece[..count].to_vec(),
                    },
                };
                let last = input == ExecInput::StdinEnd {};
                if sender.blocking_send(input).is_err() || last {
                    return;
                }
            }
        });
        Self {
            pieces,
            underway: 0,
        }
    }

    /// The next piece, when the program has room for it. Cancelling loses
    /// nothing.
    pub async fn next(&mut self) -> ExecInput {
        if self.underway + EXEC_PIECE > EXEC_WINDOW {
            // Until `consumed` makes room, and this is called again.
            return std::future::pending().await;
        }
        let piece = self.pieces.recv().await.unwrap_or(ExecInput::StdinEnd {});
        if let ExecInput::Stdin { bytes } = &piece {
            self.underway += bytes.len();
        }
        piece
    }

    /// The program took this many bytes.
    pub fn consumed(&mut self, bytes: usize) {
        self.underway = self.underway.saturating_sub(bytes);
    }
}

/// The signals that are passed on, and those that tell of the terminal.
#[derive(Debug)]
pub struct Signals([(i32, Signal); 5]);

impl Signals {
    /// Takes the signals over from now on.
    pub fn listen() -> Result<Self, CliError> {
        let take = |kind: SignalKind| {
            signal(kind)
                .map(|signal| (kind.as_raw_value(), signal))
                .map_err(|error| CliError::chain(Code::Unclassified, &error))
        };
        Ok(Self([
            take(SignalKind::interrupt())?,
            take(SignalKind::quit())?,
            take(SignalKind::terminate())?,
            take(SignalKind::hangup())?,
            take(SignalKind::window_change())?,
        ]))
    }

    /// The number of the next one. Cancelling loses nothing.
    pub async fn next(&mut self) -> i32 {
        let [interrupt, quit, terminate, hangup, window] = &mut self.0;
        tokio::select! {
            _ = interrupt.1.recv() => interrupt.0,
            _ = quit.1.recv() => quit.0,
            _ = terminate.1.recv() => terminate.0,
            _ = hangup.1.recv() => hangup.0,
            _ = window.1.recv() => window.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn no_more_is_sent_than_the_program_takes() {
        let (sender, pieces) = mpsc::channel(64);
        for _ in 0..64 {
            let bytes = vec![0; EXEC_PIECE];
            sender.try_send(ExecInput::Stdin { bytes }).unwrap();
        }
        let mut keys = Keys {
            pieces,
            underway: 0,
        };
        let mut sent = 0;
        let mut take_all = async |keys: &mut Keys| {
            while let Ok(ExecInput::Stdin { bytes }) =
                tokio::time::timeout(std::time::Duration::ZERO, keys.next()).await
            {
                sent += bytes.len();
            }
            sent
        };
        assert_eq!(take_all(&mut keys).await, EXEC_WINDOW);
        keys.consumed(EXEC_PIECE - 1);
        assert_eq!(take_all(&mut keys).await, EXEC_WINDOW);
        keys.consumed(1);
        assert_eq!(take_all(&mut keys).await, EXEC_WINDOW + EXEC_PIECE);
    }
}
