//! The signals that end a command.

use std::time::Duration;

use nix::sys::signal::Signal as Number;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::error::{CliError, Code};
use crate::dispositions::is_ignored;

/// `SIGINT` and `SIGTERM` within this time of the one before are the same request: GNU
/// `timeout` sends its signal to the command and to the process group, a CI runner to
/// every process of a job, and a terminal beside the program that forwards it.
const SAME_REQUEST: Duration = Duration::from_secs(1);
/// Signals that may wait until the command takes them.
const BACKLOG: usize = 8;

/// Waits for `SIGINT`, `SIGTERM` and `SIGHUP`.
#[derive(Debug)]
pub struct Interrupts(mpsc::Receiver<u8>);

impl Interrupts {
    /// Replaces the default actions of the signals. `SIGINT` is handled even if it was
    /// ignored: a shell without job control ignores it for each background job, and a
    /// script that is stopped by Ctrl-C, or sends `kill -INT`, expects the job to stop.
    pub fn listen() -> Result<Self, CliError> {
        let mut interrupt = take(SignalKind::interrupt())?;
        let mut terminate = take(SignalKind::terminate())?;
        let mut hangup = Hangup::listen()?;
        let (sender, requests) = mpsc::channel(BACKLOG);
        // A task, which notices each signal when it arrives, also while the command waits
        // for something else.
        tokio::spawn(async move {
            let mut repeats = Repeats::default();
            loop {
                let number = tokio::select! {
                    _ = interrupt.recv() => libc::SIGINT,
                    _ = terminate.recv() => libc::SIGTERM,
                    () = hangup.next() => libc::SIGHUP,
                    () = sender.closed() => return,
                };
                if repeats.is_request(number, Instant::now()) {
                    let number = u8::try_from(number).expect("Linux has 64 signals");
                    // A full queue has all the requests that a command distinguishes.
                    let _ = sender.try_send(number);
                }
            }
        });
        Ok(Self(requests))
    }

    /// The number of the next signal. Cancel safe.
    pub async fn next(&mut self) -> u8 {
        match self.0.recv().await {
            Some(number) => number,
            // The task ends with the runtime only.
            None => std::future::pending().await,
        }
    }
}

/// `SIGHUP`, if this process does not ignore it.
#[derive(Debug)]
pub struct Hangup(Option<Signal>);

impl Hangup {
    /// Replaces the default action. A signal that is ignored stays so: `nohup` and
    /// `trap '' HUP` start commands that continue after their terminal has closed.
    pub fn listen() -> Result<Self, CliError> {
        if is_ignored(Number::SIGHUP) {
            return Ok(Self(None));
        }
        take(SignalKind::hangup()).map(|signal| Self(Some(signal)))
    }

    /// Waits for the signal; does not return if it is ignored. Cancel safe.
    pub async fn next(&mut self) {
        match &mut self.0 {
            Some(signal) => {
                signal.recv().await;
            }
            None => std::future::pending().await,
        }
    }
}

/// Replaces the action of a signal.
pub fn take(kind: SignalKind) -> Result<Signal, CliError> {
    signal(kind).map_err(|error| CliError::chain(Code::Unclassified, &error))
}

/// Tells requests from repetitions.
#[derive(Debug, Default)]
struct Repeats {
    last: Option<Instant>,
}

impl Repeats {
    /// Whether the signal, which arrived at `now`, is a request of its own. `SIGHUP`
    /// always is: no command counts it.
    fn is_request(&mut self, number: i32, now: Instant) -> bool {
        if number == libc::SIGHUP {
            return true;
        }
        if self.last.is_some_and(|last| now < last + SAME_REQUEST) {
            return false;
        }
        self.last = Some(now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_within_a_second_are_one_request() {
        let start = Instant::now();
        let mut repeats = Repeats::default();
        let (int, term, hup) = (libc::SIGINT, libc::SIGTERM, libc::SIGHUP);
        for (ms, number, request) in [
            (0, term, true),
            (0, term, false),
            (1, hup, true),
            (600, int, false),
            // Measured from the request, so that a key held down gets through.
            (1000, int, true),
            (1999, term, false),
            (2000, int, true),
        ] {
            let at = start + Duration::from_millis(ms);
            assert_eq!(repeats.is_request(number, at), request, "{ms} {number}");
        }
    }
}
