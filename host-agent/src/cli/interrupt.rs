//! The signals that end a command.

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::error::{CliError, Code};

/// Waits for `SIGINT`, `SIGTERM` and `SIGHUP`.
#[derive(Debug)]
pub struct Interrupts {
    signals: [(u8, Signal); 3],
}

impl Interrupts {
    /// Replaces the default actions of the signals.
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

    /// The number of the next signal. Cancel safe.
    pub async fn next(&mut self) -> u8 {
        let [(int, a), (term, b), (hup, c)] = &mut self.signals;
        tokio::select! {
            _ = a.recv() => *int,
            _ = b.recv() => *term,
            _ = c.recv() => *hup,
        }
    }
}
