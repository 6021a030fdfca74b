//! The thread of a disk: owns the queue while the device is active, and the
//! disk always.

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
use crate::vmm::virtio::{Activation, borrow_event};

/// Most bytes in one system call, so that a reset never waits for more.
const PIECE: u32 = 1 << 20;
/// Longest time that finished requests wait for the interrupt of their batch,
/// but for one more read or write. They wait for no flush, which takes a disk
/// longer than everything else together.
const BATCH_TIME: Duration = Duration::from_micros(200);
/// Time until a write for which the host had no room is tried again, in
/// milliseconds.
const AGAIN_MS: u16 = 1000;

/// What the front asks of the thread.
#[derive(Debug)]
pub enum WorkerCommand {
    /// Work on this queue.
    Activate(Box<Activation>),
    /// Let go of the queue, then answer.
    Reset(Sender<()>),
    /// Flush the disk and end.
    End,
}

/// What the driver gave: from activation to reset.
struct Active {
    queue: CheckedQueue,
    interrupt: Interrupt,
    /// The driver cannot flush, so every write is flushed (virtio 1.2, 5.2.6.2).
    write_through: bool,
    /// When the first request was finished of which the driver has not heard.
    finished: Option<Instant>,
}

/// State of the thread.
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

/// Why a chain was not answered.
enum ServeError {
    /// The driver broke the rules of the ring.
    Violation(QueueError),
    /// The driver resets the device.
    Stopped,
}

impl From<QueueError> for ServeError {
    fn from(error: QueueError) -> Self {
        Self::Violation(error)
    }
}

/// Why a request failed.
enum RequestError {
    /// The driver's fault.
    Refused(Refusal),
    /// The host's fault.
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

    /// Runs until the front says [`WorkerCommand::End`] or is gone.
    pub fn run(mut self, received: &Receiver<WorkerCommand>, wait_set: &WaitSet) {
        let mut active: Option<Active> = None;
        loop {
            match received.try_recv() {
                Ok(WorkerCommand::Activate(activation)) => {
                    active = self.activate(*activation, wait_set);
                }
                Ok(WorkerCommand::Reset(done)) => {
                    Self::let_go(&mut active, wait_set);
                    let _ = done.send(());
                }
                Ok(WorkerCommand::End) | Err(TryRecvError::Disconnected) => break,
                Err(TryRecvError::Empty) => {
                    if let Some(current) = &mut active {
                        match self.serve(current, wait_set) {
                            Ok(()) => {}
                            Err(ServeError::Violation(error)) => {
                                current.interrupt.needs_reset(&error);
                                Self::let_go(&mut active, wait_set);
                            }
                            // Its command is there, or will be in a moment: the
                            // signal for it may have been taken already.
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

    fn activate(&mut self, activation: Activation, wait_set: &WaitSet) -> Option<Active> {
        let active = Active::new(activation);
        match wait_set.control(ControlOperation::Add, active.queue.kick(), KICK) {
            Ok(()) => Some(active),
            Err(error) => {
                self.host_error(&error);
                active.interrupt.needs_reset(&error);
                None
            }
        }
    }

    /// Drops the queue. The kick has other copies in the transport, so closing
    /// ours would not take it off the list.
    fn let_go(active: &mut Option<Active>, wait_set: &WaitSet) {
        if let Some(active) = active.take() {
            let _ = wait_set.control(ControlOperation::Delete, active.queue.kick(), KICK);
        }
    }

    /// Answers all that the driver offers.
    fn serve(&mut self, active: &mut Active, wait_set: &WaitSet) -> Result<(), ServeError> {
        loop {
            active.queue.disable_kicks()?;
            while let Some(chain) = active.queue.pop()? {
                if self.stopped() {
                    return Err(ServeError::Stopped);
                }
                self.answer(active, chain, wait_set)?;
                let since = *active.finished.get_or_insert_with(Instant::now);
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
        active: &mut Active,
        chain: Chain,
        wait_set: &WaitSet,
    ) -> Result<(), ServeError> {
        let mut header = [0; HEADER as usize];
        chain.read_at(active.queue.memory(), 0, &mut header);
        let Some(capacity) = chain.writable_len().checked_sub(1) else {
            // Not even a status can be told.
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
        // The length counts from the first writable byte and claims only what
        // was filled. The status comes behind the data, so only a request whose
        // data is complete can count it.
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
        active: &Active,
        chain: &Chain,
        request: Request,
        wait_set: &WaitSet,
    ) -> Result<u32, RequestError> {
        let memory = active.queue.memory();
        match request {
            Request::Read { offset, len } => {
                let mut slices: Vec<VolatileSlice<'_>> = Vec::new();
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
                let mut slices: Vec<VolatileSlice<'_>> = Vec::new();
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
                let serial = &self.serial[..len as usize];
                chain.write_at(memory, 0, serial);
                Ok(len)
            }
        }
    }

    /// Runs `operation` until the host has room for it, which the main thread
    /// hears of: it stops the guest meanwhile. The driver sees a slow request
    /// and no error; one that is behind it waits too.
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
        self.counters.first_failure.get_or_init(|| error.into());
        if let Some(suppressed) = self.host_errors.allow(Instant::now()) {
            tracing::error!(disk = self.name, %error, suppressed, "host cannot serve the disk");
        }
    }
}

impl Active {
    fn new(mut activation: Activation) -> Self {
        let queue = activation.queues.remove(0);
        Self {
            queue: CheckedQueue::new(queue, activation.memory, activation.features),
            interrupt: activation.interrupt,
            write_through: activation.features & (1 << VIRTIO_BLK_F_FLUSH) == 0,
            finished: None,
        }
    }

    /// Tells the driver of finished requests, if there are any.
    fn signal(&mut self) -> Result<(), QueueError> {
        if self.finished.take().is_some() && self.queue.notify_needed()? {
            self.interrupt.used();
        }
        Ok(())
    }

    /// Whether `request` ends with a flush of the disk.
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

/// What the thread sleeps on: commands, and kicks while the device is active.
pub struct WaitSet {
    epoll: Epoll,
    wake: EventFd,
}

/// Epoll data of the two sources.
const WAKE: u64 = 0;
const KICK: u64 = 1;

impl WaitSet {
    /// Sleeps until `wake` is signalled.
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

    /// Waits for a command for [`AGAIN_MS`], and takes note of it.
    fn wait_before_retry(&self) {
        let mut fds = [PollFd::new(borrow_event(&self.wake), PollFlags::POLLIN)];
        // An interrupted wait is a short one, which is harmless.
        if poll(&mut fds, PollTimeout::from(AGAIN_MS)).is_ok_and(|ready| ready > 0) {
            let _ = self.wake.read();
        }
    }

    /// Waits for a command or a kick, and takes note of both.
    fn wait(&self, kick: Option<&EventFd>) {
        let mut events = [EpollEvent::default(); 2];
        // An interrupted wait is a spurious wake-up, which is harmless.
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
