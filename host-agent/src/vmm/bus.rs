//! Which device answers an address. Writes may have an effect on the machine.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::layout;
use super::serial::Port;
use super::virtio::mmio::Transport;

/// `SLP_EN` in the sleep control register (ACPI 6.5, 4.8.3.7).
const SLEEP_ENABLE: u8 = 1 << 5;
/// Sleep type field of the same.
const SLEEP_TYPE_SHIFT: u8 = 2;
/// Sleep type that `_S5_` names.
const POWER_OFF: u8 = 5;
/// The guest's kernel panicked (pvpanic, bit 0); bit 1: crash kernel loaded.
const PANICKED: u8 = 1;

/// What a write does to the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel panicked; it goes on to reset.
    Panicked,
}

/// Everything that answers addresses.
pub struct Bus {
    serial: Mutex<Port>,
    virtio: Vec<Arc<Transport>>,
    panicked: AtomicBool,
}

impl Bus {
    /// A bus with these devices at the addresses of [`layout`].
    pub fn new(serial: Port, virtio: Vec<Arc<Transport>>) -> Self {
        Self {
            serial: Mutex::new(serial),
            virtio,
            panicked: AtomicBool::new(false),
        }
    }

    /// Whether the guest said that its kernel panicked.
    pub fn panicked(&self) -> bool {
        self.panicked.load(Ordering::Acquire)
    }

    /// A read from a port. Nobody there reads as all ones.
    pub fn port_in(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        let [byte] = data else { return };
        match port {
            p if serial_register(p).is_some() => {
                let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
                *byte = serial.read(serial_register(p).unwrap_or_default());
            }
            layout::SLEEP_CONTROL | layout::SLEEP_STATUS | layout::RESET => *byte = 0,
            layout::PANIC => *byte = PANICKED,
            _ => {}
        }
    }

    /// A write to a port.
    pub fn port_out(&self, port: u16, data: &[u8]) -> Action {
        let [byte] = *data else { return Action::None };
        match port {
            p if serial_register(p).is_some() => {
                let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
                // Output is buffered without error; a failed interrupt leaves
                // a driver that polls.
                let _ = serial.write(serial_register(p).unwrap_or_default(), byte);
                Action::None
            }
            layout::SLEEP_CONTROL if byte == SLEEP_ENABLE | (POWER_OFF << SLEEP_TYPE_SHIFT) => {
                Action::PowerOff
            }
            layout::RESET if byte == layout::RESET_VALUE => Action::Reset,
            layout::PANIC if byte & PANICKED != 0 => {
                self.panicked.store(true, Ordering::Release);
                Action::Panicked
            }
            _ => Action::None,
        }
    }

    /// A read from device registers.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.transport(address) {
            Some((transport, offset)) => transport.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A write to device registers.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((transport, offset)) = self.transport(address) {
            transport.write(offset, data);
        }
    }

    /// The virtio devices, in order.
    pub fn virtio(&self) -> &[Arc<Transport>] {
        &self.virtio
    }

    fn transport(&self, address: u64) -> Option<(&Transport, u64)> {
        let offset = address.checked_sub(layout::MMIO_START)?;
        let number = usize::try_from(offset / layout::VIRTIO_STRIDE).ok()?;
        let transport = self.virtio.get(number)?;
        Some((transport, offset % layout::VIRTIO_STRIDE))
    }
}

fn serial_register(port: u16) -> Option<u8> {
    let register = port.checked_sub(layout::SERIAL_PORT)?;
    (register < layout::SERIAL_PORTS).then_some(register as u8)
}
