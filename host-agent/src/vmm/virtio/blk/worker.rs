//! The worker of a disk: it owns the disk, and the queue while the device is
//! active.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
};
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::DiskCounters;
use super::enospc_hold::EnospcHold;
use super::request::{self, Geometry, HEADER, Refusal, Request};
use crate::token_bucket::{LogLimit, VMM_LOG};
use crate::vmm::disk::{Disk, is_full};
use crate::vmm::virtio::interrupt::Interrupt;
use crate::vmm::virtio::queue::{Chain, CheckedQueue, QueueError};
use crate::vmm::virtio::{ActivateError, Activation, borrow_event};

/// Most bytes per system call, which bounds the time that a reset waits.
const PIECE: u32 = 1 << 20;
/// Longest time that a completed request waits for the interrupt of its batch,
/// plus one more read or write. It never waits for a flush, which takes far longer.
const BATCH_TIME: Duration = Duration::from_micros(200);
/// Time between two tries of a write that is held for free space, in
/// milliseconds.
const RETRY_MS: u16 = 1000;

/// A command of the front.
#[derive(Debug)]
pub enum WorkerCommand {
    /// Serve this queue.
    Activate(Box<ActiveDisk>),
    /// Drop the queue, then answer.
    Reset(Sender<()>),
    /// Flush the disk and end.
    End,
}

/// What the worker has from activation to reset.
#[derive(Debug)]
pub struct ActiveDisk {
    queue: CheckedQueue,
    interrupt: Interrupt,
    /// The driver did not accept `VIRTIO_BLK_F_FLUSH`, so every write is flushed
    /// (virtio 1.2, 5.2.6.2).
    write_through: bool,
    /// Completion time of the first request since the last interrupt.
    first_unsignalled: Option<Instant>,
}

/// State of the worker.
pub struct Worker {
    name: String,
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    disk: Box<dyn Disk>,
    geometry: Geometry,
    counters: Arc<DiskCounters>,
    hold: Arc<EnospcHold>,
    stop: Arc<AtomicBool>,
    refusals: LogLimit<Instant>,
    host_errors: LogLimit<Instant>,
}

/// Why the worker stopped to serve the queue.
enum ServeError {
    /// The driver violated the ring protocol.
    Violation(QueueError),
    /// The driver resets the device.
    Stopped,
}

impl From<QueueError> for ServeError {
    fn from(error: QueueError) -> Self {
        Self::Violation(error)
    }
}

/// Why a request was not carried out.
enum RequestError {
    /// The request is invalid.
    Refused(Refusal),
    /// The host failed.
    Host(io::Error),
    /// The driver resets the device.
    Stopped,
}

impl From<io::Error> for RequestError {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

impl Worker {
    pub fn new(
        name: String,
        serial: &str,
        disk: Box<dyn Disk>,
        geometry: Geometry,
        counters: Arc<DiskCounters>,
        hold: Arc<EnospcHold>,
        stop: Arc<AtomicBool>,
    ) -> Self {
        let mut padded = [0; VIRTIO_BLK_ID_BYTES as usize];
        padded[..serial.len()].copy_from_slice(serial.as_bytes());
        Self {
            name,
            serial: padded,
            disk,
            geometry,
            counters,
            hold,
            stop,
            refusals: LogLimit::new(VMM_LOG),
            host_errors: LogLimit::new(VMM_LOG),
        }
    }

    /// Runs until [`WorkerCommand::End`], or until the front is dropped.
    pub fn run(mut self, commands: &Receiver<WorkerCommand>, wait_set: &WaitSet) {
        let mut active: Option<ActiveDisk> = None;
        loop {
            match commands.try_recv() {
                Ok(WorkerCommand::Activate(new)) => active = self.activate(*new, wait_set),
                Ok(WorkerCommand::Reset(done)) => {
                    Self::deactivate(&mut active, wait_set);
                    let _ = done.send(());
                }
                Ok(WorkerCommand::End) | Err(TryRecvError::Disconnected) => break,
                Err(TryRecvError::Empty) => {
                    if let Some(current) = &mut active {
                        match self.serve(current, wait_set) {
                            Ok(()) => {}
                            Err(ServeError::Violation(error)) => {
                                current.interrupt.needs_reset(&error);
                                Self::deactivate(&mut active, wait_set);
                            }
                            // Do not wait: the front sends the command after it
                            // set `stop`, and its wake-up may be consumed already.
                            Err(ServeError::Stopped) => continue,
                        }
                    }
                    wait_set.wait(active.as_ref().map(|active| active.queue.kick()));
                }
            }
        }
        if let Err(error) = self.disk.flush() {
            tracing::error!(disk = self.name, %error, "last flush failed, data may be lost");
            self.host_error(&error);
        }
    }

