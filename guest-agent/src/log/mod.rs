//! Sends log records to the host through a bounded queue that counts its losses.

pub mod backlog;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::sync::Notify;
use vmbus::channel::Channel;
use vmbus::message::{LogRecord, LogSource, ToHost};
use vmbus::stream::send;

use crate::bus::Dialer;
use crate::clock;
use backlog::Backlog;

/// Bytes of records that may wait for the host.
const LIMIT: usize = 1 << 20;
/// About the memory that a record takes beyond its text, in bytes.
pub const RECORD_OVERHEAD: usize = 128;
/// Longest text of a record; a longer line becomes several.
const MAX_LINE: usize = 8 * 1024;

/// Adds records to the queue. Never waits.
#[derive(Debug, Clone)]
pub struct Logger(Arc<Queue>);

#[derive(Debug)]
struct Queue {
    waiting: Mutex<Waiting>,
    /// A record was added.
    more: Notify,
    /// A record was sent.
    done: Notify,
}

#[derive(Debug)]
struct Waiting {
    records: Backlog<LogRecord>,
    /// A record was taken and is not sent yet.
    sending: bool,
}

impl Logger {
    /// A logger, and the task that sends its records to the host.
    pub fn start(program: &'static str) -> Self {
        let queue = Arc::new(Queue {
            waiting: Mutex::new(Waiting {
                records: Backlog::new(LIMIT),
                sending: false,
            }),
            more: Notify::new(),
            done: Notify::new(),
        });
        tokio::spawn(ship(Arc::clone(&queue), program));
        Self(queue)
    }

    /// Queues one record. When the host is slow the oldest records are dropped.
    pub fn record(&self, record: LogRecord) {
        let bytes = record.text.len() + RECORD_OVERHEAD;
        self.0.with(|waiting| waiting.records.push(record, bytes));
        self.0.more.notify_one();
    }

    /// Logs a line of an agent.
    pub fn agent(&self, program: &str, text: impl Into<String>) {
        self.record(LogRecord {
            source: LogSource::Agent,
            stream: program.to_owned(),
            uptime_ms: uptime_ms(),
            dropped: 0,
            text: text.into(),
        });
    }

    /// Waits until everything is sent, or for `limit`.
    pub async fn flush(&self, limit: Duration) {
        let sent = async {
            while !self
                .0
                .with(|waiting| waiting.records.is_empty() && !waiting.sending)
            {
                self.0.done.notified().await;
            }
        };
        let _ = clock::timeout(limit, sent).await;
    }
}

impl Queue {
    fn with<T>(&self, act: impl FnOnce(&mut Waiting) -> T) -> T {
        act(&mut self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The next record, which then counts as being sent.
    async fn next(&self) -> LogRecord {
        loop {
            let next = self.with(|waiting| {
                let mut record = waiting.records.pop()?;
                record.dropped += waiting.records.take_lost();
                waiting.sending = true;
                Some(record)
            });
            if let Some(record) = next {
                return record;
            }
            self.more.notified().await;
        }
    }

    fn sent(&self) {
        self.with(|waiting| waiting.sending = false);
        self.done.notify_one();
    }
}

/// Milliseconds since the guest booted.
pub fn uptime_ms() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| {
        let duration = std::time::Duration::from(time);
        u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
    })
}

async fn ship(queue: Arc<Queue>, program: &'static str) {
    let mut unsent: Option<ToHost> = None;
    let mut dialer = Dialer::new(Channel::Log, program);
    loop {
        let mut open = dialer.open().await;
        loop {
            let message = match unsent.take() {
                Some(message) => message,
                None => ToHost::Log(queue.next().await),
            };
            if send(&mut open.writer, &message).await.is_err() {
                unsent = Some(message);
                break;
            }
            queue.sent();
        }
    }
}

/// Passes each line of `stream` to `sink`, in pieces of at most 8 KiB, until the stream
/// ends. `sink` does not wait, so the writer of the stream waits only for this process.
pub async fn lines(stream: impl AsyncRead + Unpin, mut sink: impl FnMut(String)) {
    let mut reader = BufReader::with_capacity(MAX_LINE, stream);
    let mut line = Vec::new();
    while let Ok(bytes) = reader.fill_buf().await {
        if bytes.is_empty() {
            break;
        }
        let free = MAX_LINE - line.len();
        let (take, ends) = match bytes.iter().take(free).position(|byte| *byte == b'\n') {
            Some(end) => (end + 1, true),
            None => (bytes.len().min(free), false),
        };
        line.extend_from_slice(&bytes[..take]);
        reader.consume(take);
        if ends {
            line.pop();
            sink(String::from_utf8_lossy(&line).into_owned());
            line.clear();
        } else if line.len() == MAX_LINE {
            let rest = line.split_off(whole_characters(&line));
            sink(String::from_utf8_lossy(&line).into_owned());
            line = rest;
        }
        // Yields now and then: a stream that always has data would block the other tasks.
        tokio::task::consume_budget().await;
    }
    if !line.is_empty() {
        sink(String::from_utf8_lossy(&line).into_owned());
    }
}

/// Length of `bytes` without a character of UTF-8 that is cut at its end.
fn whole_characters(bytes: &[u8]) -> usize {
    match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        _ => bytes.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn long_lines_are_cut_between_characters() {
        let long = format!("{}é{}", "x".repeat(MAX_LINE - 1), "y".repeat(4));
        let text = format!("a\n\n{}\n{long}\nlast", "x".repeat(MAX_LINE + 5));
        let mut seen = Vec::new();
        lines(text.as_bytes(), |line| seen.push(line)).await;
        let lengths: Vec<usize> = seen.iter().map(String::len).collect();
        assert_eq!(lengths, [1, 0, MAX_LINE, 5, MAX_LINE - 1, 6, 4]);
        assert_eq!(seen[5], "éyyyy");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn bytes_that_are_not_utf8_pass_in_bounded_pieces() {
        let bytes = vec![0xc3; 3 * MAX_LINE];
        let mut pieces = 0;
        lines(bytes.as_slice(), |line| {
            pieces += 1;
            assert!(line.len() <= 3 * MAX_LINE);
        })
        .await;
        assert!((3..=4).contains(&pieces));
    }
}
