//! virtio-blk (virtio 1.2, 5.2): one queue, one thread, one disk.

mod enospc_hold;
mod request;
mod worker;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{ActivateError, Activation, Device, queue};
use crate::vmm::disk::{Disk, SECTOR, is_full};
pub use enospc_hold::{EnospcHold, Shortage};
use request::Geometry;
use worker::{WaitSet, Worker, WorkerCommand};

/// Entries of the queue.
pub const QUEUE_SIZE: u16 = 256;
/// Data buffers of a request: what a chain can have beside header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// Why a disk cannot become a device.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The serial number is not printable ASCII or too long.
    #[error("disk serial {0:?}: at most {VIRTIO_BLK_ID_BYTES} printable ASCII characters")]
    Serial(String),
    /// The host could not provide a thread or an eventfd.
    #[error("cannot start the thread of a disk")]
    Host(#[from] io::Error),
}

/// What went wrong with a disk, since the device was made.
#[derive(Debug, Default)]
pub struct DiskCounters {
    /// Requests answered with an error because of what the driver asked.
    pub refused: AtomicU64,
    /// The first failure of the host: the one that explains the others.
    pub first_failure: OnceLock<HostFailure>,
}

/// A failure of the host's own file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFailure {
    /// The system's words.
    pub error: String,
    /// Whether there was no room for a write.
    pub full: bool,
}

impl From<&io::Error> for HostFailure {
    fn from(error: &io::Error) -> Self {
        Self {
            error: error.to_string(),
            full: is_full(error),
        }
    }
}

/// The front of a disk; its thread ends when this is dropped.
#[derive(Debug)]
pub struct Block {
    name: String,
    features: u64,
    config: Vec<u8>,
    counters: Arc<DiskCounters>,
    hold: Arc<EnospcHold>,
    commands: Sender<WorkerCommand>,
    wake: EventFd,
    /// Ends a long request between two pieces when the driver resets.
    stop: Arc<AtomicBool>,
    active: bool,
    thread: Option<JoinHandle<()>>,
}

impl Block {
    /// Makes a device of `disk`, called `blk-<index>`, and starts its thread.
    /// `serial` is what the guest finds the disk by. `changed` is signalled when
    /// the disk begins or ends to wait for room.
    pub fn new(
        index: usize,
        serial: &str,
        disk: Box<dyn Disk>,
        changed: EventFd,
    ) -> Result<Self, BlockError> {
        let printable = serial.bytes().all(|byte| byte.is_ascii_graphic());
        if serial.len() > VIRTIO_BLK_ID_BYTES as usize || !printable {
            return Err(BlockError::Serial(serial.to_owned()));
        }
        let geometry = Geometry {
            size: disk.size(),
            read_only: disk.read_only(),
        };
        let name = format!("blk-{index}");
        let counters = Arc::new(DiskCounters::default());
        let stop = Arc::new(AtomicBool::new(false));
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let hold = Arc::new(EnospcHold::new(changed, wake.try_clone()?));
        let (commands, received) = mpsc::channel();
        let worker = Worker::new(
            name.clone(),
            serial,
            disk,
            geometry,
            Arc::clone(&counters),
            Arc::clone(&hold),
            Arc::clone(&stop),
        );
        let wait_set = WaitSet::new(wake.try_clone()?)?;
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || worker.run(&received, &wait_set))?;
        Ok(Self {
            name,
            features: features(geometry),
            config: config(geometry),
            counters,
            hold,
            commands,
            wake,
            stop,
            active: false,
            thread: Some(thread),
        })
    }

    /// What the disk has done so far.
    pub fn counters(&self) -> Arc<DiskCounters> {
        Arc::clone(&self.counters)
    }

    /// Whether the disk waits for room on the host.
    pub fn enospc_hold(&self) -> Arc<EnospcHold> {
        Arc::clone(&self.hold)
    }

    fn command(&self, command: WorkerCommand) -> Result<(), ActivateError> {
        self.commands
            .send(command)
            .map_err(|_| ActivateError::ThreadGone)?;
        // Only full when the thread is about to wake up anyway.
        let _ = self.wake.write(1);
        Ok(())
    }
}

fn features(disk: Geometry) -> u64 {
    let read_only = if disk.read_only {
        1 << VIRTIO_BLK_F_RO
    } else {
        0
    };
    queue::EVENT_IDX
        | read_only
        | 1 << VIRTIO_BLK_F_SEG_MAX
        | 1 << VIRTIO_BLK_F_BLK_SIZE
        | 1 << VIRTIO_BLK_F_FLUSH
}

/// `struct virtio_blk_config` (virtio 1.2, 5.2.4) up to `blk_size`; the fields
/// behind it belong to features that are not offered.
fn config(disk: Geometry) -> Vec<u8> {
    let mut config = Vec::with_capacity(24);
    config.extend_from_slice(&(disk.size / SECTOR).to_le_bytes()); // capacity
    config.extend_from_slice(&0_u32.to_le_bytes()); // size_max: not offered
    config.extend_from_slice(&SEG_MAX.to_le_bytes());
    config.extend_from_slice(&[0; 4]); // geometry: not offered
    config.extend_from_slice(&(SECTOR as u32).to_le_bytes()); // blk_size
    config
}

impl Device for Block {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if activation.queues.len() != 1 {
            return Err(ActivateError::QueueCount {
                expected: 1,
                actual: activation.queues.len(),
            });
        }
        self.stop.store(false, Ordering::Release);
        self.command(WorkerCommand::Activate(Box::new(activation)))?;
        self.active = true;
        Ok(())
    }

    /// Waits for the system call in progress, which may write to guest memory
    /// until it returns: one piece of at most 1 MiB, or a flush, which takes as
    /// long as the host's disk does. A write that is held for want of room is
    /// dropped.
    fn reset(&mut self) {
        if !self.active {
            return;
        }
        self.active = false;
        self.stop.store(true, Ordering::Release);
        let (done, wait) = mpsc::channel();
        if self.command(WorkerCommand::Reset(done)).is_ok() {
            // An error means that the thread is gone, and with it the queue.
            let _ = wait.recv();
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = self.command(WorkerCommand::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests;
