//! Events that operators read later: numbered, in the database of the services. All calls
//! block.

use rusqlite::{Row, Transaction, params};

use super::database::StoreError;
use super::services::{ServiceStore, signed, unsigned};

/// Events that are kept; older ones are removed.
pub const KEPT: u64 = 100_000;

/// Most events that one read looks at, so that a filter that excludes most of them does not
/// keep the store from others for long.
const MAX_SCANNED: u64 = 4096;

/// Bytes of events with which a read ends.
const PAGE_BYTES: usize = 256 * 1024;

/// An event without its number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRecord {
    /// When it was reported, in milliseconds since 1970.
    pub at_ms: u64,
    /// The service, if the event is about one that is known.
    pub service: Option<String>,
    /// Id of the deployment, if the event is about one.
    pub deployment: Option<String>,
    /// The instance, if the event is about one.
    pub instance: Option<String>,
    /// The event for people.
    pub text: String,
    /// The event as JSON.
    pub event: String,
}

/// An event in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredEvent {
    /// Its number: each event has the next one, and none is used twice.
    pub number: u64,
    /// The event.
    pub record: EventRecord,
}

/// Which events are read; all where a field is `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EventFilter {
    /// Of this service.
    pub service: Option<String>,
    /// Of the deployments whose ids begin with this.
    pub deployment: Option<String>,
    /// Of the instances with this name.
    pub instance: Option<String>,
}

/// What one read found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventPage {
    /// Events after the given number that are removed already.
    pub gone: u64,
    /// Events, by number.
    pub events: Vec<StoredEvent>,
    /// Number of the last event that was looked at: the next read begins after it.
    pub last: u64,
    /// Number of the newest event.
    pub newest: u64,
}

impl ServiceStore {
    /// Appends events, and removes those that are too old. Returns the number of the last. An
    /// event of a deployment gets the service that has, or had, the deployment.
    pub fn record(&mut self, events: &[EventRecord]) -> Result<u64, StoreError> {
        self.record_and_keep(events, KEPT)
    }

    fn record_and_keep(&mut self, events: &[EventRecord], kept: u64) -> Result<u64, StoreError> {
        let transaction = self.0.connection.transaction()?;
        insert(&transaction, events)?;
        let newest = "SELECT coalesce(max(number), 0) FROM event";
        let newest = transaction.query_row(newest, [], |row| unsigned(row, 0))?;
        let removed = newest.saturating_sub(kept);
        transaction.execute("DELETE FROM event WHERE number <= ?1", [signed(removed)])?;
        transaction.commit()?;
        Ok(newest)
    }

    /// Reads some of the events after number `after`, or from the oldest.
    pub fn events(
        &self,
        after: Option<u64>,
        filter: &EventFilter,
    ) -> Result<EventPage, StoreError> {
        let connection = &self.0.connection;
        // Each of these reads one row; `min` and `max` in one SELECT would read them all.
        let bounds = "SELECT coalesce((SELECT min(number) FROM event), 1), \
                      coalesce((SELECT max(number) FROM event), 0)";
        let (oldest, newest) =
            connection.query_row(bounds, [], |row| Ok((unsigned(row, 0)?, unsigned(row, 1)?)))?;
        let before = oldest.saturating_sub(1);
        let from = after.unwrap_or(before).max(before);
        let to = newest.min(from.saturating_add(MAX_SCANNED));
        let mut page = EventPage {
            gone: after.map_or(0, |after| before.saturating_sub(after)),
            events: Vec::new(),
            last: to.max(from),
            newest,
        };
        let sql = "SELECT number, at_ms, service, deployment, instance, text, event FROM event \
                   WHERE number > ?1 AND number <= ?2 \
                   AND (?3 IS NULL OR service = ?3) \
                   AND (?4 IS NULL OR substr(deployment, 1, length(?4)) = ?4) \
                   AND (?5 IS NULL OR instance = ?5) ORDER BY number";
        let mut statement = connection.prepare(sql)?;
        let found = params![
            signed(from),
            signed(to),
            filter.service,
            filter.deployment,
            filter.instance
        ];
        let mut bytes = 0;
        for event in statement.query_map(found, stored)? {
            let event = event?;
            bytes += event.record.text.len() + event.record.event.len();
            page.last = event.number;
            page.events.push(event);
            if bytes >= PAGE_BYTES {
                return Ok(page);
            }
        }
        page.last = to.max(from);
        Ok(page)
    }
}

