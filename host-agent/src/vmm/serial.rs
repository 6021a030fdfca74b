//! The serial port: a 16550 whose output goes to a log of bounded size.
//!
//! A vCPU thread only puts bytes in a bounded buffer; a thread of its own writes
//! them to the file, so a disk that is slow or stands still stops neither the
//! guest nor the main thread.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// Most bytes waiting to be written.
const BUFFER: usize = 1 << 20;
/// Time for a line to be completed before it is written as it is.
const LINE_LIMIT: Duration = Duration::from_millis(500);

/// What Linux says last before it resets after a panic. A panic before the
/// panic notifier's driver is loaded is known by this alone; a guest that
/// forges it only changes the story of its own end.
const PANIC_TEXT: &[u8] = b"Kernel panic - not syncing";
/// SerialOutput kept for finding it, in bytes.
const TAIL: usize = 64 * 1024;

/// Raises the port's interrupt line.
#[derive(Debug)]
pub struct SerialIrq(pub EventFd);

impl Trigger for SerialIrq {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The port as the guest sees it.
pub type SerialPort = Serial<SerialIrq, NoEvents, SerialOutput>;

/// SerialOutput on its way from the port to the log.
#[derive(Debug, Clone)]
pub struct SerialOutput {
    shared: Arc<Shared>,
    started: Instant,
}

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    bytes: VecDeque<u8>,
    /// A line is complete, or much waits.
    due: bool,
    /// Nothing more will come.
    over: bool,
    dropped: u64,
    first_us: Option<u64>,
    /// The end of all output, whether the log took it or not.
    tail: VecDeque<u8>,
}

impl SerialOutput {
    /// SerialOutput of a process that started then.
    pub fn new(started: Instant) -> Self {
        Self {
            shared: Arc::default(),
            started,
        }
    }

    /// Starts the thread that writes to `log`.
    pub fn write_to(&self, mut log: Log) -> io::Result<Writer> {
        let output = self.clone();
        let (written, done) = mpsc::channel();
        std::thread::Builder::new()
            .name("serial".into())
            .spawn(move || {
                while let Some(bytes) = output.next() {
                    let dropped = log.dropped();
                    log.write(&bytes);
                    output.lock().dropped += log.dropped() - dropped;
                }
                drop(written);
            })?;
        Ok(Writer {
            output: self.clone(),
            done,
        })
    }

    /// Waits for bytes to write; `None` when there will be no more.
    fn next(&self) -> Option<Vec<u8>> {
        let changed = &self.shared.changed;
        let empty = |waiting: &mut Waiting| waiting.bytes.is_empty() && !waiting.over;
        let waiting = changed
            .wait_while(self.lock(), empty)
            .unwrap_or_else(PoisonError::into_inner);
        let early = |waiting: &mut Waiting| !waiting.due && !waiting.over;
        let (mut waiting, _) = changed
            .wait_timeout_while(waiting, LINE_LIMIT, early)
            .unwrap_or_else(PoisonError::into_inner);
        waiting.due = false;
        let bytes: Vec<u8> = waiting.bytes.drain(..).collect();
        (!bytes.is_empty()).then_some(bytes)
    }

    /// Bytes lost because the buffer was full, or the files could not take them.
    pub fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    /// When the first byte came, in microseconds after the process started.
    pub fn first_us(&self) -> Option<u64> {
        self.lock().first_us
    }

