//! How far a long blocking step is, as seen from another thread, and whether
//! it shall go on.

use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// ProgressState by the thread that works and the one that shows it. Cloning gives
/// another handle to the same.
#[derive(Debug, Clone, Default)]
pub struct Progress(Arc<ProgressState>);

#[derive(Debug, Default)]
struct ProgressState {
    step: Mutex<Option<RunningStep>>,
    done: AtomicU64,
    cancelled: AtomicBool,
}

#[derive(Debug, Clone)]
struct RunningStep {
    what: String,
    total: Option<u64>,
    started: Instant,
}

/// A step in the middle of its work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepSnapshot {
    /// What is being done: "checking image minimal".
    pub what: String,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all, when that is known.
    pub total: Option<u64>,
    /// When it began.
    pub started: Instant,
}

impl StepSnapshot {
    /// Time since the step began.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Progress {
    /// A step begins, of `total` bytes if that is known. It lasts until the
    /// next one, or until the returned guard goes.
    pub fn step(&self, what: impl Into<String>, total: Option<u64>) -> StepGuard<'_> {
        self.0.done.store(0, Ordering::Relaxed);
        *self.slot() = Some(RunningStep {
            what: what.into(),
            total,
            started: Instant::now(),
        });
        StepGuard(self)
    }

    /// So many bytes more are done.
    pub fn advance(&self, bytes: u64) {
        self.0.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The step, if there is one.
    pub fn now(&self) -> Option<StepSnapshot> {
        self.slot().clone().map(|step| StepSnapshot {
            what: step.what,
            done: self.0.done.load(Ordering::Relaxed),
            total: step.total,
            started: step.started,
        })
    }

    /// Makes every step fail at its next [`Progress::check`].
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }

    /// # Errors
    /// The work is to be given up.
    pub fn check(&self) -> io::Result<()> {
        if self.0.cancelled.load(Ordering::Relaxed) {
            // Not `Interrupted`, which readers try again.
            return Err(io::Error::other("given up on request"));
        }
        Ok(())
    }

    /// Counts what is read from `inner`, and ends it when the work is to be
    /// given up.
    pub fn watch<R: Read>(&self, inner: R) -> CountingReader<R> {
        CountingReader {
            inner,
            progress: self.clone(),
        }
    }

    fn slot(&self) -> std::sync::MutexGuard<'_, Option<RunningStep>> {
        self.0.step.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends its step when it goes.
#[derive(Debug)]
#[must_use = "the step ends with it"]
pub struct StepGuard<'a>(&'a Progress);

impl Drop for StepGuard<'_> {
    fn drop(&mut self) {
        *self.0.slot() = None;
    }
}

/// A reader whose bytes are counted.
#[derive(Debug)]
pub struct CountingReader<R> {
    inner: R,
    progress: Progress,
}

impl<R: Read> Read for CountingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.progress.check()?;
        let count = self.inner.read(buffer)?;
        self.progress.advance(count as u64);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_counts_what_is_read_and_ends_with_its_guard() {
        let progress = Progress::default();
        assert_eq!(progress.now(), None);
        let step = progress.step("checking", Some(6));
        let read = io::copy(&mut progress.watch(&b"abc"[..]), &mut io::sink());
        assert_eq!(read.unwrap(), 3);
        let now = progress.now().unwrap();
        assert_eq!(
            (now.what.as_str(), now.done, now.total),
            ("checking", 3, Some(6))
        );
        drop(step);
        assert_eq!(progress.now(), None);
    }

    #[test]
    fn a_cancelled_step_ends_at_the_next_read() {
        let progress = Progress::default();
        let mut reader = progress.watch(io::repeat(7));
        reader.read_exact(&mut [0; 100]).unwrap();
        progress.clone().cancel();
        assert!(io::copy(&mut reader, &mut io::sink()).is_err());
    }
}
