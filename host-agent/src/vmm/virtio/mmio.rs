//! The virtio-mmio transport (virtio 1.2, 4.2): registers of one device.
//!
//! Reads and acknowledgements of the interrupt status, which come with every
//! interrupt, take no lock; all else is rare and takes the transport's. A reset
//! may hold it for as long as the host's disk likes, so it is for processors
//! alone: what the main thread wants to know is in [`Interrupt`].

use std::sync::{Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FAILED as FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::interrupt::Interrupt;
use super::{ActivateError, Activation, ActiveQueue, Device};

/// Register offsets (virtio 1.2, table 4.1).
mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const SHM_LEN_LOW: u64 = 0xb0;
    pub const SHM_BASE_HIGH: u64 = 0xbc;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// Offset of the register that KVM turns into an eventfd.
pub const NOTIFY: u64 = register::QUEUE_NOTIFY;
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;

/// What the driver set up cannot be used.
#[derive(Debug, thiserror::Error)]
enum SetupError {
    #[error("queue {queue} is not ready")]
    NotReady { queue: usize },
    #[error("rings of queue {queue} are not aligned or outside of RAM")]
    Rings { queue: usize },
    #[error("no descriptor for the kick of a queue")]
    Kick(#[source] std::io::Error),
    #[error(transparent)]
    Device(#[from] ActivateError),
}

/// One device behind its registers.
pub struct Transport {
    interrupt: Interrupt,
    state: Mutex<TransportState>,
}

struct TransportState {
    device: Box<dyn Device>,
    memory: GuestMemoryMmap,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueSetup>,
}

/// What the driver said about one queue.
struct QueueSetup {
    max: u16,
    kick: EventFd,
    size: u16,
    ready: bool,
    desc: u64,
    driver: u64,
    device: u64,
}

impl QueueSetup {
    fn reset(&mut self) {
        let Self {
            max,
            kick: _,
            size,
            ready,
            desc,
            driver,
            device,
        } = self;
        *size = *max;
        *ready = false;
        (*desc, *driver, *device) = (0, 0, 0);
    }
}

/// The status bits that may be added to each status (virtio 1.2, 3.1.1), in
/// this order only.
const TRANSITIONS: [(u32, u32); 4] = [
    (0, ACKNOWLEDGE),
    (ACKNOWLEDGE, ACKNOWLEDGE | DRIVER),
    (ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | FEATURES_OK),
    (
        ACKNOWLEDGE | DRIVER | FEATURES_OK,
        ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
    ),
];

impl Transport {
    /// A transport for `device`, after power-on.
    pub fn new(
        device: Box<dyn Device>,
        memory: GuestMemoryMmap,
        interrupt: Interrupt,
    ) -> std::io::Result<Self> {
        let mut queues = Vec::new();
        for &max in device.queue_sizes() {
            queues.push(QueueSetup {
                max,
                kick: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
                size: max,
                ready: false,
                desc: 0,
                driver: 0,
                device: 0,
            });
        }
        Ok(Self {
            interrupt,
            state: Mutex::new(TransportState {
                device,
                memory,
                status: 0,
                device_features_sel: 0,
                driver_features_sel: 0,
                driver_features: 0,
                queue_sel: 0,
                queues,
            }),
        })
    }

    /// The eventfd of each queue, to be signalled by KVM.
    pub fn kicks(&self) -> std::io::Result<Vec<EventFd>> {
        self.lock()
            .queues
            .iter()
            .map(|queue| queue.kick.try_clone())
            .collect()
    }

    /// The device's interrupt.
    pub const fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// The device stops using guest RAM, once no processor is at work on it any
    /// more; one that resets it may wait for a disk.
    pub fn stop(&self) {
        self.lock().device.reset();
    }

    /// A read of `data.len()` bytes at `offset`. What is no register reads 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= register::CONFIG {
            let state = self.lock();
            let config = state.device.config();
            let start = usize::try_from(offset - register::CONFIG).unwrap_or(usize::MAX);
            for (byte, value) in data.iter_mut().zip(config.iter().skip(start)) {
                *byte = *value;
            }
            return;
        }
        if data.len() != 4 || !offset.is_multiple_of(4) {
            return;
        }
        let value = if offset == register::INTERRUPT_STATUS {
            self.interrupt.status()
        } else {
            self.register(offset)
        };
        data.copy_from_slice(&value.to_le_bytes());
    }

    fn register(&self, offset: u64) -> u32 {
        let state = self.lock();
        let features = state.offered();
        let queue = state.queues.get(state.queue_sel as usize);
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => state.device.id(),
            register::VENDOR_ID => 0,
            register::DEVICE_FEATURES => match state.device_features_sel {
                0 => features as u32,
                1 => (features >> 32) as u32,
                _ => 0,
            },
            register::QUEUE_SIZE_MAX => queue.map_or(0, |queue| u32::from(queue.max)),
            register::QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.ready)),
            register::STATUS => {
                let broken = if self.interrupt.is_broken() {
                    NEEDS_RESET
                } else {
                    0
                };
                state.status | broken
            }
            // There is no shared memory: length and base are all ones (4.2.2).
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            // Configuration never changes.
            register::CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    /// A write at `offset`. What is no register, or may not be written now, is
    /// ignored.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(bytes);
        match offset {
            register::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            register::STATUS => self.set_status(value),
            _ => self.lock().write(offset, value),
        }
    }

    fn set_status(&self, value: u32) {
        let mut guard = self.lock();
        let state = &mut *guard;
        if value == 0 {
            state.reset();
            self.interrupt.reset();
            return;
        }
        if value & FAILED != 0 {
            state.status |= FAILED;
            return;
        }
        // A broken device shows NEEDS_RESET, which a driver may write back.
        let value = value & !NEEDS_RESET;
        if !TRANSITIONS.contains(&(state.status, value)) {
            return;
        }
        if value & FEATURES_OK != 0 && state.status & FEATURES_OK == 0 {
            let version_1 = 1 << VIRTIO_F_VERSION_1;
            let unknown = state.driver_features & !state.offered();
            if unknown != 0 || state.driver_features & version_1 == 0 {
                return;
            }
        }
        state.status = value;
        if value & DRIVER_OK != 0
            && let Err(error) = state.activate(&self.interrupt)
        {
            self.interrupt.needs_reset(&error);
        }
    }

    fn lock(&self) -> MutexGuard<'_, TransportState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TransportState {
    fn offered(&self) -> u64 {
        self.device.features() | (1 << VIRTIO_F_VERSION_1)
    }

    fn write(&mut self, offset: u64, value: u32) {
        let negotiating = self.status & (DRIVER | FEATURES_OK) == DRIVER;
        let configuring = self.status & (FEATURES_OK | DRIVER_OK) == FEATURES_OK;
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES if negotiating => match self.driver_features_sel {
                0 => set_half(&mut self.driver_features, false, value),
                1 => set_half(&mut self.driver_features, true, value),
                _ => {}
            },
            register::QUEUE_SEL => self.queue_sel = value,
            register::QUEUE_NOTIFY => {
                if let Some(queue) = self.queues.get(value as usize) {
                    // A full counter means that a kick is pending already.
                    let _ = queue.kick.write(1);
                }
            }
            _ if configuring => {
                if let Some(queue) = self.queues.get_mut(self.queue_sel as usize) {
                    queue.write(offset, value);
                }
            }
            _ => {}
        }
    }

    fn activate(&mut self, interrupt: &Interrupt) -> Result<(), SetupError> {
        let mut queues = Vec::new();
        for (number, setup) in self.queues.iter().enumerate() {
            if !setup.ready {
                return Err(SetupError::NotReady { queue: number });
            }
            let queue = setup
                .build(&self.memory)
                .ok_or(SetupError::Rings { queue: number })?;
            let kick = setup.kick.try_clone().map_err(SetupError::Kick)?;
            queues.push(ActiveQueue { queue, kick });
        }
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.driver_features,
            queues,
            interrupt: interrupt.clone(),
        };
        self.device.activate(activation)?;
        for queue in &self.queues {
            // A driver may have kicked before the device looked.
            let _ = queue.kick.write(1);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.device.reset();
        let Self {
            device: _,
            memory: _,
            status,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            queues,
        } = self;
        *status = 0;
        (*device_features_sel, *driver_features_sel) = (0, 0);
        *driver_features = 0;
        *queue_sel = 0;
        for queue in queues {
            queue.reset();
        }
    }
}

