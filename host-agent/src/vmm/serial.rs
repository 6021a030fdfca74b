//! The serial port: a 16550 whose output goes to a log of bounded size.
//!
//! A vCPU thread only puts bytes in a bounded buffer; the main thread writes
//! them to the file, so a slow disk does not stop the guest.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// Most bytes waiting to be written.
const BUFFER: usize = 1 << 20;

/// Raises the port's interrupt line.
#[derive(Debug)]
pub struct Line(pub EventFd);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The port as the guest sees it.
pub type Port = Serial<Line, NoEvents, Output>;

/// Output on its way from the port to the log.
#[derive(Debug, Clone)]
pub struct Output {
    shared: Arc<Mutex<Waiting>>,
    wake: Arc<EventFd>,
    started: Instant,
}

#[derive(Debug, Default)]
struct Waiting {
    bytes: VecDeque<u8>,
    dropped: u64,
    first_us: Option<u64>,
}

impl Output {
    /// `wake` is signalled when a line is complete or much waits.
    pub fn new(wake: EventFd, started: Instant) -> Self {
        Self {
            shared: Arc::default(),
            wake: Arc::new(wake),
            started,
        }
    }

    /// Takes what waits.
    pub fn take(&self) -> Vec<u8> {
        self.lock().bytes.drain(..).collect()
    }

    /// Bytes lost because the buffer was full.
    pub fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    /// When the first byte came, in microseconds after the process started.
    pub fn first_us(&self) -> Option<u64> {
        self.lock().first_us
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut waiting = self.lock();
        if waiting.first_us.is_none() {
            waiting.first_us = u64::try_from(self.started.elapsed().as_micros()).ok();
        }
        let room = BUFFER - waiting.bytes.len();
        let kept = bytes.len().min(room);
        waiting.bytes.extend(&bytes[..kept]);
        waiting.dropped += (bytes.len() - kept) as u64;
        if bytes.contains(&b'\n') || waiting.bytes.len() >= BUFFER / 2 {
            // A full counter means that the main thread is awake already.
            let _ = self.wake.write(1);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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
        let wake = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut output = Output::new(wake, Instant::now());
        for _ in 0..300 {
            output.write_all(&[b'x'; 8192]).unwrap();
        }
        assert_eq!(output.take().len(), BUFFER);
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