    fn activate(&mut self, active: ActiveDisk, wait_set: &WaitSet) -> Option<ActiveDisk> {
        match wait_set.control(ControlOperation::Add, active.queue.kick(), KICK) {
            Ok(()) => Some(active),
            Err(error) => {
                self.host_error(&error);
                active.interrupt.needs_reset(&error);
                None
            }
        }
    }

    /// Drops the queue. The transport holds a duplicate of the kick, so closing
    /// our descriptor would not remove it from the epoll set.
    fn deactivate(active: &mut Option<ActiveDisk>, wait_set: &WaitSet) {
        if let Some(active) = active.take() {
            let _ = wait_set.control(ControlOperation::Delete, active.queue.kick(), KICK);
        }
    }

    /// Serves every available chain.
    fn serve(&mut self, active: &mut ActiveDisk, wait_set: &WaitSet) -> Result<(), ServeError> {
        loop {
            active.queue.disable_kicks()?;
            while let Some(chain) = active.queue.pop()? {
                if self.stopped() {
                    return Err(ServeError::Stopped);
                }
                self.answer(active, chain, wait_set)?;
                let since = *active.first_unsignalled.get_or_insert_with(Instant::now);
                if since.elapsed() >= BATCH_TIME {
                    active.signal()?;
                }
            }
            active.signal()?;
            if !active.queue.enable_kicks()? {
                return Ok(());
            }
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn answer(
        &mut self,
        active: &mut ActiveDisk,
        chain: Chain,
        wait_set: &WaitSet,
    ) -> Result<(), ServeError> {
        let mut header = [0; HEADER as usize];
        chain.read_at(active.queue.memory(), 0, &mut header);
        let Some(capacity) = chain.writable_len().checked_sub(1) else {
            // Without a writable byte there is no place for a status.
            self.refused(Refusal::Direction(0));
            active.queue.push_used(chain, 0)?;
            return Ok(());
        };
        let request = request::parse(&header, chain.readable_len(), capacity, self.geometry);
        if request.is_ok_and(|request| active.flushes(request)) {
            active.signal()?;
        }
        let result = match request {
            Ok(request) => self.perform(active, &chain, request, wait_set),
            Err(refusal) => Err(RequestError::Refused(refusal)),
        };
        let (status, written) = match result {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(RequestError::Stopped) => return Err(ServeError::Stopped),
            Err(RequestError::Refused(refusal)) => {
                self.refused(refusal);
                match refusal {
                    Refusal::Type(_) => (VIRTIO_BLK_S_UNSUPP, 0),
                    _ => (VIRTIO_BLK_S_IOERR, 0),
                }
            }
            Err(RequestError::Host(error)) => {
                self.host_error(&error);
                (VIRTIO_BLK_S_IOERR, 0)
            }
        };
        chain.write_at(active.queue.memory(), capacity, &[status as u8]);
        // The used length counts the filled bytes from the first writable one on
        // (virtio 1.2, 2.7.8.2). The status is the last byte, so only a request
        // that filled all data before it counts it.
        let length = if written == capacity {
            capacity + 1
        } else {
            written
        };
        active.queue.push_used(chain, length)?;
        Ok(())
    }

    /// Carries out `request`; returns how many writable bytes it filled.
    fn perform(
        &mut self,
        active: &ActiveDisk,
        chain: &Chain,
        request: Request,
        wait_set: &WaitSet,
    ) -> Result<u32, RequestError> {
        let memory = active.queue.memory();
        let mut slices: Vec<VolatileSlice<'_>> = Vec::new();
        match request {
            Request::Read { offset, len } => {
                for (at, piece) in pieces(len) {
                    if self.stopped() {
                        return Err(RequestError::Stopped);
                    }
                    slices.clear();
                    slices.extend(chain.writable_slices(memory, at, piece as usize));
                    self.disk.read(offset + u64::from(at), &slices)?;
                }
                Ok(len)
            }
            Request::Write { offset, len } => {
                for (at, piece) in pieces(len) {
                    if self.stopped() {
                        return Err(RequestError::Stopped);
                    }
                    slices.clear();
                    slices.extend(chain.readable_slices(memory, HEADER + at, piece as usize));
                    let offset = offset + u64::from(at);
                    self.retry_while_full(wait_set, piece, |disk| disk.write(offset, &slices))?;
                }
                if active.write_through {
                    self.retry_while_full(wait_set, len, Disk::flush)?;
                }
                Ok(0)
            }
            Request::Flush => {
                self.retry_while_full(wait_set, 0, Disk::flush)?;
                Ok(0)
            }
            Request::Serial { len } => {
                chain.write_at(memory, 0, &self.serial[..len as usize]);
                Ok(len)
            }
        }
    }

    /// Repeats `operation` while it fails because the host has no free space.
    /// Meanwhile the main thread pauses the guest, so the driver sees a slow
    /// request and no timeout; later requests wait too.
    fn retry_while_full(
        &mut self,
        wait_set: &WaitSet,
        needed: u32,
        mut operation: impl FnMut(&mut (dyn Disk + 'static)) -> io::Result<()>,
    ) -> Result<(), RequestError> {
        let mut held = false;
        let result = loop {
            match operation(&mut *self.disk) {
                Err(error) if is_full(&error) && !self.hold.fails_when_full() => {
                    self.hold.begin(needed, &error);
                    held = true;
                }
                other => break other.map_err(RequestError::Host),
            }
            wait_set.wait_before_retry();
            if self.stopped() {
                break Err(RequestError::Stopped);
            }
        };
        if held {
            self.hold.end();
        }
        result
    }

    fn refused(&mut self, refusal: Refusal) {
        self.counters.refused.fetch_add(1, Ordering::Relaxed);
        if let Some(suppressed) = self.refusals.allow(Instant::now()) {
            tracing::warn!(disk = self.name, %refusal, suppressed, "request refused");
        }
    }

    fn host_error(&mut self, error: &io::Error) {
        if self.counters.first_failure.set(error.into()).is_ok() {
            self.hold.notify();
        }
        if let Some(suppressed) = self.host_errors.allow(Instant::now()) {
            tracing::error!(disk = self.name, %error, suppressed, "host cannot serve the disk");
        }
    }
}

impl ActiveDisk {
    pub fn new(activation: Activation) -> Result<Self, ActivateError> {
        let write_through = activation.features & (1 << VIRTIO_BLK_F_FLUSH) == 0;
        let interrupt = activation.interrupt.clone();
        let [queue] = activation.checked_queues()?;
        Ok(Self {
            queue,
            interrupt,
            write_through,
            first_unsignalled: None,
        })
    }

    /// Interrupts the driver if requests were completed since the last call.
    fn signal(&mut self) -> Result<(), QueueError> {
        if self.first_unsignalled.take().is_some() && self.queue.notify_needed()? {
            self.interrupt.used();
        }
        Ok(())
    }

    /// Whether `request` flushes the disk.
    fn flushes(&self, request: Request) -> bool {
        match request {
            Request::Flush => true,
            Request::Write { .. } => self.write_through,
            Request::Read { .. } | Request::Serial { .. } => false,
        }
    }
}

/// Offset and length of each piece of `len` bytes.
fn pieces(len: u32) -> impl Iterator<Item = (u32, u32)> {
    (0..len.div_ceil(PIECE)).map(move |index| {
        let at = index * PIECE;
        (at, PIECE.min(len - at))
    })
}

/// The epoll set of the worker: the front's wake-up, and the queue's kick while
/// the device is active.
pub struct WaitSet {
    epoll: Epoll,
    wake: EventFd,
}

/// Epoll data of the two sources.
const WAKE: u64 = 0;
const KICK: u64 = 1;

impl WaitSet {
    /// Contains `wake` alone.
    pub fn new(wake: EventFd) -> io::Result<Self> {
        let wait_set = Self {
            epoll: Epoll::new()?,
            wake,
        };
        wait_set.control(ControlOperation::Add, &wait_set.wake, WAKE)?;
        Ok(wait_set)
    }

    fn control(&self, operation: ControlOperation, event: &EventFd, data: u64) -> io::Result<()> {
        let interest = EpollEvent::new(EventSet::IN, data);
        self.epoll.ctl(operation, event.as_raw_fd(), interest)
    }

    /// Waits for [`RETRY_MS`], or until `wake` is signalled.
    fn wait_before_retry(&self) {
        let mut fds = [PollFd::new(borrow_event(&self.wake), PollFlags::POLLIN)];
        // EINTR only makes the next try earlier.
        if poll(&mut fds, PollTimeout::from(RETRY_MS)).is_ok_and(|ready| ready > 0) {
            let _ = self.wake.read();
        }
    }

    /// Waits for `wake` or `kick`, and clears what was signalled.
    fn wait(&self, kick: Option<&EventFd>) {
        let mut events = [EpollEvent::default(); 2];
        // EINTR is a spurious wake-up.
        let count = self.epoll.wait(-1, &mut events).unwrap_or(0);
        for event in &events[..count] {
            let source = match event.data() {
                WAKE => Some(&self.wake),
                _ => kick,
            };
            if let Some(source) = source {
                let _ = source.read();
            }
        }
    }
}
