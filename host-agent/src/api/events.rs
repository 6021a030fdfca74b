//! `GET /v1/events`: the events of the host as server-sent events, from the store and from
//! nothing else.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::HeaderMap;
use axum::response::sse::{Event, KeepAlive};
use axum::response::{IntoResponse as _, Response, Sse};
use futures_util::Stream;
use futures_util::stream::try_unfold;
use serde_json::json;
use tokio::sync::watch;

use super::request::Failure;
use super::routes::Api;
use super::types::{EventInfo, EventQuery, Problem, RefusalKind};
use crate::controller::ControllerError;
use crate::controller::events::EventLog;
use crate::store::events::{EventFilter, EventPage, KEPT, StoredEvent};

/// Interval of comments in an answer without events.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Server-sent events, in the order of their numbers.
#[utoipa::path(
    get,
    path = "/v1/events",
    params(EventQuery, ("last-event-id" = Option<u64>, Header, description = "Replaces `after`")),
    responses(
        (
            status = 200,
            description = "Events with their numbers as ids, and JSON as data",
            body = String,
            content_type = "text/event-stream",
        ),
        (status = 400, description = "The request is invalid", body = Problem),
        (status = 404, description = "This host keeps no events", body = Problem),
        (status = 500, description = "An error of the host", body = Problem),
        (status = 503, description = "Too many clients", body = Problem),
    ),
)]
pub(super) async fn events(
    State(api): State<Api>,
    headers: HeaderMap,
    query: Result<Query<EventQuery>, QueryRejection>,
) -> Result<Response, Failure> {
    let log = api.controller()?.events().clone();
    let Query(mut query) = query?;
    if let Some(id) = headers.get("last-event-id") {
        let id = id.to_str().ok().and_then(|id| id.parse().ok());
        let wrong = || Failure::new(RefusalKind::Invalid, "Last-Event-ID is not a number");
        query.after = Some(id.ok_or_else(wrong)?);
    }
    let found = stored(log, query, api.ended()).await?;
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE);
    Ok(Sse::new(sent(found)).keep_alive(keep_alive).into_response())
}

/// Each event in the form in which it is sent. An error ends the answer without its end, so
/// that the client asks again.
fn sent(
    events: impl Stream<Item = Result<EventInfo, ControllerError>>,
) -> impl Stream<Item = Result<Event, ControllerError>> {
    use futures_util::TryStreamExt as _;
    events.map_ok(|info| {
        let id = Event::default().id(info.number.to_string());
        id.json_data(info).expect("events are JSON")
    })
}

/// An answer that is being sent.
struct Sending {
    log: EventLog,
    filter: EventFilter,
    /// Events that are read.
    read: VecDeque<EventInfo>,
    /// Number of the last event that was looked at.
    last: u64,
    /// The answer ends after this number; without it, it goes on until `ended`.
    until: Option<u64>,
    changes: watch::Receiver<u64>,
    ended: watch::Receiver<bool>,
}

impl Sending {
    /// Takes the page that was read after number `after`.
    fn take(&mut self, after: u64, page: EventPage) {
        if page.gone > 0 {
            self.read.push_back(gone(page.gone, after + page.gone));
        }
        self.read.extend(page.events.into_iter().map(info));
        self.last = page.last;
    }
}

/// The events that `query` names. With `follow` the stream goes on until `ended` is true.
async fn stored(
    log: EventLog,
    query: EventQuery,
    ended: watch::Receiver<bool>,
) -> Result<impl Stream<Item = Result<EventInfo, ControllerError>> + Send, Failure> {
    let filter = EventFilter {
        service: query.service,
        deployment: query.deployment,
        instance: query.instance,
    };
    let changes = log.changes();
    let page = log.read(query.after, &filter).await?;
    if let Some(after) = query.after.filter(|after| *after > page.newest) {
        let text = format!(
            "there is no event {after} in this store, whose newest event has number {}",
            page.newest
        );
        return Err(Failure::new(RefusalKind::Invalid, text));
    }
    let mut sending = Sending {
        log,
        filter,
        read: VecDeque::new(),
        last: 0,
        until: (!query.follow).then_some(page.newest),
        changes,
        ended,
    };
    sending.take(query.after.unwrap_or(0), page);
    Ok(try_unfold(sending, next))
}

async fn next(mut this: Sending) -> Result<Option<(EventInfo, Sending)>, ControllerError> {
    loop {
        if let Some(info) = this.read.pop_front() {
            return Ok(Some((info, this)));
        }
        if this.until.is_some_and(|until| this.last >= until) {
            return Ok(None);
        }
        // Both are looked at before the store, so that the events of a change, and the last
        // ones, are read.
        let ending = *this.ended.borrow() || this.ended.has_changed().is_err();
        this.changes.mark_unchanged();
        let page = this.log.read(Some(this.last), &this.filter).await?;
        let more = page.last < page.newest;
        this.take(this.last, page);
        if more || !this.read.is_empty() {
            continue;
        }
        if ending {
            return Ok(None);
        }
        tokio::select! {
            // The sender is in `log`.
            _ = this.changes.changed() => {}
            _ = this.ended.wait_for(|ended| *ended) => {}
        }
    }
}

