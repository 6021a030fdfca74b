//! virtio-blk (virtio 1.2, 5.2): one queue, one worker, one disk.

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
use vmm_sys_util::eventfd::EventFd;

use super::{ActivateError, Activation, Device, Identity, new_event, queue};
use crate::vmm::disk::{Disk, SECTOR, is_full};
use crate::vmm::sandbox::{self, ThreadClass};
pub use enospc_hold::{EnospcHold, Shortage};
use request::Geometry;
use worker::{ActiveDisk, WaitSet, Worker, WorkerCommand};

/// Entries of the queue.
pub const QUEUE_SIZE: u16 = 256;
/// Most data buffers of a request: header and status take one descriptor each.
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

/// Failures of a disk since the device was created.
#[derive(Debug, Default)]
pub struct DiskCounters {
    /// Requests answered with an error because they were invalid.
    pub refused: AtomicU64,
    /// The first failure of the host, which usually explains the later ones.
    pub first_failure: OnceLock<HostFailure>,
}

/// A failed operation on the file behind a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFailure {
    /// The error text of the system.
    pub error: String,
    /// Whether the host had no free space for a write.
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

/// The front of a disk. Dropping it ends the worker.
#[derive(Debug)]
pub struct Block {
    identity: Identity,
    counters: Arc<DiskCounters>,
    hold: Arc<EnospcHold>,
    commands: Sender<WorkerCommand>,
    wake: EventFd,
    /// Interrupts the request in progress between two pieces.
    stop: Arc<AtomicBool>,
    active: bool,
    thread: Option<JoinHandle<()>>,
}

impl Block {
    /// Creates the device `blk-<index>` and starts its worker. The guest finds
    /// the disk by `serial`. `changed` is signalled when a hold for free space
    /// begins or ends.
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
        let wake = new_event()?;
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
        let thread = sandbox::spawn(ThreadClass::Block, &name, move || {
            worker.run(&received, &wait_set);
        })?;
        Ok(Self {
            identity: identity(name, geometry),
            counters,
            hold,
            commands,
            wake,
            stop,
            active: false,
            thread: Some(thread),
        })
    }

    /// Failures of the disk so far.
    pub fn counters(&self) -> Arc<DiskCounters> {
        Arc::clone(&self.counters)
    }

    /// Whether a write is held for free space on the host.
    pub fn enospc_hold(&self) -> Arc<EnospcHold> {
        Arc::clone(&self.hold)
    }

    fn command(&self, command: WorkerCommand) -> Result<(), ActivateError> {
        self.commands
            .send(command)
            .map_err(|_| ActivateError::ThreadGone)?;
        // Fails only on a full counter: the worker is about to wake up.
        let _ = self.wake.write(1);
        Ok(())
    }
}

fn identity(name: String, disk: Geometry) -> Identity {
    let read_only = u64::from(disk.read_only) << VIRTIO_BLK_F_RO;
    // `struct virtio_blk_config` (virtio 1.2, 5.2.4) up to `blk_size`; the later
    // fields belong to features that are not offered.
    let mut config = Vec::with_capacity(24);
    config.extend_from_slice(&(disk.size / SECTOR).to_le_bytes()); // capacity
    config.extend_from_slice(&0_u32.to_le_bytes()); // size_max: not offered
    config.extend_from_slice(&SEG_MAX.to_le_bytes());
    config.extend_from_slice(&[0; 4]); // geometry: not offered
    config.extend_from_slice(&(SECTOR as u32).to_le_bytes()); // blk_size
    Identity {
        id: VIRTIO_ID_BLOCK,
        name,
        features: queue::EVENT_IDX
            | read_only
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH,
        queue_sizes: &[QUEUE_SIZE],
        config,
    }
}

impl Device for Block {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let active = ActiveDisk::new(activation)?;
        self.stop.store(false, Ordering::Release);
        self.command(WorkerCommand::Activate(Box::new(active)))?;
        self.active = true;
        Ok(())
    }

    /// Waits for the system call in progress, because the kernel may write to
    /// guest memory until it returns: a transfer of at most 1 MiB, or an
    /// `fdatasync`, whose time depends on the host's disk. A held write is
    /// dropped.
    fn reset(&mut self) {
        if !self.active {
            return;
        }
        self.active = false;
        self.stop.store(true, Ordering::Release);
        let (done, wait) = mpsc::channel();
        if self.command(WorkerCommand::Reset(done)).is_ok() {
            // An error means that the worker is gone, and with it the queue.
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
