//! Shows long blocking steps: on a terminal one changing line, else a line every
//! ten seconds.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::output::{Output, ProgressStyle};
use crate::doctor::iec;
use crate::progress::{Progress, StepSnapshot};

/// Shorter steps are not shown.
const MIN_STEP: Duration = Duration::from_secs(2);
/// How often the progress is read.
const POLL: Duration = Duration::from_millis(200);
/// Interval of lines where no line can be changed.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// A thread that shows the steps of a [`Progress`] until this is dropped.
#[derive(Debug)]
pub struct Meter {
    progress: Progress,
    // Dropping the sender ends the thread.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Meter {
    /// Shows steps on `output`.
    pub fn start(output: &Output) -> Self {
        let progress = Progress::default();
        let (stop, stopped) = channel::<()>();
        let thread = (output.style() != ProgressStyle::None).then(|| {
            let (output, progress) = (output.clone(), progress.clone());
            std::thread::spawn(move || {
                let mut shown = Shown::default();
                while stopped.recv_timeout(POLL) == Err(RecvTimeoutError::Timeout) {
                    shown.update(progress.now(), &output);
                }
                output.clear();
            })
        });
        Self {
            progress,
            stop: Some(stop),
            thread,
        }
    }

    /// The progress to which the work reports.
    pub const fn progress(&self) -> &Progress {
        &self.progress
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It ends within one poll; a panic has been printed.
            let _ = thread.join();
        }
    }
}

/// The step shown last, and when its next line is due.
#[derive(Debug, Default)]
struct Shown {
    step: Option<Instant>,
    next: Duration,
}

impl Shown {
    fn update(&mut self, now: Option<StepSnapshot>, output: &Output) {
        let Some(now) = now else {
            output.clear();
            return;
        };
        if self.step != Some(now.started) {
            *self = Self {
                step: Some(now.started),
                next: MIN_STEP,
            };
        }
        let elapsed = now.elapsed();
        if elapsed < self.next {
            return;
        }
        let text = describe(&now, elapsed);
        if output.style() == ProgressStyle::Live {
            output.show_live(&text);
        } else {
            self.next = elapsed + KEEP_ALIVE;
            output.progress(&text);
        }
    }
}

fn describe(now: &StepSnapshot, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs();
    let StepSnapshot {
        what, done, total, ..
    } = now;
    match total {
        Some(total) if *total > 0 => {
            // A file can grow while it is read.
            let percent = done.min(total) * 100 / total;
            format!("{what}: {percent} % of {} ({seconds} s)", iec(*total))
        }
        _ if *done > 0 => format!("{what}: {} ({seconds} s)", iec(*done)),
        _ => format!("{what} ({seconds} s)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_shows_the_bytes_and_the_total_if_known() {
        let now = |done, total| StepSnapshot {
            what: "checking image minimal".into(),
            done,
            total,
            started: Instant::now(),
        };
        let text = |done, total| describe(&now(done, total), Duration::from_millis(12_900));
        let gib = 1 << 30;
        assert_eq!(
            text(gib / 4, Some(gib)),
            "checking image minimal: 25 % of 1.0 GiB (12 s)"
        );
        assert_eq!(
            text(2 * gib, Some(gib)),
            "checking image minimal: 100 % of 1.0 GiB (12 s)"
        );
        assert_eq!(text(gib, None), "checking image minimal: 1.0 GiB (12 s)");
        assert_eq!(text(0, Some(0)), "checking image minimal (12 s)");
    }
}
