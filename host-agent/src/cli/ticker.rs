//! Says what a wait is for: on a terminal in one line that changes, else in a
//! line whenever nothing else was said for a while.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::output::{Output, Style};

/// A shorter wait is not told of.
const PATIENCE: Duration = Duration::from_secs(2);
/// Time between two looks of the line that changes.
const LOOK: Duration = Duration::from_secs(1);
/// Time between two lines where no line can be changed.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// One wait.
#[derive(Debug)]
pub struct Ticker {
    output: Output,
    started: Instant,
    next: Instant,
}

impl Ticker {
    /// A wait that begins now.
    pub fn start(output: &Output) -> Self {
        let started = Instant::now();
        let first = match output.style() {
            Style::Live => PATIENCE,
            Style::Plain | Style::None => KEEP_ALIVE,
        };
        Self {
            output: output.clone(),
            started,
            next: started + first,
        }
    }

    /// Something else was said: no line is needed soon.
    pub fn said(&mut self) {
        self.next = Instant::now() + self.pause();
    }

    /// Waits until it is time to say something. Cancelling loses nothing.
    pub async fn due(&self) {
        sleep_until(self.next).await;
    }

    /// Says that `what` is waited for.
    pub fn say(&mut self, what: &str) {
        self.next = Instant::now() + self.pause();
        let text = format!("{what} ({} s)", self.started.elapsed().as_secs());
        match self.output.style() {
            Style::Live => self.output.live(&text),
            Style::Plain | Style::None => self.output.progress(&text),
        }
    }

    const fn pause(&self) -> Duration {
        match self.output.style() {
            Style::Live => LOOK,
            Style::Plain | Style::None => KEEP_ALIVE,
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
    fn a_line_is_due_a_while_after_the_last_one_and_not_before() {
        let mut ticker = Ticker::start(&Output::before_flags(false));
        let start = ticker.started;
        assert_eq!(ticker.next, start + KEEP_ALIVE);
        let far = start + 100 * KEEP_ALIVE;
        for speak in [Ticker::said, |ticker: &mut Ticker| ticker.say("waiting")] {
            ticker.next = far;
            let before = Instant::now();
            speak(&mut ticker);
            assert!(ticker.next >= before + KEEP_ALIVE && ticker.next < far);
        }
    }
}