impl ServiceStore {
    /// The newest events, at most `most`, in their order. Those of a service alone are looked
    /// for among the newest few thousand.
    pub fn newest_events(
        &self,
        filter: &EventFilter,
        most: usize,
    ) -> Result<Vec<StoredEvent>, StoreError> {
        // An index finds those of a deployment.
        let scanned = match filter {
            EventFilter {
                deployment: Some(_),
                ..
            } => KEPT,
            _ => MAX_SCANNED,
        };
        let sql = "SELECT number, at_ms, service, deployment, instance, text, event FROM event \
                   WHERE number > (SELECT coalesce(max(number), 0) FROM event) - ?1 \
                   AND (?2 IS NULL OR service = ?2) \
                   AND (?4 IS NULL OR instance = ?4)";
        // Not with OR, which would keep SQLite from the index.
        let deployment = match filter.deployment {
            Some(_) => "AND deployment = ?3",
            None => "AND ?3 IS NULL",
        };
        let sql = format!("{sql} {deployment} ORDER BY number DESC LIMIT ?5");
        let mut statement = self.0.connection.prepare(&sql)?;
        let found = params![
            signed(scanned),
            filter.service,
            filter.deployment,
            filter.instance,
            i64::try_from(most).unwrap_or(i64::MAX)
        ];
        let found = statement.query_map(found, stored)?;
        let mut events = found.collect::<Result<Vec<_>, _>>()?;
        events.reverse();
        Ok(events)
    }
}

fn insert(transaction: &Transaction<'_>, events: &[EventRecord]) -> rusqlite::Result<()> {
    // A service that is deleted is no longer in its table when its last events arrive.
    let mut insert = transaction.prepare(
        "INSERT INTO event (at_ms, service, deployment, instance, text, event) VALUES (?1, \
         coalesce(?2, (SELECT name FROM service WHERE deployment = ?3), \
         (SELECT service FROM event WHERE deployment = ?3 ORDER BY number DESC LIMIT 1)), \
         ?3, ?4, ?5, ?6)",
    )?;
    for event in events {
        insert.execute(params![
            signed(event.at_ms),
            event.service,
            event.deployment,
            event.instance,
            event.text,
            event.event
        ])?;
    }
    Ok(())
}

