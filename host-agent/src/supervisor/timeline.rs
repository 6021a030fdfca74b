//! The event bus of a host: every instance writes to it, any number of readers
//! subscribe. Bounded; a writer never waits.

use std::sync::Arc;

use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Instant;

use super::event::{EventKind, TimelineEvent};

/// Events that are kept for a slow reader. Events that guests cause are limited, so only a
/// reader that pauses for minutes loses any.
const BACKLOG: usize = 4096;

/// The writing end of the bus. A clone writes to the same bus.
#[derive(Debug, Clone)]
pub struct Timeline {
    sender: broadcast::Sender<TimelineEvent>,
    started: Instant,
    /// The deployment of the events; `None` for those of the whole host.
    deployment: Option<Arc<str>>,
}

/// A subscription.
#[derive(Debug)]
pub struct Events {
    receiver: broadcast::Receiver<TimelineEvent>,
    started: Instant,
}

impl Timeline {
    /// Creates a bus. The times of its events count from now.
    pub fn start() -> Self {
        Self::bounded(BACKLOG)
    }

    fn bounded(backlog: usize) -> Self {
        Self {
            sender: broadcast::channel(backlog).0,
            started: Instant::now(),
            deployment: None,
        }
    }

    /// The same bus, for events of `deployment`.
    pub fn of(&self, deployment: &str) -> Self {
        Self {
            deployment: Some(deployment.into()),
            ..self.clone()
        }
    }

    /// Every event from now on.
    pub fn subscribe(&self) -> Events {
        Events {
            receiver: self.sender.subscribe(),
            started: self.started,
        }
    }

    /// Writes an event of `instance`, or of the whole deployment.
    pub fn report(&self, instance: Option<&str>, kind: EventKind) {
        let event = TimelineEvent {
            at: self.started.elapsed(),
            deployment: self.deployment.as_deref().map(str::to_owned),
            instance: instance.map(str::to_owned),
            kind,
        };
        // An error means that there are no subscribers.
        let _ = self.sender.send(event);
    }
}

impl Events {
    /// The next event; `None` when no writer is left. Cancel safe.
    pub async fn next(&mut self) -> Option<TimelineEvent> {
        match self.receiver.recv().await {
            Ok(event) => Some(event),
            Err(RecvError::Lagged(lost)) => Some(TimelineEvent {
                at: self.started.elapsed(),
                deployment: None,
                instance: None,
                kind: EventKind::Warning {
                    text: format!("{lost} events were lost: too many at once"),
                },
            }),
            Err(RecvError::Closed) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_slow_reader_learns_how_many_events_it_missed() {
        let timeline = Timeline::bounded(2);
        let mut slow = timeline.subscribe();
        let mut quick = timeline.subscribe();
        let of_deployment = timeline.of("d");
        for _ in 0..5 {
            of_deployment.report(Some("A_IN_0"), EventKind::Stopping);
            assert_eq!(quick.next().await.unwrap().deployment.as_deref(), Some("d"));
        }
        let first = slow.next().await.unwrap();
        assert!(matches!(&first.kind,
            EventKind::Warning { text } if text.starts_with("3 events were lost")));
        for _ in 0..2 {
            assert_eq!(slow.next().await.unwrap().kind, EventKind::Stopping);
        }
        drop((timeline, of_deployment));
        assert_eq!(slow.next().await, None);
    }
}