impl QueueSetup {
    fn write(&mut self, offset: u64, value: u32) {
        if offset == register::QUEUE_READY {
            self.ready = value == 1;
            return;
        }
        if self.ready {
            return;
        }
        match offset {
            register::QUEUE_SIZE => {
                if let Ok(size) = u16::try_from(value)
                    && size.is_power_of_two()
                    && size <= self.max
                {
                    self.size = size;
                }
            }
            register::QUEUE_DESC_LOW => set_half(&mut self.desc, false, value),
            register::QUEUE_DESC_HIGH => set_half(&mut self.desc, true, value),
            register::QUEUE_DRIVER_LOW => set_half(&mut self.driver, false, value),
            register::QUEUE_DRIVER_HIGH => set_half(&mut self.driver, true, value),
            register::QUEUE_DEVICE_LOW => set_half(&mut self.device, false, value),
            register::QUEUE_DEVICE_HIGH => set_half(&mut self.device, true, value),
            _ => {}
        }
    }

    fn build(&self, memory: &GuestMemoryMmap) -> Option<Queue> {
        let mut queue = Queue::new(self.max).ok()?;
        queue.set_size(self.size);
        queue
            .try_set_desc_table_address(GuestAddress(self.desc))
            .ok()?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.driver))
            .ok()?;
        queue
            .try_set_used_ring_address(GuestAddress(self.device))
            .ok()?;
        queue.set_ready(true);
        queue.is_valid(memory).then_some(queue)
    }
}

fn set_half(target: &mut u64, high: bool, value: u32) {
    let shift = if high { 32 } else { 0 };
    *target = (*target & !(u64::from(u32::MAX) << shift)) | (u64::from(value) << shift);
}

#[cfg(test)]
mod tests;
