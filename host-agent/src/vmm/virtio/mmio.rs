//! The virtio-mmio transport (virtio 1.2, 4.2): registers of one device.
//!
//! Reading and acknowledging the interrupt status takes no lock, because a driver
//! does both on every interrupt; every other access takes the transport's lock. A
//! reset holds that lock while the worker waits for a disk of the host, so only
//! vCPU threads and [`Transport::stop`] take it. The main thread reads [`Interrupt`].

use std::io;
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
use super::{ActivateError, Activation, ActiveQueue, Device, new_event};

/// Register offsets (virtio 1.2, 4.2.2, table 4.1).
mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
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
    pub const CONFIG: u64 = 0x100;
}

/// Offset of the register `QueueNotify`, for its ioeventfd.
pub const NOTIFY: u64 = register::QUEUE_NOTIFY;
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;

/// Why the driver's setup cannot be used.
#[derive(Debug, thiserror::Error)]
enum SetupError {
    #[error("queue {queue} is not ready")]
    NotReady { queue: usize },
    #[error("rings of queue {queue} are not aligned or outside of RAM")]
    Rings { queue: usize },
    #[error("cannot duplicate the eventfd of a queue")]
    Kick(#[source] io::Error),
    #[error(transparent)]
    Device(#[from] ActivateError),
}

/// The transport of one device.
pub struct Transport {
    interrupt: Interrupt,
    state: Mutex<TransportState>,
}

struct TransportState {
    device: Box<dyn Device>,
    memory: GuestMemoryMmap,
    registers: Registers,
    queues: Vec<QueueSetup>,
}

/// The registers that the driver writes and a reset clears.
#[derive(Default)]
struct Registers {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
}

/// One queue of the device.
struct QueueSetup {
    max: u16,
    kick: EventFd,
    registers: QueueRegisters,
}

/// What the driver wrote for one queue.
struct QueueRegisters {
    size: u16,
    ready: bool,
    desc: u64,
    driver: u64,
    device: u64,
}

impl QueueRegisters {
    const fn new(size: u16) -> Self {
        Self {
            size,
            ready: false,
            desc: 0,
            driver: 0,
            device: 0,
        }
    }
}

/// The valid transitions of the device status (virtio 1.2, 3.1.1), in this
/// order only.
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
    /// The transport of `device`, in the state after power-on.
    pub fn new(
        device: Box<dyn Device>,
        memory: GuestMemoryMmap,
        interrupt: Interrupt,
    ) -> io::Result<Self> {
        let mut queues = Vec::new();
        for &max in device.identity().queue_sizes {
            queues.push(QueueSetup {
                max,
                kick: new_event()?,
                registers: QueueRegisters::new(max),
            });
        }
        Ok(Self {
            interrupt,
            state: Mutex::new(TransportState {
                device,
                memory,
                registers: Registers::default(),
                queues,
            }),
        })
    }

    /// The eventfd of each queue, for its ioeventfd.
    pub fn kicks(&self) -> io::Result<Vec<EventFd>> {
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

    /// Resets the device, so that it stops using guest RAM. A vCPU thread that
    /// resets the device holds the lock, so this may wait for a disk twice.
    pub fn stop(&self) {
        self.lock().device.reset();
    }

    /// Reads `data.len()` bytes at `offset`. Unassigned offsets read as 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= register::CONFIG {
            let state = self.lock();
            let config = &state.device.identity().config;
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
        let queue = state.queues.get(state.registers.queue_sel as usize);
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => state.device.identity().id,
            register::DEVICE_FEATURES => match state.registers.device_features_sel {
                0 => features as u32,
                1 => (features >> 32) as u32,
                _ => 0,
            },
            register::QUEUE_SIZE_MAX => queue.map_or(0, |queue| u32::from(queue.max)),
            register::QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.registers.ready)),
            register::STATUS if self.interrupt.is_broken() => state.registers.status | NEEDS_RESET,
            register::STATUS => state.registers.status,
            // Without shared memory, length and base read as all ones (4.2.2).
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            // VendorID is 0, and so is ConfigGeneration: the configuration is constant.
            _ => 0,
        }
    }

    /// Writes at `offset`. Writes to unassigned or read-only registers, or in
    /// the wrong state, are ignored.
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
        let mut state = self.lock();
        if value == 0 {
            state.reset();
            self.interrupt.reset();
            return;
        }
        let old = state.registers.status;
        if value & FAILED != 0 {
            state.registers.status |= FAILED;
            return;
        }
        // A driver may write back NEEDS_RESET, which it read.
        let value = value & !NEEDS_RESET;
        if !TRANSITIONS.contains(&(old, value)) {
            return;
        }
        if value & FEATURES_OK != 0 && old & FEATURES_OK == 0 {
            let accepted = state.registers.driver_features;
            if accepted & !state.offered() != 0 || accepted & (1 << VIRTIO_F_VERSION_1) == 0 {
                return;
            }
        }
        state.registers.status = value;
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
        self.device.identity().features | (1 << VIRTIO_F_VERSION_1)
    }

    fn write(&mut self, offset: u64, value: u32) {
        let registers = &mut self.registers;
        let negotiating = registers.status & (DRIVER | FEATURES_OK) == DRIVER;
        let configuring = registers.status & (FEATURES_OK | DRIVER_OK) == FEATURES_OK;
        match offset {
            register::DEVICE_FEATURES_SEL => registers.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
            register::DRIVER_FEATURES if negotiating => match registers.driver_features_sel {
                0 => set_half(&mut registers.driver_features, false, value),
                1 => set_half(&mut registers.driver_features, true, value),
                _ => {}
            },
            register::QUEUE_SEL => registers.queue_sel = value,
            register::QUEUE_NOTIFY => {
                if let Some(queue) = self.queues.get(value as usize) {
                    // The write fails only on a full counter: a kick is pending.
                    let _ = queue.kick.write(1);
                }
            }
            _ if configuring => {
                if let Some(queue) = self.queues.get_mut(registers.queue_sel as usize) {
                    queue.write(offset, value);
                }
            }
            _ => {}
        }
    }

    fn activate(&mut self, interrupt: &Interrupt) -> Result<(), SetupError> {
        let mut queues = Vec::new();
        for (number, setup) in self.queues.iter().enumerate() {
            if !setup.registers.ready {
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
            features: self.registers.driver_features,
            queues,
            interrupt: interrupt.clone(),
        };
        self.device.activate(activation)?;
        for queue in &self.queues {
            // The driver may have kicked before the worker watched the eventfd.
            let _ = queue.kick.write(1);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.device.reset();
        self.registers = Registers::default();
        for queue in &mut self.queues {
            queue.registers = QueueRegisters::new(queue.max);
        }
    }
}

impl QueueSetup {
    fn write(&mut self, offset: u64, value: u32) {
        let registers = &mut self.registers;
        if offset == register::QUEUE_READY {
            registers.ready = value == 1;
            return;
        }
        if registers.ready {
            return;
        }
        match offset {
            register::QUEUE_SIZE => {
                if let Ok(size) = u16::try_from(value)
                    && size.is_power_of_two()
                    && size <= self.max
                {
                    registers.size = size;
                }
            }
            register::QUEUE_DESC_LOW => set_half(&mut registers.desc, false, value),
            register::QUEUE_DESC_HIGH => set_half(&mut registers.desc, true, value),
            register::QUEUE_DRIVER_LOW => set_half(&mut registers.driver, false, value),
            register::QUEUE_DRIVER_HIGH => set_half(&mut registers.driver, true, value),
            register::QUEUE_DEVICE_LOW => set_half(&mut registers.device, false, value),
            register::QUEUE_DEVICE_HIGH => set_half(&mut registers.device, true, value),
            _ => {}
        }
    }

    fn build(&self, memory: &GuestMemoryMmap) -> Option<Queue> {
        let QueueRegisters {
            size,
            desc,
            driver,
            device,
            ..
        } = self.registers;
        let mut queue = Queue::new(self.max).ok()?;
        queue.set_size(size);
        queue.try_set_desc_table_address(GuestAddress(desc)).ok()?;
        queue
            .try_set_avail_ring_address(GuestAddress(driver))
            .ok()?;
        queue.try_set_used_ring_address(GuestAddress(device)).ok()?;
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
