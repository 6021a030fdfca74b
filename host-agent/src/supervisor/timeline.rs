//! The event bus of a host: every instance writes to it, any number of readers
//! subscribe. Bounded; a writer never waits.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::broadcast;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::time::Instant;

use super::event::{EventKind, TimelineEvent};

/// Events that are kept for a slow reader. Events that guests cause are limited, so only a
/// reader that pauses for minutes loses any.
const BACKLOG: usize = 4096;

/// The writing end of the bus. A clone writes to the same bus.
#[derive(Debug, Clone)]
pub struct Timeline {
    sender: broadcast::Sender<Reported>,
    started: Instant,
    /// The service of the events, where the writer knows it.
    service: Option<Arc<str>>,
    /// The deployment of the events; `None` for those of the whole host.
    deployment: Option<Arc<str>>,
}

/// An event as it was reported.
#[derive(Debug, Clone)]
pub struct Reported {
    /// Wall-clock time.
    pub time: SystemTime,
    /// The service, where the writer knows it.
    pub service: Option<Arc<str>>,
    /// The event.
    pub event: TimelineEvent,
}

/// This many events were overwritten before the subscriber took them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lost(pub u64);

/// A subscription.
#[derive(Debug)]
pub struct Events {
    receiver: broadcast::Receiver<Reported>,
    started: Instant,
}

impl Timeline {
    /// Creates a bus. The times of its events count from now.
    pub fn start() -> Self {
        Self::bounded(BACKLOG)
    }

    pub(crate) fn bounded(backlog: usize) -> Self {
        Self {
            sender: broadcast::channel(backlog).0,
            started: Instant::now(),
            service: None,
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

    /// The same bus, for events of service `name`.
    pub fn of_service(&self, name: &str) -> Self {
        Self {
            service: Some(name.into()),
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
        let reported = Reported {
            time: SystemTime::now(),
            service: self.service.clone(),
            event,
        };
        // An error means that there are no subscribers.
        let _ = self.sender.send(reported);
    }
}

impl Events {
    /// The next event; `None` when no writer is left. Cancel safe.
    pub async fn next(&mut self) -> Option<TimelineEvent> {
        Some(match self.reported().await? {
            Ok(reported) => reported.event,
            Err(Lost(count)) => TimelineEvent {
                at: self.started.elapsed(),
                deployment: None,
                instance: None,
                kind: EventKind::Warning {
                    text: format!("{count} events were lost: too many at once"),
                },
            },
        })
    }

    /// As [`Events::next`], with what belongs to the event.
    pub async fn reported(&mut self) -> Option<Result<Reported, Lost>> {
        match self.receiver.recv().await {
            Ok(reported) => Some(Ok(reported)),
            Err(RecvError::Lagged(count)) => Some(Err(Lost(count))),
            Err(RecvError::Closed) => None,
        }
    }

    /// As [`Events::reported`], if there is an event already.
    pub fn try_reported(&mut self) -> Option<Result<Reported, Lost>> {
        match self.receiver.try_recv() {
            Ok(reported) => Some(Ok(reported)),
            Err(TryRecvError::Lagged(count)) => Some(Err(Lost(count))),
            Err(TryRecvError::Empty | TryRecvError::Closed) => None,
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
