//! Shows a step that takes long: on a terminal one line that changes, else a
//! line now and then.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::output::{Output, Style};
use crate::doctor::iec;
use crate::progress::{Progress, StepSnapshot};

/// A shorter step is not shown.
const PATIENCE: Duration = Duration::from_secs(2);
/// Time between two looks.
const LOOK: Duration = Duration::from_millis(200);
/// Time between two lines where no line can be changed.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Shows the steps of its [`Progress`] until it is dropped.
#[derive(Debug)]
pub struct Meter {
    progress: Progress,
    // Its end ends the thread.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Meter {
    /// Shows steps on `output`.
    pub fn start(output: &Output) -> Self {
        let progress = Progress::default();
        let (stop, stopped) = channel::<()>();
        let thread = (output.style() != Style::None).then(|| {
            let (output, progress) = (output.clone(), progress.clone());
            std::thread::spawn(move || {
                let mut shown = Shown::default();
                while stopped.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                    shown.look(progress.now(), &output);
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

    /// What the work is to report to.
    pub const fn progress(&self) -> &Progress {
        &self.progress
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It ends at once; a panic in it has been printed.
            let _ = thread.join();
        }
    }
}

/// The line that was last shown of a step.
#[derive(Debug, Default)]
struct Shown {
    step: Option<Instant>,
    next: Duration,
}

impl Shown {
    fn look(&mut self, now: Option<StepSnapshot>, output: &Output) {
        let Some(now) = now else {
            output.clear();
            return;
        };
        if self.step != Some(now.started) {
            *self = Self {
                step: Some(now.started),
                next: PATIENCE,
            };
        }
        let elapsed = now.elapsed();
        if elapsed < self.next {
            return;
        }
        let text = words(&now, elapsed);
        if output.style() == Style::Live {
            output.live(&text);
        } else {
            self.next = elapsed + KEEP_ALIVE;
            output.progress(&text);
        }
    }
}

fn words(now: &StepSnapshot, elapsed: Duration) -> String {
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
    fn a_step_is_shown_with_as_much_as_is_known() {
        let now = |done, total| StepSnapshot {
            what: "checking image minimal".into(),
            done,
            total,
            started: Instant::now(),
        };
        let text = |done, total| words(&now(done, total), Duration::from_millis(12_900));
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