fn stored(row: &Row<'_>) -> rusqlite::Result<StoredEvent> {
    Ok(StoredEvent {
        number: unsigned(row, 0)?,
        record: EventRecord {
            at_ms: unsigned(row, 1)?,
            service: row.get(2)?,
            deployment: row.get(3)?,
            instance: row.get(4)?,
            text: row.get(5)?,
            event: row.get(6)?,
        },
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::store::services::{Applied, Wanted};

    /// An event of `instance` of `deployment`.
    pub(crate) fn event(deployment: &str, instance: &str, text: &str) -> EventRecord {
        EventRecord {
            at_ms: 7,
            service: None,
            deployment: Some(deployment.into()),
            instance: Some(instance.into()),
            text: text.into(),
            event: r#"{"event":"stopping"}"#.into(),
        }
    }

    fn store() -> (tempfile::TempDir, ServiceStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = ServiceStore::open(dir.path()).unwrap();
        (dir, store)
    }

    fn numbers(page: &EventPage) -> Vec<u64> {
        page.events.iter().map(|event| event.number).collect()
    }

    fn texts(store: &ServiceStore, filter: &EventFilter) -> Vec<String> {
        let page = store.events(None, filter).unwrap();
        page.events.into_iter().map(|it| it.record.text).collect()
    }

    /// Every write to the database fails as on a full disk, or succeeds again.
    pub(crate) fn set_full(store: &ServiceStore, full: bool) {
        let connection = &store.0.connection;
        let pages = if full { 1 } else { u32::MAX - 1 };
        // The least that SQLite takes is the present size.
        let set = format!("PRAGMA max_page_count = {pages}");
        let _: i64 = connection.query_row(&set, [], |row| row.get(0)).unwrap();
    }

    #[test]
    fn numbers_rise_over_restarts_and_are_never_used_twice() {
        let (dir, mut store) = store();
        let all = EventFilter::default();
        assert_eq!(store.events(Some(0), &all).unwrap().newest, 0);
        let three = ["a", "b", "c"].map(|text| event("d", "A_IN_0", text));
        assert_eq!(store.record(&three).unwrap(), 3);
        drop(store);
        let mut store = ServiceStore::open(dir.path()).unwrap();
        // Not even when the newest rows are removed.
        store
            .0
            .connection
            .execute("DELETE FROM event WHERE number > 1", [])
            .unwrap();
        assert_eq!(store.record(&three[..1]).unwrap(), 4);
        let page = store.events(Some(0), &all).unwrap();
        assert_eq!((numbers(&page), page.last), (vec![1, 4], 4));
        let page = store.events(Some(1), &all).unwrap();
        assert_eq!(numbers(&page), [4]);
        assert_eq!(page.events[0].record, three[0]);
        let page = store.events(Some(4), &all).unwrap();
        assert!(page.events.is_empty() && page.last == 4);
    }

    #[test]
    fn only_the_newest_are_kept_and_a_reader_learns_the_rest() {
        let (_dir, mut store) = store();
        let all = EventFilter::default();
        for _ in 0..7 {
            let two = ["a", "b"].map(|text| event("d", "A_IN_0", text));
            store.record_and_keep(&two, 5).unwrap();
        }
        let gone = |after| {
            let page = store.events(after, &all).unwrap();
            (page.gone, numbers(&page))
        };
        assert_eq!(gone(None), (0, vec![10, 11, 12, 13, 14]));
        assert_eq!(gone(Some(0)), (9, vec![10, 11, 12, 13, 14]));
        assert_eq!(gone(Some(8)), (1, vec![10, 11, 12, 13, 14]));
        assert_eq!(gone(Some(9)), (0, vec![10, 11, 12, 13, 14]));
        assert_eq!(gone(Some(13)), (0, vec![14]));
    }

    #[test]
    fn a_page_ends_within_its_limits_and_the_next_goes_on() {
        let (_dir, mut store) = store();
        let large = "x".repeat(PAGE_BYTES / 3);
        store
            .record(&vec![event("d", "A_IN_0", &large); 7])
            .unwrap();
        let small = vec![event("d", "B_IN_0", "y"); MAX_SCANNED as usize];
        store.record(&small).unwrap();
        let read = |filter: &EventFilter| {
            let (mut last, mut pages, mut found) = (0, Vec::new(), 0);
            loop {
                let page = store.events(Some(last), filter).unwrap();
                pages.push(page.events.len());
                found += page.events.len();
                last = page.last;
                if last == page.newest {
                    return (pages, found);
                }
            }
        };
        let all = read(&EventFilter::default());
        assert_eq!(all.1, 7 + MAX_SCANNED as usize);
        assert_eq!(all.0[..2], [3, 3]);
        let only = EventFilter {
            instance: Some("C_IN_0".into()),
            ..EventFilter::default()
        };
        assert_eq!(read(&only), (vec![0, 0], 0));
    }

    #[test]
    fn the_newest_events_are_those_of_the_filter() {
        let (_dir, mut store) = store();
        for number in 0..5 {
            let text = number.to_string();
            let of_a = event("d", "A_IN_0", &text);
            store.record(&[of_a, event("e", "B_IN_0", &text)]).unwrap();
        }
        let texts = |deployment: Option<&str>, instance: Option<&str>, most| {
            let filter = EventFilter {
                service: None,
                deployment: deployment.map(Into::into),
                instance: instance.map(Into::into),
            };
            let found = store.newest_events(&filter, most).unwrap();
            let texts = found.into_iter().map(|it| it.record.text);
            texts.collect::<Vec<_>>().join(" ")
        };
        assert_eq!(texts(None, None, 3), "3 4 4");
        assert_eq!(texts(Some("e"), Some("B_IN_0"), 2), "3 4");
        assert_eq!(texts(Some("d"), Some("B_IN_0"), 2), "");
        assert_eq!(texts(None, Some("A_IN_0"), 9), "0 1 2 3 4");
    }

    #[test]
    fn events_have_their_service_and_outlive_it() {
        let (_dir, mut store) = store();
        let wanted = Wanted {
            package: Digest::of(&b"p"[..]).unwrap().0,
            configuration: "<c/>".into(),
            publish: Vec::new(),
        };
        let applied = store.apply("shop", &wanted, 7).unwrap();
        assert!(matches!(applied, Applied::Begun(_)));
        store.deploying("shop", "0123").unwrap();
        store.record(&[event("0123", "A_IN_0", "first")]).unwrap();
        store.delete("shop", 7).unwrap();
        store.forget("shop").unwrap();
        store.record(&[event("0123", "A_IN_1", "last")]).unwrap();
        store.record(&[event("4567", "A_IN_0", "other")]).unwrap();
        let of = |service: &str, deployment: &str, instance: &str| {
            let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            let filter = EventFilter {
                service: some(service),
                deployment: some(deployment),
                instance: some(instance),
            };
            texts(&store, &filter)
        };
        assert_eq!(of("", "", ""), ["first", "last", "other"]);
        assert_eq!(of("shop", "", ""), ["first", "last"]);
        assert_eq!(of("", "", "A_IN_0"), ["first", "other"]);
        assert_eq!(of("", "01", "A_IN_0"), ["first"]);
        assert_eq!(of("", "_123", ""), [""; 0]);
    }

    #[test]
    fn a_full_disk_leaves_no_part_of_a_batch_and_no_number() {
        let (_dir, mut store) = store();
        store.record(&[event("d", "A_IN_0", "a")]).unwrap();
        set_full(&store, true);
        let large = vec![event("d", "A_IN_0", &"x".repeat(10_000)); 3];
        store.record(&large).unwrap_err();
        set_full(&store, false);
        assert_eq!(store.record(&large).unwrap(), 4);
    }
}
