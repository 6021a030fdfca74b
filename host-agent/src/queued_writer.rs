//! Writes lines to a file or pipe: a bounded queue and one thread.
//!
//! Only that thread waits for a slow disk or reader. A line that does not fit
//! in the queue, or that the file does not take, is dropped and counted; the
//! next line that is queued follows a line with the count.

mod rotating_file;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

pub use rotating_file::{RotatingFile, previous};

/// Most bytes in the queue, with [`LINE_OVERHEAD`] for each line.
const MAX_QUEUE: usize = 1 << 20;
/// Memory that a queued line takes besides its bytes.
const LINE_OVERHEAD: usize = 64;
/// An unfinished line of this length is written without its end.
const MAX_UNFINISHED: usize = 4096;
/// Time after which an unfinished line, such as a prompt, is written.
const UNFINISHED_LIMIT: Duration = Duration::from_millis(500);

/// The queue's handle. When it is dropped, the thread writes what is queued
/// and ends.
#[derive(Debug)]
pub struct QueuedWriter(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    /// A line was queued or completed, or the queue was closed.
    queued: Condvar,
    /// A line left the queue.
    removed: Condvar,
    /// Number of entries that left the queue.
    done: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Queue {
    entries: VecDeque<Entry>,
    /// Size of `entries` and of the entry that the thread is writing.
    size: usize,
    /// Lines in `entries` and in the entry that the thread is writing.
    unwritten: u64,
    /// Number of entries ever queued.
    count: u64,
    position: Position,
    /// Lines dropped since the last count was queued.
    unreported: u64,
    /// Lines dropped since the start.
    dropped: u64,
    /// Why the last write failed.
    error: Option<io::ErrorKind>,
    /// The thread ends when the queue is empty.
    closed: bool,
}

/// Where in a line the next byte belongs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Position {
    #[default]
    LineStart,
    /// Behind bytes that were queued.
    InLine,
    /// Behind bytes that were dropped: the rest of the line is dropped too.
    /// `torn` if its beginning was queued.
    InDropped { torn: bool },
    /// At a line start that follows a line without its end.
    AfterTorn,
}

#[derive(Debug)]
struct Entry {
    bytes: Vec<u8>,
    /// The dropped lines that this entry reports; 0 in a line of the caller.
    reports: u64,
    /// The rest of the line may be added.
    open: bool,
}

impl Entry {
    fn size(&self) -> usize {
        self.bytes.len() + LINE_OVERHEAD
    }

    /// Number of the caller's lines that are lost with this entry.
    fn lines(&self) -> u64 {
        self.reports.max(1)
    }
}

impl QueuedWriter {
    /// Starts the thread, which is called `name` and writes to `target`.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(name: &str, target: impl Write + Send + 'static) -> io::Result<Self> {
        let builder = std::thread::Builder::new().name(name.to_owned());
        Self::start_by(|work| builder.spawn(work).map(drop), target)
    }

    /// The same, on a thread that `spawn` starts.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start_by(
        spawn: impl FnOnce(Box<dyn FnOnce() + Send>) -> io::Result<()>,
        mut target: impl Write + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            queued: Condvar::new(),
            removed: Condvar::new(),
            done: watch::Sender::new(0),
        });
        let of_thread = Arc::clone(&shared);
        // Never joined: a write to a stalled disk or a full pipe cannot be
        // cancelled, so the thread may last as long as the process.
        spawn(Box::new(move || {
            while let Some(entry) = of_thread.next() {
                let written = target.write_all(&entry.bytes);
                of_thread.remove(&entry, written);
            }
        }))?;
        Ok(Self(shared))
    }

    /// Appends to the log at `path`, which is created if needed and rotates.
    ///
    /// # Errors
    /// The file cannot be opened or the thread cannot be started.
    pub fn open_log(path: &Path) -> io::Result<Self> {
        Self::start("log", RotatingFile::open(path)?)
    }

    /// Queues `text` as one line of a log.
    pub fn line(&self, text: &str) {
        let mut line = text.replace('\n', " ");
        line.push('\n');
        self.append(line.as_bytes());
    }

    /// Queues `bytes` of a log, which may be part of a line or end one.
    pub fn append(&self, bytes: &[u8]) {
        let report = |count| format!("[{count} lines lost by the host]\n");
        let mut queue = self.0.lock();
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            if queue.push(part, part.ends_with(b"\n"), report) {
                self.0.queued.notify_one();
            }
        }
    }

    /// Queues `piece`, which is written or dropped as a whole. `report` makes a
    /// line of the number of pieces that were dropped before it.
    ///
    /// # Errors
    /// The last write failed, for example because the reader of a pipe is gone.
    pub fn push(&self, piece: &[u8], report: impl FnOnce(u64) -> String) -> io::Result<()> {
        let mut queue = self.0.lock();
        if queue.push(piece, true, report) {
            self.0.queued.notify_one();
        }
        queue.error.map_or(Ok(()), |kind| Err(kind.into()))
    }

    /// Number of lines dropped since the start.
    pub fn dropped(&self) -> u64 {
        self.0.lock().dropped
    }

    /// Waits until every line queued so far is written, or dropped by an error.
    pub async fn written(&self) {
        let count = self.0.lock().count;
        // The sender lives in `self`, so the wait ends with the condition.
        let _ = self
            .0
            .done
            .subscribe()
            .wait_for(|done| *done >= count)
            .await;
    }

    /// Closes the queue and waits for at most `limit` until it is empty. Returns
    /// the number of lines that a slow disk or reader did not take.
    pub fn finish(&self, limit: Duration) -> u64 {
        let deadline = Instant::now() + limit;
        let mut queue = self.0.lock();
        queue.closed = true;
        self.0.queued.notify_one();
        while queue.unwritten > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.0.removed.wait_timeout(queue, left);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        match queue.error {
            Some(_) => 0,
            None => queue.unwritten + queue.unreported,
        }
    }
}

