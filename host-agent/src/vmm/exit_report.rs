//! The last words of the process: why it ends, in the exit file and as the last
//! event. A supervisor that is not attached at the end reads the file.

use std::fs::File;
use std::io::{self, Write as _};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::control::{Event, ExitReason};
use super::outbox::Outbox;

/// Time for the supervisor to receive the last events.
const LAST_EVENTS: Duration = Duration::from_secs(2);

/// Reports the end of the process once, from whichever thread.
#[derive(Debug)]
pub struct ExitReport {
    outbox: Outbox,
    file: Mutex<Option<File>>,
}

impl ExitReport {
    /// A report to the supervisor that is attached at the end.
    pub const fn new(outbox: Outbox) -> Self {
        Self {
            outbox,
            file: Mutex::new(None),
        }
    }

    /// Reports in this empty file too. It stays empty if the process is killed or
    /// crashes.
    pub fn write_to(&self, file: File) {
        *self.file.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
    }

    /// Reports `reason`, and waits a limited time for the supervisor to receive it.
    pub fn finish(&self, reason: ExitReason) -> io::Result<()> {
        let reason = reason.bounded();
        let file = self
            .file
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let written = file.map_or(Ok(()), |mut file| {
            // One write(2): a reader sees nothing or all of it.
            file.write_all(&serde_json::to_vec(&reason)?)
        });
        self.outbox.finish(&Event::Exited(reason), LAST_EVENTS);
        written
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    #[test]
    fn the_first_reason_stays_in_the_exit_file() {
        let report = ExitReport::new(Outbox::new(EventFd::new(0).unwrap()));
        let file = tempfile::NamedTempFile::new().unwrap();
        report.write_to(file.reopen().unwrap());
        report.finish(ExitReason::TripleFault).unwrap();
        report.finish(ExitReason::Stopped).unwrap();
        let text = std::fs::read(file.path()).unwrap();
        let reason: ExitReason = serde_json::from_slice(&text).unwrap();
        assert_eq!(reason, ExitReason::TripleFault);
    }
}
