//! Signals that end a command: the first asks, the second insists, unless it
//! is a hang-up.

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::error::{CliError, Code};

/// Waits for `SIGINT`, `SIGTERM` and `SIGHUP`.
#[derive(Debug)]
pub struct Interrupts {
    signals: [(u8, Signal); 3],
}

impl Interrupts {
    /// Takes the signals over from now on.
    pub fn listen() -> Result<Self, CliError> {
        let take = |kind: SignalKind| {
            let number = u8::try_from(kind.as_raw_value()).expect("Linux has 64 signals");
            signal(kind)
                .map(|signal| (number, signal))
                .map_err(|error| CliError::chain(Code::Unclassified, &error))
        };
        Ok(Self {
            signals: [
                take(SignalKind::interrupt())?,
                take(SignalKind::terminate())?,
                take(SignalKind::hangup())?,
            ],
        })
    }

    /// The number of the next one. Cancelling loses nothing.
    pub async fn next(&mut self) -> u8 {
        let [(int, a), (term, b), (hup, c)] = &mut self.signals;
        tokio::select! {
            _ = a.recv() => *int,
            _ = b.recv() => *term,
            _ = c.recv() => *hup,
        }
    }
}
