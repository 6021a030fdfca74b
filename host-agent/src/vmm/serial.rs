//! The serial port: a 16550 UART whose output goes to a log.
//!
//! A vCPU thread only queues the bytes, so a slow disk stops neither the guest
//! nor the main thread.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::queued_writer::QueuedWriter;

/// The last line that Linux prints before it resets after a panic
/// (`kernel/panic.c`). It is the only sign of a panic before the driver of the
/// panic notifier is loaded. A guest that forges it changes only the reported
/// reason of its own exit.
const PANIC_TEXT: &[u8] = b"Kernel panic - not syncing";
/// Bytes of output that are searched for [`PANIC_TEXT`].
const TAIL: usize = 64 * 1024;

/// Raises the port's interrupt line through an irqfd.
#[derive(Debug)]
pub struct SerialIrq(pub EventFd);

impl Trigger for SerialIrq {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The registers that the guest accesses.
pub type SerialPort = Serial<SerialIrq, NoEvents, SerialOutput>;

/// The port's output. Clones share one log.
#[derive(Debug, Clone)]
pub struct SerialOutput(Arc<OutputState>);

#[derive(Debug)]
struct OutputState {
    log: QueuedWriter,
    process_start: Instant,
    seen: Mutex<Seen>,
}

/// What is known of the output, whether or not the log took it.
#[derive(Debug, Default)]
struct Seen {
    first_us: Option<u64>,
    tail: VecDeque<u8>,
}

impl SerialOutput {
    /// Output of a process that started at `process_start`.
    pub fn new(process_start: Instant, log: QueuedWriter) -> Self {
        Self(Arc::new(OutputState {
            log,
            process_start,
            seen: Mutex::default(),
        }))
    }

    /// Lines lost because the log's disk was too slow or full.
    pub fn dropped(&self) -> u64 {
        self.0.log.dropped()
    }

    /// Time of the first byte, in microseconds since the process started.
    pub fn first_us(&self) -> Option<u64> {
        self.seen().first_us
    }

    /// Whether the end of the output has the kernel's panic message.
    pub fn shows_panic(&self) -> bool {
        self.seen()
            .tail
            .make_contiguous()
            .windows(PANIC_TEXT.len())
            .any(|text| text == PANIC_TEXT)
    }

    /// Closes the log and waits for at most `limit` until it is written.
    pub fn finish(&self, limit: Duration) {
        self.0.log.finish(limit);
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for SerialOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut seen = self.seen();
        if seen.first_us.is_none() {
            seen.first_us = u64::try_from(self.0.process_start.elapsed().as_micros()).ok();
        }
        seen.tail.extend(bytes);
        let excess = seen.tail.len().saturating_sub(TAIL);
        seen.tail.drain(..excess);
        drop(seen);
        self.0.log.append(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_seen_while_the_disk_is_stalled() {
        let (_reader, writer) = io::pipe().unwrap();
        let log = QueuedWriter::start("serial", writer).unwrap();
        let mut output = SerialOutput::new(Instant::now(), log);
        assert_eq!(output.first_us(), None);
        for _ in 0..100_000 {
            output.write_all(b"one of very many lines\n").unwrap();
        }
        assert!(output.first_us().is_some());
        assert!(output.dropped() > 0 && !output.shows_panic());
        output.write_all(b"Kernel panic - ").unwrap();
        output.write_all(b"not syncing: lost\n").unwrap();
        assert!(output.shows_panic());
        assert!(output.seen().tail.len() <= TAIL);
        output.finish(Duration::from_millis(1));
    }
}