fn info(event: StoredEvent) -> EventInfo {
    let StoredEvent { number, record } = event;
    EventInfo {
        number,
        at_ms: record.at_ms,
        at: rfc3339(record.at_ms),
        service: record.service,
        deployment: record.deployment,
        instance: record.instance,
        text: record.text,
        event: serde_json::from_str(&record.event).unwrap_or_default(),
    }
}

/// Stands for `count` events that are removed, the last of which is number `number`.
fn gone(count: u64, number: u64) -> EventInfo {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = u64::try_from(now.unwrap_or_default().as_millis()).unwrap_or(u64::MAX);
    EventInfo {
        number,
        at_ms: now,
        at: rfc3339(now),
        service: None,
        deployment: None,
        instance: None,
        text: format!("{count} events are gone: the newest {KEPT} are kept"),
        event: json!({"event": "events-gone", "count": count}),
    }
}

fn rfc3339(ms: u64) -> String {
    let ms = i64::try_from(ms).unwrap_or(i64::MAX);
    jiff::Timestamp::from_millisecond(ms).map_or_else(|_| ms.to_string(), |it| format!("{it:.3}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::property::{Random, cases};
    use crate::store::services::ServiceStore;
    use crate::supervisor::event::EventKind;
    use crate::supervisor::timeline::Timeline;
    use futures_util::StreamExt as _;
    use proptest::prelude::*;
    use std::sync::{Arc, Mutex};

    const EVERYTHING: EventQuery = EventQuery {
        after: None,
        follow: true,
        service: None,
        deployment: None,
        instance: None,
    };

    fn recorded(dir: &std::path::Path) -> (EventLog, Timeline) {
        let store = Arc::new(Mutex::new(ServiceStore::open(dir).unwrap()));
        let timeline = Timeline::start();
        let log = EventLog::start(store, timeline.subscribe(), timeline.clone());
        (log, timeline)
    }

    /// Reads events until `last`, and begins again after each number of events in `cuts`.
    async fn read_in_parts(log: EventLog, last: u64, cuts: Vec<usize>) -> Vec<u64> {
        let ended = watch::Sender::new(false);
        let (mut found, mut cuts) = (Vec::new(), cuts.into_iter().cycle());
        while found.last() != Some(&last) {
            let query = EventQuery {
                after: Some(found.last().copied().unwrap_or(0)),
                ..EVERYTHING
            };
            let stream = stored(log.clone(), query, ended.subscribe()).await.unwrap();
            let left = usize::try_from(last).unwrap() - found.len();
            let part = stream.take(cuts.next().unwrap().min(left));
            let part: Vec<_> = part.map(|event| event.unwrap().number).collect().await;
            found.extend(part);
        }
        found
    }

    proptest! {
        #![proptest_config(cases(12))]
        #[test]
        fn readers_that_resume_see_every_event_once_in_order(
            seed in 1u64..u64::MAX,
            cuts in proptest::collection::vec(1usize..40, 1..8),
        ) {
            const COUNT: u64 = 300;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let dir = tempfile::tempdir().unwrap();
                let (log, timeline) = recorded(dir.path());
                let reads = [cuts.clone(), vec![1], vec![COUNT as usize]];
                let reads = reads.map(|cuts| {
                    tokio::spawn(read_in_parts(log.clone(), COUNT, cuts))
                });
                let mut random = Random(seed);
                for number in 1..=COUNT {
                    let text = number.to_string();
                    timeline.report(None, EventKind::Warning { text });
                    if random.below(4) == 0 {
                        tokio::task::yield_now().await;
                    }
                    if random.below(40) == 0 {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
                for read in reads {
                    assert_eq!(read.await.unwrap(), (1..=COUNT).collect::<Vec<_>>());
                }
            });
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_filter_passes_only_its_events() {
        let dir = tempfile::tempdir().unwrap();
        let (log, timeline) = recorded(dir.path());
        let ended = watch::Sender::new(false);
        let query = EventQuery {
            deployment: Some("01".into()),
            instance: Some("A_IN_0".into()),
            ..EVERYTHING
        };
        let stream = stored(log, query, ended.subscribe()).await.unwrap();
        let mut stream = std::pin::pin!(stream);
        for (deployment, instance) in [("23", "A_IN_0"), ("01", "A_IN_1"), ("01", "A_IN_0")] {
            timeline
                .of(deployment)
                .report(Some(instance), EventKind::Stopping);
        }
        let found = stream.next().await.unwrap().unwrap();
        assert_eq!((found.number, found.text.as_str()), (3, "stopping"));
        assert_eq!(found.event, json!({"event": "stopping"}));
        // The end of the host agent ends the answer.
        ended.send_replace(true);
        assert!(stream.next().await.is_none());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn removed_events_are_the_first_that_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let (log, _timeline) = recorded(dir.path());
        let ended = watch::Sender::new(false);
        let mut sending = Sending {
            log,
            filter: EventFilter::default(),
            read: VecDeque::new(),
            last: 0,
            until: Some(9),
            changes: watch::Sender::new(0).subscribe(),
            ended: ended.subscribe(),
        };
        sending.take(
            3,
            EventPage {
                gone: 6,
                events: Vec::new(),
                last: 9,
                newest: 9,
            },
        );
        let (first, sending) = next(sending).await.unwrap().unwrap();
        assert_eq!(first.number, 9);
        assert!(first.text.starts_with("6 events are gone"), "{first:?}");
        assert!(next(sending).await.unwrap().is_none());
    }
}
