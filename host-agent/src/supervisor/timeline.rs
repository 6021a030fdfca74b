//! The way of the events from the instances to the one who owns them: bounded,
//! and never waited for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::event::{EventKind, TimelineEvent};

/// Events that may wait for the owner. What guests cause is limited where it
/// arises, so only an owner that does not read for minutes loses any.
const BACKLOG: usize = 4096;

/// Where events are told. Cloning gives another end of the same timeline.
#[derive(Debug, Clone)]
pub struct Timeline {
    sender: mpsc::Sender<TimelineEvent>,
    accepted: Instant,
    lost: Arc<AtomicU64>,
}

/// Where events are read.
#[derive(Debug)]
pub struct Events {
    receiver: mpsc::Receiver<TimelineEvent>,
    accepted: Instant,
    lost: Arc<AtomicU64>,
}

/// A timeline that begins now.
pub fn timeline() -> (Timeline, Events) {
    bounded(BACKLOG)
}

fn bounded(backlog: usize) -> (Timeline, Events) {
    let (sender, receiver) = mpsc::channel(backlog);
    let accepted = Instant::now();
    let lost = Arc::<AtomicU64>::default();
    let timeline = Timeline {
        sender,
        accepted,
        lost: Arc::clone(&lost),
    };
    let events = Events {
        receiver,
        accepted,
        lost,
    };
    (timeline, events)
}

impl Timeline {
    /// Tells of a change of `instance`, or of the whole deployment. An event
    /// for which there is no room is counted.
    pub fn tell(&self, instance: Option<&str>, kind: EventKind) {
        let event = TimelineEvent {
            at: self.accepted.elapsed(),
            instance: instance.map(str::to_owned),
            kind,
        };
        // Nobody listens only when the command is ending.
        if let Err(mpsc::error::TrySendError::Full(_)) = self.sender.try_send(event) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Events {
    /// The next event; `None` when nobody is left who could tell one.
    /// Cancelling loses nothing.
    pub async fn next(&mut self) -> Option<TimelineEvent> {
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            return Some(TimelineEvent {
                at: self.accepted.elapsed(),
                instance: None,
                kind: EventKind::Warning {
                    text: format!("{lost} events were lost: too many at once"),
                },
            });
        }
        self.receiver.recv().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn an_owner_that_does_not_read_holds_up_nobody_and_hears_what_it_missed() {
        let (timeline, mut events) = bounded(2);
        for _ in 0..5 {
            timeline.tell(Some("A_IN_0"), EventKind::Stopping);
        }
        let first = events.next().await.unwrap();
        assert!(matches!(&first.kind,
            EventKind::Warning { text } if text.starts_with("3 events were lost")));
        for _ in 0..2 {
            assert_eq!(events.next().await.unwrap().kind, EventKind::Stopping);
        }
        drop(timeline);
        assert_eq!(events.next().await, None);
    }
}
