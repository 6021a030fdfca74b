//! Records the events of the timeline in the store, and reads them from there.

use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use serde_json::json;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use vmbus::text::chain;

use super::{ControllerError, lock};
use crate::blocking::blocking;
use crate::store::events::{EventFilter, EventPage, EventRecord, StoredEvent};
use crate::store::services::ServiceStore;
use crate::supervisor::event::EventKind;
use crate::supervisor::timeline::{Events, Lost, Reported, Timeline};

/// Most events of one transaction.
const MAX_BATCH: usize = 256;
/// Delay after a write that failed, doubled each time.
const RETRY: Duration = Duration::from_secs(1);
/// Longest delay after a write that failed.
const RETRY_MOST: Duration = Duration::from_secs(30);
/// Most time at the end for what is not written yet.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// The events of a host in its store. A clone is another handle to the same.
#[derive(Debug, Clone)]
pub struct EventLog(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    // Locked on blocking threads only.
    store: Arc<Mutex<ServiceStore>>,
    /// Number of the newest event that this process has stored.
    newest: watch::Sender<u64>,
    /// Whether the recorder is to end, which has the receiver.
    stop: watch::Sender<bool>,
}

impl EventLog {
    /// Starts to record `events`, which are those of `timeline`.
    pub(crate) fn start(
        store: Arc<Mutex<ServiceStore>>,
        events: Events,
        timeline: Timeline,
    ) -> Self {
        Self::start_with(store, events, timeline, RETRY)
    }

    fn start_with(
        store: Arc<Mutex<ServiceStore>>,
        events: Events,
        timeline: Timeline,
        retry: Duration,
    ) -> Self {
        let (stop, stopped) = watch::channel(false);
        let this = Self(Arc::new(Shared {
            store,
            newest: watch::Sender::new(0),
            stop,
        }));
        let recorder = Recorder {
            log: this.clone(),
            events,
            timeline,
            stop: stopped,
            retry,
            outage: None,
        };
        tokio::spawn(recorder.run());
        this
    }

    /// Changes after events were stored. They are all read from the store, so that a reader
    /// sees each once, in order.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.newest.subscribe()
    }

    /// Reads some of the events after number `after`, or from the oldest.
    pub async fn read(
        &self,
        after: Option<u64>,
        filter: &EventFilter,
    ) -> Result<EventPage, ControllerError> {
        let (store, filter) = (Arc::clone(&self.0.store), filter.clone());
        Ok(blocking(move || lock(&store).events(after, &filter)).await??)
    }

    /// The newest events, at most `most`, in their order.
    pub async fn newest(
        &self,
        filter: &EventFilter,
        most: usize,
    ) -> Result<Vec<StoredEvent>, ControllerError> {
        let (store, filter) = (Arc::clone(&self.0.store), filter.clone());
        Ok(blocking(move || lock(&store).newest_events(&filter, most)).await??)
    }

    /// Stores what was reported until now, and ends the recorder. Gives up after a while.
    pub(super) async fn close(&self) {
        self.0.stop.send_replace(true);
        let _ = timeout(CLOSE_LIMIT, self.0.stop.closed()).await;
    }

    async fn append(&self, batch: &Arc<[EventRecord]>) -> Result<(), ControllerError> {
        let (store, batch) = (Arc::clone(&self.0.store), Arc::clone(batch));
        let newest = blocking(move || lock(&store).record(&batch)).await??;
        self.0.newest.send_replace(newest);
        Ok(())
    }
}

/// Writes batches. While the store cannot be written, events wait in the timeline, which
/// keeps the newest and counts the others.
struct Recorder {
    log: EventLog,
    events: Events,
    timeline: Timeline,
    stop: watch::Receiver<bool>,
    retry: Duration,
    /// Why the writes before the last one failed.
    outage: Option<String>,
}

impl Recorder {
    async fn run(mut self) {
        loop {
            // What was reported before the end is stored too.
            let first = tokio::select! {
                biased;
                reported = self.events.reported() => reported,
                _ = self.stop.wait_for(|stop| *stop) => None,
            };
            let Some(first) = first else { return };
            let mut batch = vec![self.record(first)];
            while batch.len() < MAX_BATCH
                && let Some(more) = self.events.try_reported()
            {
                batch.push(self.record(more));
            }
            self.write(batch.into()).await;
        }
    }

    async fn write(&mut self, batch: Arc<[EventRecord]>) {
        let (mut outage, mut delay) = (None, self.retry);
        while let Err(error) = self.log.append(&batch).await {
            let error = chain(&error);
            if outage.is_none() {
                let text = format!("events cannot be stored: {error}; the newest wait in memory");
                self.timeline.report(None, EventKind::Warning { text });
            }
            outage = Some(error);
            tokio::select! {
                () = sleep(delay) => delay = RETRY_MOST.min(2 * delay),
                _ = self.stop.wait_for(|stop| *stop) => return,
            }
        }
        self.outage = outage;
    }