    /// Whether a panic of the guest's kernel is in the last of the output.
    pub fn shows_panic(&self) -> bool {
        self.lock()
            .tail
            .make_contiguous()
            .windows(PANIC_TEXT.len())
            .any(|text| text == PANIC_TEXT)
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        let waiting = &self.shared.waiting;
        waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for SerialOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut waiting = self.lock();
        if waiting.first_us.is_none() {
            waiting.first_us = u64::try_from(self.started.elapsed().as_micros()).ok();
        }
        waiting.tail.extend(bytes);
        let excess = waiting.tail.len().saturating_sub(TAIL);
        waiting.tail.drain(..excess);
        let begins = waiting.bytes.is_empty();
        let room = BUFFER - waiting.bytes.len();
        let kept = bytes.len().min(room);
        waiting.bytes.extend(&bytes[..kept]);
        waiting.dropped += (bytes.len() - kept) as u64;
        let due = bytes.contains(&b'\n') || waiting.bytes.len() >= BUFFER / 2;
        waiting.due |= due;
        if begins || due {
            self.shared.changed.notify_one();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The thread that writes the log.
#[derive(Debug)]
pub struct Writer {
    output: SerialOutput,
    done: mpsc::Receiver<()>,
}

impl Writer {
    /// Waits, for at most `limit`, until all output is written.
    pub fn finish(self, limit: Duration) {
        self.output.lock().over = true;
        self.output.shared.changed.notify_one();
        // Its end is the answer; there is no other.
        let _ = self.done.recv_timeout(limit);
    }
}

/// The log: a file and the one before it, of at most `max_bytes` each.
#[derive(Debug)]
pub struct Log {
    current: File,
    previous: File,
    size: u64,
    max_bytes: u64,
    dropped: u64,
}

impl Log {
    /// Appends to `current`, which may hold earlier boots.
    pub fn new(mut current: File, previous: File, max_bytes: u64) -> io::Result<Self> {
        let size = current.seek(SeekFrom::End(0))?;
        Ok(Self {
            current,
            previous,
            size,
            max_bytes: max_bytes.max(4096),
            dropped: 0,
        })
    }

    /// Writes `bytes`; what the file does not take is counted.
    pub fn write(&mut self, bytes: &[u8]) {
        if self.try_write(bytes).is_err() {
            self.dropped += bytes.len() as u64;
        }
    }

    /// Bytes lost because the files could not take them.
    pub const fn dropped(&self) -> u64 {
        self.dropped
    }

    fn try_write(&mut self, bytes: &[u8]) -> io::Result<()> {
        for part in bytes.chunks(4096) {
            if self.size + part.len() as u64 > self.max_bytes {
                self.turn_over()?;
            }
            self.current.write_all(part)?;
            self.size += part.len() as u64;
        }
        Ok(())
    }

    fn turn_over(&mut self) -> io::Result<()> {
        self.previous.set_len(0)?;
        self.previous.rewind()?;
        self.current.rewind()?;
        if io::copy(&mut self.current, &mut self.previous).is_err() {
            // No room for the older part: it is lost. Kept where it is, it would
            // be copied again for each line to come.
            self.previous.set_len(0)?;
            self.dropped += self.size;
        }
        self.current.set_len(0)?;
        self.current.rewind()?;
        self.size = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::io::Read;

    #[test]
    fn a_flood_is_bounded_in_memory_and_on_disk_and_the_newest_is_kept() {
        let mut output = SerialOutput::new(Instant::now());
        for _ in 0..300 {
            output.write_all(&[b'x'; 8192]).unwrap();
        }
        assert_eq!(output.next().unwrap().len(), BUFFER);
        assert_eq!(output.dropped(), 300 * 8192 - BUFFER as u64);

        let (current, previous) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let mut reader = current.try_clone().unwrap();
        let mut log = Log::new(current, previous.try_clone().unwrap(), 8192).unwrap();
        for number in 0..5000u32 {
            log.write(format!("line {number}\n").as_bytes());
        }
        let mut text = String::new();
        reader.rewind().unwrap();
        reader.read_to_string(&mut text).unwrap();
        assert!(text.ends_with("line 4999\n") && text.len() <= 8192);
        assert!(previous.metadata().unwrap().len() <= 8192);
    }

    #[test]
    fn a_disk_that_stands_still_holds_up_nobody_and_a_panic_is_seen_all_the_same() {
        // A pipe that nobody reads; a log begins where its file ends.
        let (mut reader, writer) = io::pipe().unwrap();
        let log = Log {
            current: std::os::fd::OwnedFd::from(writer).into(),
            previous: tempfile::tempfile().unwrap(),
            size: 0,
            max_bytes: u64::MAX,
            dropped: 0,
        };
        let mut output = SerialOutput::new(Instant::now());
        let thread = output.write_to(log).unwrap();
        output.write_all(b"first, without an end").unwrap();
        let mut first = [0; 21];
        reader.read_exact(&mut first).unwrap();
        assert_eq!(&first, b"first, without an end");
        for _ in 0..100_000 {
            output.write_all(b"one of very many lines\n").unwrap();
        }
        assert!(output.dropped() > 0 && !output.shows_panic());
        output.write_all(b"Kernel panic - ").unwrap();
        output.write_all(b"not syncing: lost\n").unwrap();
        assert!(output.shows_panic());
        thread.finish(Duration::from_millis(1));

        // The thread ends when everything is written after all.
        let dropped = output.dropped();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let written = first.len() + text.len();
        let said = first.len() + 100_000 * 23 + 33;
        assert_eq!(written as u64 + dropped, said as u64);
    }

    #[test]
    fn a_full_disk_costs_what_it_does_not_take_and_the_newest_is_kept() {
        // Nothing can be written to the one, and the other cannot grow.
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut log = Log::new(full, tempfile::tempfile().unwrap(), 8192).unwrap();
        log.write(b"lost\n");
        assert_eq!(log.dropped(), 5);

        let previous = memfd_create("previous", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        fcntl(&previous, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).unwrap();
        let current = tempfile::tempfile().unwrap();
        let mut reader = current.try_clone().unwrap();
        let mut log = Log::new(current, previous.into(), 8192).unwrap();
        for number in 0..5000u32 {
            log.write(format!("line {number}\n").as_bytes());
        }
        let mut text = String::new();
        reader.rewind().unwrap();
        reader.read_to_string(&mut text).unwrap();
        assert!(text.ends_with("line 4999\n") && text.len() <= 8192);
        assert!(log.dropped() > 0);
    }
}
