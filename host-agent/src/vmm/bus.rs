//! Routes accesses to ports and device registers to the devices.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::layout;
use super::serial::SerialPort;
use super::virtio::mmio::Transport;

/// `SLP_EN` in the sleep control register (ACPI 6.5, 4.8.3.7).
const SLEEP_ENABLE: u8 = 1 << 5;
/// Position of `SLP_TYP` in the sleep control register (ACPI 6.5, 4.8.3.7).
const SLEEP_TYPE_SHIFT: u8 = 2;
/// `SLP_TYP` of soft off, as the DSDT's `_S5_` declares it.
const POWER_OFF: u8 = 5;
/// pvpanic event bit 0 (QEMU `docs/specs/pvpanic.rst`): the guest's kernel panicked.
const PANICKED: u8 = 1;

/// The effect of a write on the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel panicked, for the first time; a reset follows.
    Panicked,
}

/// The devices.
pub struct Bus {
    serial: Mutex<SerialPort>,
    virtio: Vec<Arc<Transport>>,
    panicked: AtomicBool,
}

impl Bus {
    /// A bus with these devices at their addresses in [`layout`].
    pub fn new(serial: SerialPort, virtio: Vec<Arc<Transport>>) -> Self {
        Self {
            serial: Mutex::new(serial),
            virtio,
            panicked: AtomicBool::new(false),
        }
    }

    /// Whether the guest reported a panic of its kernel.
    pub fn panicked(&self) -> bool {
        self.panicked.load(Ordering::Acquire)
    }

    /// Reads a port. Unassigned ports read as all ones.
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

    /// Writes a port.
    pub fn port_out(&self, port: u16, data: &[u8]) -> Action {
        let [byte] = *data else { return Action::None };
        match port {
            p if serial_register(p).is_some() => {
                let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
                // `SerialOutput` never fails. If the irqfd does, the driver polls.
                let _ = serial.write(serial_register(p).unwrap_or_default(), byte);
                Action::None
            }
            layout::SLEEP_CONTROL if byte == SLEEP_ENABLE | (POWER_OFF << SLEEP_TYPE_SHIFT) => {
                Action::PowerOff
            }
            layout::RESET if byte == layout::RESET_VALUE => Action::Reset,
            layout::PANIC if byte & PANICKED != 0 => {
                // Reported once: a guest can write to the port without end.
                if self.panicked.swap(true, Ordering::AcqRel) {
                    Action::None
                } else {
                    Action::Panicked
                }
            }
            _ => Action::None,
        }
    }