impl Drop for QueuedWriter {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.queued.notify_one();
    }
}

/// Never blocks and never fails.
impl Write for &QueuedWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.append(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next entry; `None` when the queue is closed and empty.
    fn next(&self) -> Option<Entry> {
        let empty = |queue: &mut Queue| queue.entries.is_empty() && !queue.closed;
        let queue = self
            .queued
            .wait_while(self.lock(), empty)
            .unwrap_or_else(PoisonError::into_inner);
        let open = |queue: &mut Queue| {
            !queue.closed && queue.entries.front().is_some_and(|entry| entry.open)
        };
        let (mut queue, _) = self
            .queued
            .wait_timeout_while(queue, UNFINISHED_LIMIT, open)
            .unwrap_or_else(PoisonError::into_inner);
        queue.entries.pop_front()
    }

    fn remove(&self, entry: &Entry, written: io::Result<()>) {
        let mut queue = self.lock();
        queue.size -= entry.size();
        queue.unwritten -= entry.lines();
        queue.error = written.err().map(|error| error.kind());
        if queue.error.is_some() {
            queue.unreported += entry.lines();
            queue.dropped += u64::from(entry.reports == 0);
        }
        self.done.send_modify(|done| *done += 1);
        self.removed.notify_all();
    }
}

impl Queue {
    /// Queues `part` of a line; `ends` if the line ends with it. Returns whether
    /// the thread has to look at the queue.
    fn push(&mut self, part: &[u8], ends: bool, report: impl FnOnce(u64) -> String) -> bool {
        if let Position::InDropped { torn } = self.position {
            self.skip(ends, torn);
            return false;
        }
        let in_line = self.position == Position::InLine;
        if self.size + part.len() + LINE_OVERHEAD > MAX_QUEUE {
            self.unreported += 1;
            self.dropped += 1;
            self.skip(ends, in_line || self.position == Position::AfterTorn);
            return false;
        }
        if !in_line && self.unreported > 0 {
            let reports = std::mem::take(&mut self.unreported);
            let mut bytes = report(reports).into_bytes();
            if self.position == Position::AfterTorn {
                bytes.insert(0, b'\n');
            }
            self.add(bytes, reports, false);
        }
        self.position = if ends {
            Position::LineStart
        } else {
            Position::InLine
        };
        match self.entries.back_mut() {
            Some(entry) if in_line && entry.open => {
                entry.bytes.extend_from_slice(part);
                entry.open = !ends && entry.bytes.len() < MAX_UNFINISHED;
                self.size += part.len();
                !entry.open
            }
            _ => {
                self.add(part.to_vec(), 0, !ends);
                true
            }
        }
    }

    /// Drops part of a line whose beginning was queued if `torn`.
    fn skip(&mut self, ends: bool, torn: bool) {
        self.position = match (ends, torn) {
            (false, torn) => Position::InDropped { torn },
            (true, true) => Position::AfterTorn,
            (true, false) => Position::LineStart,
        };
    }

    fn add(&mut self, bytes: Vec<u8>, reports: u64, open: bool) {
        let entry = Entry {
            bytes,
            reports,
            open,
        };
        self.size += entry.size();
        self.unwritten += entry.lines();
        self.count += 1;
        self.entries.push_back(entry);
    }
}
