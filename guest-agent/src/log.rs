//! Log records on their way to the host: a bounded queue, losses counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::time::{ClockId, clock_gettime};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::sync::mpsc;
use vmbus::channel::Channel;
use vmbus::message::{LogRecord, LogSource, ToHost};
use vmbus::stream::send;

use crate::bus;

/// Records that may wait for the host.
const BACKLOG: usize = 1024;
/// Longest text of a record; a longer line becomes several.
const MAX_LINE: usize = 8 * 1024;

/// Puts records in the queue. Never waits.
#[derive(Debug, Clone)]
pub struct Logger {
    sender: mpsc::Sender<LogRecord>,
    dropped: Arc<AtomicU64>,
}

impl Logger {
    /// A logger whose records go to the host by a task of their own.
    pub fn start(program: &'static str) -> Self {
        let (sender, receiver) = mpsc::channel(BACKLOG);
        tokio::spawn(ship(receiver, program));
        Self {
            sender,
            dropped: Arc::default(),
        }
    }

    /// Logs one line, or counts it as lost.
    pub fn line(&self, source: LogSource, stream: &str, text: String) {
        let record = LogRecord {
            source,
            stream: stream.to_owned(),
            uptime_ms: uptime_ms(),
            dropped: self.dropped.swap(0, Ordering::Relaxed),
            text,
        };
        if let Err(error) = self.sender.try_send(record) {
            let lost = error.into_inner().dropped + 1;
            self.dropped.fetch_add(lost, Ordering::Relaxed);
        }
    }

    /// Logs a line of an agent.
    pub fn agent(&self, program: &str, text: impl Into<String>) {
        self.line(LogSource::Agent, program, text.into());
    }
}

/// Milliseconds since the guest booted.
pub fn uptime_ms() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| {
        let duration = std::time::Duration::from(time);
        u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
    })
}

async fn ship(mut records: mpsc::Receiver<LogRecord>, program: &'static str) {
    let mut unsent: Option<LogRecord> = None;
    loop {
        let mut open = bus::dial_until_open(Channel::Log, program).await;
        loop {
            let record = match unsent.take() {
                Some(record) => record,
                None => match records.recv().await {
                    Some(record) => record,
                    None => return,
                },
            };
            let message = ToHost::Log(record.clone());
            if send(&mut open.writer, &message).await.is_err() {
                unsent = Some(record);
                break;
            }
        }
    }
}

/// Sends each line of `stream`, in pieces of at most 8 KiB, until it ends or
/// nobody listens. A slow listener slows the writer of the stream.
pub async fn lines(stream: impl AsyncRead + Unpin, sink: mpsc::Sender<String>) {
    let mut reader = BufReader::with_capacity(MAX_LINE, stream);
    let mut line = Vec::new();
    while let Ok(bytes) = reader.fill_buf().await {
        if bytes.is_empty() {
            break;
        }
        let room = MAX_LINE - line.len();
        let (take, ends) = match bytes.iter().take(room).position(|byte| *byte == b'\n') {
            Some(end) => (end + 1, true),
            None => (bytes.len().min(room), false),
        };
        line.extend_from_slice(&bytes[..take]);
        reader.consume(take);
        if ends || line.len() == MAX_LINE {
            if ends {
                line.pop();
            }
            let text = String::from_utf8_lossy(&line).into_owned();
            if sink.send(text).await.is_err() {
                return;
            }
            line.clear();
        }
    }
    if !line.is_empty() {
        let _ = sink.send(String::from_utf8_lossy(&line).into_owned()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn long_lines_are_cut_and_the_last_line_needs_no_end() {
        let text = format!("a\n\n{}\nlast", "x".repeat(MAX_LINE + 5));
        let (sender, mut receiver) = mpsc::channel(16);
        lines(text.as_bytes(), sender).await;
        let mut seen = Vec::new();
        while let Some(line) = receiver.recv().await {
            seen.push(line);
        }
        let lengths: Vec<usize> = seen.iter().map(String::len).collect();
        assert_eq!(lengths, [1, 0, MAX_LINE, 5, 4]);
    }
}