    fn record(&self, reported: Result<Reported, Lost>) -> EventRecord {
        match reported {
            Ok(reported) => record(reported),
            Err(Lost(count)) => {
                let why = self.outage.as_deref().unwrap_or("too many at once");
                let event = json!({"event": "events-lost", "count": count, "because": why});
                EventRecord {
                    at_ms: millis(std::time::SystemTime::now()),
                    service: None,
                    deployment: None,
                    instance: None,
                    text: format!("{count} events were lost: {why}"),
                    event: event.to_string(),
                }
            }
        }
    }
}

fn record(reported: Reported) -> EventRecord {
    let Reported {
        time,
        service,
        event,
    } = reported;
    EventRecord {
        at_ms: millis(time),
        service: service.map(|name| name.as_ref().to_owned()),
        deployment: event.deployment,
        instance: event.instance,
        text: event.kind.to_string(),
        event: serde_json::to_string(&event.kind).expect("events are JSON"),
    }
}

fn millis(time: std::time::SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::events::StoredEvent;
    use crate::store::events::tests::set_full;

    struct Recorded {
        log: EventLog,
        store: Arc<Mutex<ServiceStore>>,
        timeline: Timeline,
        _dir: tempfile::TempDir,
    }

    fn recorded(backlog: usize) -> Recorded {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Mutex::new(ServiceStore::open(dir.path()).unwrap()));
        let timeline = Timeline::bounded(backlog);
        let log = EventLog::start_with(
            Arc::clone(&store),
            timeline.subscribe(),
            timeline.clone(),
            Duration::from_millis(1),
        );
        Recorded {
            log,
            store,
            timeline,
            _dir: dir,
        }
    }

    impl Recorded {
        fn report(&self, text: String) {
            let timeline = self.timeline.of("d");
            timeline.report(Some("A_IN_0"), EventKind::Warning { text });
        }

        /// Waits until an event satisfies `wanted`; every event.
        async fn until(&self, wanted: impl Fn(&StoredEvent) -> bool) -> Vec<StoredEvent> {
            let mut changes = self.log.changes();
            loop {
                changes.mark_unchanged();
                let page = self.log.read(None, &EventFilter::default()).await.unwrap();
                if page.events.iter().any(&wanted) {
                    return page.events;
                }
                let changed = timeout(Duration::from_secs(60), changes.changed());
                changed.await.expect("it is stored").unwrap();
            }
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn every_event_is_stored_with_its_time_and_its_json() {
        let recorded = recorded(64);
        let before = millis(std::time::SystemTime::now());
        let timeline = recorded.timeline.of_service("shop");
        timeline.report(None, EventKind::Resumed);
        recorded.report("a\nb".into());
        recorded.log.close().await;
        let page = recorded
            .log
            .read(Some(0), &EventFilter::default())
            .await
            .unwrap();
        let [first, second] = &page.events[..] else {
            panic!("{page:?}");
        };
        assert!(first.record.at_ms >= before && second.record.at_ms >= first.record.at_ms);
        assert_eq!(first.record.service.as_deref(), Some("shop"));
        assert_eq!(first.record.event, r#"{"event":"resumed"}"#);
        assert_eq!(second.record.deployment.as_deref(), Some("d"));
        assert_eq!(second.record.instance.as_deref(), Some("A_IN_0"));
        assert_eq!(second.record.text, "warning: a\nb");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_full_disk_loses_only_what_does_not_fit_into_memory() {
        let recorded = recorded(8);
        set_full(&lock(&recorded.store), true);
        // Larger than the free space of the pages that the file has.
        let text = |number: usize| format!("{number} {}", "x".repeat(5_000));
        recorded.report(text(0));
        let mut warnings = recorded.timeline.subscribe();
        let warning = timeout(Duration::from_secs(60), warnings.next());
        let warning = warning.await.expect("the operator is warned").unwrap();
        assert!(warning.kind.to_string().contains("is full"), "{warning:?}");
        for number in 1..=20 {
            recorded.report(text(number));
        }
        set_full(&lock(&recorded.store), false);
        let events = recorded
            .until(|it| it.record.text.starts_with("warning: 20 "))
            .await;
        let numbers: Vec<_> = events.iter().map(|event| event.number).collect();
        assert_eq!(numbers, (1..=10).collect::<Vec<_>>());
        assert!(events[0].record.text.starts_with("warning: 0 "));
        // The warning and twelve others.
        let lost = &events[1].record;
        assert!(lost.text.starts_with("13 events were lost: "), "{lost:?}");
        assert!(lost.text.contains("is full"), "{lost:?}");
        assert!(lost.event.contains(r#""count":13"#), "{lost:?}");
        for (event, number) in events[2..].iter().zip(13..) {
            let start = format!("warning: {number} ");
            assert!(event.record.text.starts_with(&start), "{event:?}");
        }
    }
}
