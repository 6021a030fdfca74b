//! Lines to a stream whose reader may be slow or gone: a bounded queue and a
//! thread, so that printing never holds up who prints.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that may wait for the reader. What comes beyond that is dropped.
const MOST_BYTES: usize = 1 << 20;

/// A stream in the hands of its thread.
#[derive(Debug, Clone)]
pub struct Stream(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// Something to write came.
    came: Condvar,
    /// The queue got shorter, or the reader went away.
    went: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Lines lost since the last one that was kept.
    dropped: u64,
    broken: Option<io::ErrorKind>,
}

impl Stream {
    /// A stream to where `file` leads, written by a thread of its own.
    ///
    /// # Errors
    /// No descriptor or no thread is to be had.
    pub fn to(file: impl AsFd) -> io::Result<Self> {
        let mut file = File::from(file.as_fd().try_clone_to_owned()?);
        let shared = Arc::<Shared>::default();
        let of_thread = Arc::clone(&shared);
        // It ends with the process: a write to a full pipe cannot be called off.
        std::thread::Builder::new()
            .name("output".into())
            .spawn(move || of_thread.write_to(&mut file))?;
        Ok(Self(shared))
    }

    /// Queues `line`. When there is no room it is dropped; the next one that
    /// is kept follows the line that `gap` makes of the number of dropped ones.
    ///
    /// # Errors
    /// The reader is gone, or the stream takes no more.
    pub fn push(&self, line: Vec<u8>, gap: impl FnOnce(u64) -> Vec<u8>) -> io::Result<()> {
        let mut queue = self.0.lock();
        if let Some(kind) = queue.broken {
            return Err(kind.into());
        }
        if queue.bytes + line.len() > MOST_BYTES {
            queue.dropped += 1;
            return Ok(());
        }
        if queue.dropped > 0 {
            let gap = gap(std::mem::take(&mut queue.dropped));
            queue.put(gap);
        }
        queue.put(line);
        self.0.came.notify_one();
        Ok(())
    }

    /// Waits at most `limit` for everything to be written; how many lines
    /// never were.
    pub fn flush(&self, limit: Duration) -> u64 {
        let deadline = Instant::now() + limit;
        let mut queue = self.0.lock();
        while !queue.lines.is_empty() && queue.broken.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.0.went.wait_timeout(queue, left);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        queue.dropped + queue.lines.len() as u64
    }
}

impl Queue {
    fn put(&mut self, line: Vec<u8>) {
        self.bytes += line.len();
        self.lines.push_back(line);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_to(&self, file: &mut File) {
        loop {
            let mut queue = self.lock();
            let line = loop {
                // It stays in the queue until it is written: only then has
                // nothing been lost.
                if let Some(line) = queue.lines.front_mut() {
                    break std::mem::take(line);
                }
                queue = self
                    .came
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
            };
            drop(queue);
            let written = file.write_all(&line);
            let mut queue = self.lock();
            queue.lines.pop_front();
            queue.bytes -= line.len();
            if let Err(error) = written {
                queue.broken = Some(error.kind());
            }
            self.went.notify_all();
            if queue.broken.is_some() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead as _, BufReader};

    fn line(number: usize) -> Vec<u8> {
        format!("{number} {}\n", "x".repeat(1000)).into_bytes()
    }

    fn gap(count: u64) -> Vec<u8> {
        format!("gap {count}\n").into_bytes()
    }

    #[test]
    fn a_reader_that_pauses_holds_up_nobody_and_is_told_what_it_missed() {
        let (reader, writer) = io::pipe().unwrap();
        let stream = Stream::to(writer).unwrap();
        let sent = 4000;
        for number in 0..sent {
            stream.push(line(number), gap).unwrap();
        }
        assert!(stream.flush(Duration::from_millis(1)) > 1000);
        let mut lines = BufReader::new(reader).lines();
        let (mut next, mut gaps) = (0, 0);
        // What fits comes in order; then there is room for what comes next. The
        // pipe may have taken lines while others were pushed: a gap for each time.
        loop {
            let text = lines.next().unwrap().unwrap();
            if text == "last" {
                break;
            }
            if let Some(missed) = text.strip_prefix("gap ") {
                next += missed.parse::<usize>().unwrap();
                gaps += 1;
                continue;
            }
            assert!(text.starts_with(&format!("{next} ")), "{text:.20}");
            next += 1;
            if next == 500 {
                stream.push(b"last\n".to_vec(), gap).unwrap();
            }
        }
        assert_eq!(next, sent);
        assert!(gaps > 0);
    }

    #[test]
    fn a_reader_that_went_away_is_an_error_of_a_later_line() {
        let (reader, writer) = io::pipe().unwrap();
        let stream = Stream::to(writer).unwrap();
        drop(reader);
        stream.push(b"lost\n".to_vec(), gap).unwrap();
        stream.flush(Duration::from_secs(60));
        let error = stream.push(b"more\n".to_vec(), gap).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
