//! virtio-vsock (virtio 1.2, 5.10): stream sockets between host and guest.
//!
//! [`Vsock`] is the front on the transport's side. A thread owns the queues
//! and every connection, from packet to host socket; [`Handle`] asks it to
//! dial, and what it does for the rest of the process are [`VsockEvent`]s.

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
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::eventfd::EventFd;

use super::queue::EVENT_IDX;
use super::{ActivateError, Activation, Device};
use crate::vmm::control::DialOutcome;
use rings::QUEUES;
use worker::{Worker, WorkerCommand};

/// Largest size of each queue.
const QUEUE_SIZE: u16 = 256;
/// Time for the thread to let go of the queues. It never waits for the guest,
/// so that this only ends a process whose thread is broken.
const RESET_LIMIT: Duration = Duration::from_secs(5);

/// What happens outside of the device.
#[derive(Debug)]
pub enum VsockEvent {
    /// The guest dialed a channel.
    Opened {
        /// Host port.
        port: u32,
        /// Guest port.
        source_port: u32,
        /// The host's end.
        fd: OwnedFd,
    },
    /// Answer to a dial or a probe.
    Dialed {
        /// From the request.
        id: u64,
        /// What the guest said.
        outcome: DialOutcome,
    },
}

/// Takes events, on the device's thread; must not wait.
pub type EventSink = Box<dyn FnMut(VsockEvent) + Send>;

/// The device.
#[derive(Debug)]
pub struct Vsock {
    config: [u8; 8],
    handle: Handle,
}

/// What the device's thread tells of itself.
#[derive(Debug, Default)]
struct VsockCounters {
    connections: AtomicU32,
    refused: AtomicU64,
}

/// Asks the device to dial.
#[derive(Debug, Clone)]
pub struct Handle {
    commands: Sender<WorkerCommand>,
    wake: Arc<EventFd>,
    counters: Arc<VsockCounters>,
}

impl Vsock {
    /// A device for the guest `cid`, whose thread waits for its driver. The guest
    /// must answer a dial within `dial_limit`.
    pub fn new(cid: u64, dial_limit: Duration, sink: EventSink) -> io::Result<Self> {
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let (commands, received) = channel();
        let counters = Arc::new(VsockCounters::default());
        let worker = Worker::new(
            cid,
            dial_limit,
            received,
            Arc::clone(&wake),
            Arc::clone(&counters),
            sink,
        )?;
        std::thread::Builder::new()
            .name("vsock".into())
            .spawn(move || worker.run())?;
        Ok(Self {
            config: cid.to_le_bytes(),
            handle: Handle {
                commands,
                wake,
                counters,
            },
        })
    }

    /// A handle for dialing.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }
}

impl Drop for Vsock {
    /// Ends the thread; handles that are left dial in vain.
    fn drop(&mut self) {
        self.handle.send(WorkerCommand::End);
    }
}

impl Handle {
    /// Dials `port` of the guest and joins it with `stream`.
    pub fn dial(&self, id: u64, port: u32, stream: OwnedFd) {
        self.send(WorkerCommand::Dial { id, port, stream });
    }

    /// Dials `port` of the guest and drops the connection.
    pub fn probe(&self, id: u64, port: u32) {
        self.send(WorkerCommand::Probe { id, port });
    }

    /// Connections held now.
    pub fn connections(&self) -> u32 {
        self.counters.connections.load(Ordering::Relaxed)
    }

    /// Packets of the guest that were dropped or answered by a reset because
    /// of what they said, since the device was made.
    pub fn refused(&self) -> u64 {
        self.counters.refused.load(Ordering::Relaxed)
    }

    fn send(&self, command: WorkerCommand) -> bool {
        let sent = self.commands.send(command).is_ok();
        // A full counter means that the thread is awake already.
        let _ = self.wake.write(1);
        sent
    }
}

impl Device for Vsock {
    fn id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn name(&self) -> &'static str {
        "vsock"
    }

    fn features(&self) -> u64 {
        EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if activation.queues.len() != QUEUES {
            return Err(ActivateError::QueueCount {
                expected: QUEUES,
                actual: activation.queues.len(),
            });
        }
        if self
            .handle
            .send(WorkerCommand::Activate(Box::new(activation)))
        {
            Ok(())
        } else {
            Err(ActivateError::ThreadGone)
        }
    }

    fn reset(&mut self) {
        let (done, wait) = channel();
        if self.handle.send(WorkerCommand::Reset(done)) {
            // The thread drops its end only after it let go of the queues.
            let _ = wait.recv_timeout(RESET_LIMIT);
        }
    }
}
