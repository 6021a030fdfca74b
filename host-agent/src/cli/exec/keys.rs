//! What a user sends to a program: signals, and standard input within `EXEC_WINDOW`.

use std::io::{self, Read as _};

use tokio::signal::unix::{Signal, SignalKind};
use tokio::sync::mpsc;
use vmbus::message::{EXEC_PIECE, EXEC_WINDOW, ExecInput};

use super::super::error::CliError;
use super::super::interrupt::{Hangup, take};

/// Pieces of standard input to read ahead.
const AHEAD: usize = 4;

/// Standard input.
#[derive(Debug)]
pub struct Keys {
    pieces: mpsc::Receiver<ExecInput>,
    /// Bytes sent and not consumed.
    underway: usize,
}

impl Keys {
    /// Reads standard input in a thread, since a file cannot be polled.
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

    /// The next piece, once it fits into the window. Cancelling loses nothing.
    pub async fn next(&mut self) -> ExecInput {
        if self.underway + EXEC_PIECE > EXEC_WINDOW {
            // The caller calls again after `consumed`.
            return std::future::pending().await;
        }
        let piece = self.pieces.recv().await.unwrap_or(ExecInput::StdinEnd {});
        if let ExecInput::Stdin { bytes } = &piece {
            self.underway += bytes.len();
        }
        piece
    }

    /// The program consumed this many bytes.
    pub fn consumed(&mut self, bytes: usize) {
        self.underway = self.underway.saturating_sub(bytes);
    }
}

/// The signals that go to the program, and SIGWINCH.
#[derive(Debug)]
pub struct Signals {
    interrupt: Signal,
    quit: Signal,
    terminate: Signal,
    hangup: Hangup,
    window: Signal,
}

impl Signals {
    /// Handles these signals from now on.
    pub fn listen() -> Result<Self, CliError> {
        Ok(Self {
            interrupt: take(SignalKind::interrupt())?,
            quit: take(SignalKind::quit())?,
            terminate: take(SignalKind::terminate())?,
            hangup: Hangup::listen()?,
            window: take(SignalKind::window_change())?,
        })
    }

    /// The number of the next one. Cancelling loses nothing.
    pub async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.interrupt.recv() => libc::SIGINT,
            _ = self.quit.recv() => libc::SIGQUIT,
            _ = self.terminate.recv() => libc::SIGTERM,
            () = self.hangup.next() => libc::SIGHUP,
            _ = self.window.recv() => libc::SIGWINCH,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn input_stays_within_the_window() {
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
