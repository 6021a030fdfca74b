//! virtio-vsock (virtio 1.2, 5.10): stream sockets between host and guest.
//!
//! [`Vsock`] is the front. Its worker owns the queues and every connection, from
//! packet to host socket. The rest of the process dials with a [`Handle`] and gets
//! [`VsockEvent`]s.

mod connection;
mod connection_table;
mod endpoint;
mod muxer;
mod packet;
mod rings;
mod socket;
mod worker;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::eventfd::EventFd;

use super::queue::EVENT_IDX;
use super::{ActivateError, Activation, Device, Identity, new_event};
use crate::vmm::control::DialOutcome;
use crate::vmm::sandbox::{self, ThreadClass};
use rings::{QUEUES, Rings};
use worker::{Worker, WorkerCommand};

/// Largest size of each queue.
const QUEUE_SIZE: u16 = 256;
/// Longest time that a reset waits for the worker, which never waits for the guest
/// or a disk: a worker that takes longer hangs. It is counted in steps of
/// [`RESET_STEP`], so that a process that was suspended meanwhile gets its time.
const RESET_STEPS: u32 = 300;
const RESET_STEP: Duration = Duration::from_millis(100);

/// An event for the rest of the process.
#[derive(Debug)]
pub enum VsockEvent {
    /// The guest opened a connection to a channel.
    Opened {
        /// Host port.
        port: u32,
        /// Guest port.
        source_port: u32,
        /// The host's end of the connection.
        fd: OwnedFd,
    },
    /// The result of a dial or a probe.
    Dialed {
        /// From the request.
        id: u64,
        /// The guest's answer.
        outcome: DialOutcome,
    },
}

/// Time limits of the connections of a device.
#[derive(Debug, Clone, Copy)]
pub struct TimeLimits {
    /// For the guest to answer a dial.
    pub dial: Duration,
    /// A connection that has ended for the guest is dropped if its socket accepts no byte
    /// of the backlog for this time.
    pub drain: Duration,
    /// A client's connection may give its place to a new client of the same endpoint if it
    /// carried no byte for this time.
    pub idle: Duration,
}

impl TimeLimits {
    /// The limits of every device, except that for dials.
    pub const fn with_dial(dial: Duration) -> Self {
        Self {
            dial,
            drain: Duration::from_secs(30),
            idle: Duration::from_mins(1),
        }
    }
}

/// Receives the events, on the worker; must not block.
pub type EventSink = Box<dyn FnMut(VsockEvent) + Send>;

/// The device.
#[derive(Debug)]
pub struct Vsock {
    identity: Identity,
    handle: Handle,
    /// [`RESET_STEPS`], except in tests.
    reset_steps: u32,
}

/// Counters of the worker.
#[derive(Debug, Default)]
struct VsockCounters {
    connections: AtomicU32,
    refused: AtomicU64,
}

/// Dials into the guest.
#[derive(Debug, Clone)]
pub struct Handle {
    commands: Sender<WorkerCommand>,
    wake: Arc<EventFd>,
    counters: Arc<VsockCounters>,
}

impl Vsock {
    /// The device of the guest `cid`.
    pub fn new(cid: u64, limits: TimeLimits, sink: EventSink) -> io::Result<Self> {
        let wake = Arc::new(new_event()?);
        let (commands, received) = channel();
        let counters = Arc::new(VsockCounters::default());
        let worker = Worker::new(
            cid,
            limits,
            received,
            Arc::clone(&wake),
            Arc::clone(&counters),
            sink,
        )?;
        sandbox::spawn(ThreadClass::Vsock, "vsock", move || worker.run())?;
        Ok(Self {
            identity: Identity {
                id: VIRTIO_ID_VSOCK,
                name: "vsock".into(),
                features: EVENT_IDX,
                queue_sizes: &[QUEUE_SIZE; QUEUES],
                // `guest_cid` (virtio 1.2, 5.10.4).
                config: cid.to_le_bytes().to_vec(),
            },
            handle: Handle {
                commands,
                wake,
                counters,
            },
            reset_steps: RESET_STEPS,
        })
    }

    /// A handle for dialing.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }
}

impl Drop for Vsock {
    /// Ends the worker; remaining handles have no effect.
    fn drop(&mut self) {
        self.handle.send(WorkerCommand::End);
    }
}

impl Handle {
    /// Connects `stream` to `port` of the guest, which gets the bytes `first` before those of
    /// the stream.
    pub fn dial(&self, id: u64, port: u32, first: Vec<u8>, stream: OwnedFd) {
        self.send(WorkerCommand::Dial {
            id,
            port,
            first,
            stream,
        });
    }

    /// Dials `port` of the guest and ends the connection once it is accepted.
    pub fn probe(&self, id: u64, port: u32) {
        self.send(WorkerCommand::Probe { id, port });
    }

    /// Current number of connections.
    pub fn connections(&self) -> u32 {
        self.counters.connections.load(Ordering::Relaxed)
    }

    /// Invalid packets of the guest, which were dropped or answered by a reset,
    /// since the device was created.
    pub fn refused(&self) -> u64 {
        self.counters.refused.load(Ordering::Relaxed)
    }

    fn send(&self, command: WorkerCommand) -> bool {
        let sent = self.commands.send(command).is_ok();
        // Fails only on a full counter: the worker is about to wake up.
        let _ = self.wake.write(1);
        sent
    }
}

impl Device for Vsock {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let rings = Rings::new(activation)?;
        if self.handle.send(WorkerCommand::Activate(Box::new(rings))) {
            Ok(())
        } else {
            Err(ActivateError::ThreadGone)
        }
    }

    /// Panics if the worker hangs, which ends the process with a report. A reset that
    /// returned would let the driver reuse memory that the worker still writes.
    fn reset(&mut self) {
        let (done, wait) = channel();
        if !self.handle.send(WorkerCommand::Reset(done)) {
            // The worker has ended, and dropped the queues before the commands.
            return;
        }
        for _ in 0..self.reset_steps {
            match wait.recv_timeout(RESET_STEP) {
                Err(RecvTimeoutError::Timeout) => {}
                // The worker drops its end after it dropped the queues.
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
            }
        }
        panic!("vsock: reset while the thread hangs and may write to guest memory");
    }
}