    /// Reads device registers. Unassigned addresses read as all ones.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.transport(address) {
            Some((transport, offset)) => transport.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes device registers.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((transport, offset)) = self.transport(address) {
            transport.write(offset, data);
        }
    }

    /// The virtio devices in the order of their addresses.
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

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;
    use vm_memory::{GuestAddress, GuestMemoryMmap};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::queued_writer::QueuedWriter;
    use crate::vmm::serial::{SerialIrq, SerialOutput};
    use crate::vmm::virtio::Device;
    use crate::vmm::virtio::interrupt::Interrupt;
    use crate::vmm::virtio::rng::Rng;
    use crate::vmm::virtio::vsock::{TimeLimits, Vsock};

    const DEVICES_END: u64 = layout::MMIO_START + 2 * layout::VIRTIO_STRIDE;

    fn event() -> EventFd {
        EventFd::new(EFD_NONBLOCK).unwrap()
    }

    /// A bus with a serial port and two devices.
    fn bus() -> Bus {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let limits = TimeLimits::with_dial(Duration::from_secs(2));
        let vsock = Vsock::new(3, limits, Box::new(|_| {})).unwrap();
        let devices: [Box<dyn Device>; 2] = [Box::new(Rng::new().unwrap()), Box::new(vsock)];
        let virtio = devices.map(|device| {
            let interrupt = Interrupt::new(event(), device.name(), event());
            Arc::new(Transport::new(device, memory.clone(), interrupt).unwrap())
        });
        let log = QueuedWriter::start("serial", std::io::sink()).unwrap();
        let output = SerialOutput::new(Instant::now(), log);
        Bus::new(SerialPort::new(SerialIrq(event()), output), virtio.into())
    }

    #[test]
    fn ports_answer_every_size_and_registers_only_bytes() {
        let bus = bus();
        for port in 0..=u16::MAX {
            for len in 0..=8 {
                let mut data = vec![0x55; len];
                bus.port_in(port, &mut data);
                let known = match port {
                    layout::SLEEP_CONTROL | layout::SLEEP_STATUS | layout::RESET => Some(0),
                    layout::PANIC => Some(PANICKED),
                    _ if serial_register(port).is_some() => data.first().copied(),
                    _ => None,
                };
                let expected = known.filter(|_| len == 1).unwrap_or(0xff);
                assert_eq!(data, vec![expected; len], "port {port:#x}");
                // Values that have an effect, in an access of every size.
                for value in [layout::RESET_VALUE, 0x34, 0xff] {
                    let expected = match (port, value, len) {
                        (layout::SLEEP_CONTROL, 0x34, 1) => Action::PowerOff,
                        (layout::RESET, layout::RESET_VALUE, 1) => Action::Reset,
                        // The first write reports the panic, and no later one.
                        (layout::PANIC, layout::RESET_VALUE, 1) => Action::Panicked,
                        _ => Action::None,
                    };
                    let action = bus.port_out(port, &vec![value; len]);
                    assert_eq!(action, expected, "{value:#x} to port {port:#x}");
                }
            }
            // The panic notifier's port is the first whose writes have an effect.
            assert_eq!(bus.panicked(), port >= layout::PANIC);
        }
    }

    /// An access to a port or to device registers; the last field is true for a read.
    #[derive(Debug, Clone)]
    enum Access {
        Port(u16, Vec<u8>, bool),
        Mmio(u64, Vec<u8>, bool),
    }

    fn access() -> impl Strategy<Value = Access> {
        let port = prop_oneof![
            4 => layout::SERIAL_PORT - 1..=layout::SERIAL_PORT + layout::SERIAL_PORTS,
            2 => layout::SLEEP_CONTROL - 1..=layout::RESET + 1,
            1 => any::<u16>(),
        ];
        let start = layout::MMIO_START;
        let address = prop_oneof![
            6 => (0..2_u64, 0..0x110_u64).prop_map(move |(n, at)| start + n * layout::VIRTIO_STRIDE + at),
            2 => start - 8..DEVICES_END + 8,
            1 => any::<u64>(),
        ];
        let byte = prop_oneof![4 => Just(0_u8), 4 => 0..16_u8, 1 => any::<u8>()];
        let data = || prop::collection::vec(byte.clone(), 0..=8);
        prop_oneof![
            (port, data(), any::<bool>())
                .prop_map(|(port, data, read)| Access::Port(port, data, read)),
            (address, data(), any::<bool>())
                .prop_map(|(address, data, read)| Access::Mmio(address, data, read)),
        ]
    }

    proptest! {
        #[test]
        fn no_access_sequence_panics_and_gaps_read_as_ones(
            accesses in prop::collection::vec(access(), 0..200),
        ) {
            let bus = bus();
            for access in accesses {
                match access {
                    Access::Port(port, mut data, true) => bus.port_in(port, &mut data),
                    Access::Port(port, data, false) => {
                        let action = bus.port_out(port, &data);
                        prop_assert!(action == Action::None || data.len() == 1);
                    }
                    Access::Mmio(address, mut data, true) => {
                        bus.mmio_read(address, &mut data);
                        if !(layout::MMIO_START..DEVICES_END).contains(&address) {
                            prop_assert!(data.iter().all(|byte| *byte == 0xff));
                        }
                    }
                    Access::Mmio(address, data, false) => bus.mmio_write(address, &data),
                }
            }
        }
    }
}
