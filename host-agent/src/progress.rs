//! Progress and cancellation of a long blocking step, for another thread.

use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A handle for the thread that works and the thread that shows its progress.
/// Clones share one state.
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

/// The progress of a step at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepSnapshot {
    /// The activity, such as "checking image minimal".
    pub what: String,
    /// Bytes done.
    pub done: u64,
    /// All bytes of the step, if known.
    pub total: Option<u64>,
    /// Start of the step.
    pub started: Instant,
}

impl StepSnapshot {
    /// Time since the start of the step.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Progress {
    /// Starts a step of `total` bytes, if known. The step ends when the next one
    /// starts or the guard is dropped.
    pub fn step(&self, what: impl Into<String>, total: Option<u64>) -> StepGuard<'_> {
        self.0.done.store(0, Ordering::Relaxed);
        *self.slot() = Some(RunningStep {
            what: what.into(),
            total,
            started: Instant::now(),
        });
        StepGuard(self)
    }

    /// Adds `bytes` to the bytes done.
    pub fn advance(&self, bytes: u64) {
        self.0.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The current step, if there is one.
    pub fn now(&self) -> Option<StepSnapshot> {
        self.slot().clone().map(|step| StepSnapshot {
            what: step.what,
            done: self.0.done.load(Ordering::Relaxed),
            total: step.total,
            started: step.started,
        })
    }

    /// Makes every later [`Progress::check`] fail.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }

    /// # Errors
    /// The work was cancelled.
    pub fn check(&self) -> io::Result<()> {
        if self.0.cancelled.load(Ordering::Relaxed) {
            // Not `Interrupted`: readers would try again.
            return Err(io::Error::other("cancelled"));
        }
        Ok(())
    }

    /// A reader of `inner` that adds the bytes read to the bytes done, and fails
    /// once the work is cancelled.
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

/// Ends its step when dropped.
#[derive(Debug)]
#[must_use = "the step ends when the guard is dropped"]
pub struct StepGuard<'a>(&'a Progress);

impl Drop for StepGuard<'_> {
    fn drop(&mut self) {
        *self.0.slot() = None;
    }
}

/// Made by [`Progress::watch`].
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
    fn a_step_counts_bytes_read_until_its_guard_is_dropped() {
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
    fn a_read_after_cancellation_fails() {
        let progress = Progress::default();
        let mut reader = progress.watch(io::repeat(7));
        reader.read_exact(&mut [0; 100]).unwrap();
        progress.clone().cancel();
        assert!(io::copy(&mut reader, &mut io::sink()).is_err());
    }
}
