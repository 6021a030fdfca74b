//! Shows what the command waits for: on a terminal one changing line, else a line
//! whenever nothing else was printed for ten seconds.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::output::{Output, ProgressStyle};

/// Shorter waits are not shown on a terminal.
const MIN_WAIT: Duration = Duration::from_secs(2);
/// Interval of updates of a changing line.
const UPDATE: Duration = Duration::from_secs(1);
/// Interval of lines where no line can be changed.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// One wait.
#[derive(Debug)]
pub struct Ticker {
    output: Output,
    started: Instant,
    next: Instant,
}

impl Ticker {
    /// Starts a wait.
    pub fn start(output: &Output) -> Self {
        let started = Instant::now();
        let first = match output.style() {
            ProgressStyle::Live => MIN_WAIT,
            ProgressStyle::Plain | ProgressStyle::None => KEEP_ALIVE,
        };
        Self {
            output: output.clone(),
            started,
            next: started + first,
        }
    }

    /// Postpones the next line, because something else was printed.
    pub fn postpone(&mut self) {
        self.next = Instant::now() + self.interval();
    }

    /// Waits until the next line is due. Cancel safe.
    pub async fn due(&self) {
        sleep_until(self.next).await;
    }

    /// Shows that the command waits for `what`.
    pub fn show(&mut self, what: &str) {
        self.postpone();
        let text = format!("{what} ({} s)", self.started.elapsed().as_secs());
        match self.output.style() {
            ProgressStyle::Live => self.output.show_live(&text),
            ProgressStyle::Plain | ProgressStyle::None => self.output.progress(&text),
        }
    }

    const fn interval(&self) -> Duration {
        match self.output.style() {
            ProgressStyle::Live => UPDATE,
            ProgressStyle::Plain | ProgressStyle::None => KEEP_ALIVE,
        }
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.output.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_due_ten_seconds_after_the_last_one() {
        let mut ticker = Ticker::start(&Output::before_flags(false));
        let start = ticker.started;
        assert_eq!(ticker.next, start + KEEP_ALIVE);
        let far = start + 100 * KEEP_ALIVE;
        for print in [Ticker::postpone, |ticker: &mut Ticker| {
            ticker.show("waiting");
        }] {
            ticker.next = far;
            let before = Instant::now();
            print(&mut ticker);
            assert!(ticker.next >= before + KEEP_ALIVE && ticker.next < far);
        }
    }
}
