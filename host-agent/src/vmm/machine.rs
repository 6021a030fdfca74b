//! Builds the virtual machine of a guest from its parts, and stops it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use vm_memory::GuestMemoryMmap;
use vmbus::channel::GUEST_CID;
use vmm_sys_util::eventfd::EventFd;

use super::boot::{self, BootError};
use super::bus::Bus;
use super::cpu::regs::{self, RegsError};
use super::disk::{self, Backing};
use super::memory::{self, MemoryError};
use super::outbox::Outbox;
use super::serial::{SerialIrq, SerialOutput, SerialPort};
use super::spec::{DiskBacking, DiskSpec, FileIndex, GuestSpec, MAX_VCPUS};
use super::vcpu::{KickTimeout, VcpuReport, Vcpus};
use super::virtio::Device;
use super::virtio::blk::{Block, DiskCounters, EnospcHold};
use super::virtio::interrupt::Interrupt;
use super::virtio::mmio::{NOTIFY, Transport};
use super::virtio::rng::Rng;
use super::virtio::vsock::{self, TimeLimits, Vsock};
use super::vm::{Vm, VmError};
use super::{acpi, guest_events, layout};

/// Least guest RAM in MiB: room for kernel, initrd and a minimal user space.
const LEAST_MEMORY: u32 = 64;

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The specification is invalid.
    #[error("guest specification: {0}")]
    Spec(String),
    /// A file of the specification was not passed, or is used twice.
    #[error("file {0} of the guest specification was not passed")]
    NoFile(u8),
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Boot structures or registers.
    #[error("boot state")]
    Regs(#[from] RegsError),
    /// Kernel and initrd.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A disk cannot be opened.
    #[error("disk {serial}")]
    Disk {
        /// Its serial number.
        serial: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The host lacks descriptors or threads.
    #[error("host resource: {what}")]
    Host {
        /// The resource.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// The files that were passed with a specification; each is used once.
#[derive(Debug)]
pub struct Files(Vec<Option<OwnedFd>>);

impl Files {
    /// The files in the order in which they were passed.
    pub fn new(files: Vec<OwnedFd>) -> Self {
        Self(files.into_iter().map(Some).collect())
    }

    /// Takes the file `index`.
    pub fn take(&mut self, index: FileIndex) -> Result<OwnedFd, MachineError> {
        self.0
            .get_mut(usize::from(index.0))
            .and_then(Option::take)
            .ok_or(MachineError::NoFile(index.0))
    }
}

/// Counters and state of a disk.
#[derive(Debug, Clone)]
pub struct DiskState {
    /// Its serial number.
    pub serial: String,
    /// Its counters.
    pub counters: Arc<DiskCounters>,
    /// Whether it holds a request because the host's disk is full.
    pub hold: Arc<EnospcHold>,
}

/// A machine.
pub struct Machine {
    vcpus: Vcpus,
    disks: Vec<DiskState>,
    bus: Arc<Bus>,
    serial: SerialOutput,
    vsock: vsock::Handle,
    max_file_size: u64,
    _vm: Vm,
    _memory: GuestMemoryMmap,
}

impl Machine {
    /// Builds the guest of `spec` and starts its threads. The vCPUs wait for
    /// [`Vcpus::resume`].
    pub fn build(
        spec: &GuestSpec,
        mut files: Files,
        outbox: &Outbox,
        wake: &EventFd,
        reports: mpsc::Sender<VcpuReport>,
        serial: SerialOutput,
    ) -> Result<Self, MachineError> {
        check(spec)?;
        let host = |what| move |source| MachineError::Host { what, source };

        let memory = memory::allocate(spec.memory_mib)?;
        let vm = Vm::new(files.take(spec.kvm)?, &memory)?;

        let irq = new_eventfd().map_err(host("eventfd"))?;
        vm.register_irqfd(&irq, layout::SERIAL_GSI)?;
        let port = SerialPort::new(SerialIrq(irq), serial.clone());

        let mut devices: Vec<Box<dyn Device>> = Vec::new();
        let mut disks = Vec::new();
        let mut max_file_size = 0;
        for (index, disk) in spec.disks.iter().enumerate() {
            let changed = wake.try_clone().map_err(host("eventfd"))?;
            let (block, size) = open_disk(index, disk, &mut files, changed)?;
            max_file_size = max_file_size.max(size);
            disks.push(DiskState {
                serial: disk.serial.clone(),
                counters: block.counters(),
                hold: block.enospc_hold(),
            });
            devices.push(Box::new(block));
        }
        let limits = TimeLimits::with_dial(Duration::from_millis(spec.dial_limit_ms.into()));
        let sink = guest_events::vsock_sink(outbox.clone());
        let vsock = Vsock::new(u64::from(GUEST_CID), limits, sink).map_err(host("vsock thread"))?;
        let vsock_handle = vsock.handle();
        devices.push(Box::new(vsock));
        devices.push(Box::new(Rng::new().map_err(host("entropy thread"))?));
        let mut transports = Vec::new();
        for (number, device) in devices.into_iter().enumerate() {
            let transport = plug(&vm, &memory, number, device, wake)?;
            transports.push(Arc::new(transport));
        }
        let bus = Arc::new(Bus::new(port, transports));

        let tables = acpi::tables(spec.vcpus, bus.virtio().len());
        let mut kernel = File::from(files.take(spec.kernel)?);
        let mut initrd = File::from(files.take(spec.initrd)?);
        let entry = boot::load(&memory, &mut kernel, &mut initrd, &spec.cmdline, &tables)?;
        regs::write_tables(&memory)?;

        let vcpus = (0..spec.vcpus)
            .map(|id| vm.create_vcpu(id, spec.vcpus, entry))
            .collect::<Result<Vec<_>, _>>()?;
        let vcpus = Vcpus::start(vcpus, &bus, &reports, wake).map_err(host("vCPU threads"))?;
        Ok(Self {
            vcpus,
            disks,
            bus,
            serial,
            vsock: vsock_handle,
            max_file_size,
            _vm: vm,
            _memory: memory,
        })
    }

    /// The vCPUs.
    pub const fn vcpus(&self) -> &Vcpus {
        &self.vcpus
    }

    /// The bus.
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// The disks.
    pub fn disks(&self) -> &[DiskState] {
        &self.disks
    }

    /// The serial port's output.
    pub const fn serial(&self) -> &SerialOutput {
        &self.serial
    }

    /// Largest size in bytes that a file of a disk can reach.
    pub const fn max_file_size(&self) -> u64 {
        self.max_file_size
    }

    /// The vsock device, to dial into the guest.
    pub const fn vsock(&self) -> &vsock::Handle {
        &self.vsock
    }

    /// Stops the vCPUs and then the devices, which complete their requests and
    /// flush their disks. Blocks while a disk is slow, so do not call it on the main
    /// thread.
    pub fn stop(self) -> Result<(), KickTimeout> {
        let mut stopped = self.vcpus.stop();
        for transport in self.bus.virtio() {
            transport.stop();
        }
        if stopped.is_err() {
            // A vCPU may have waited for a disk, in a reset of its device. Such a
            // thread keeps the bus and the disks alive until it ends.
            stopped = self.vcpus.stop();
        }
        stopped
    }
}

fn check(spec: &GuestSpec) -> Result<(), MachineError> {
    if spec.vcpus == 0 || spec.vcpus > MAX_VCPUS {
        let text = format!("{} vCPUs, 1 to {MAX_VCPUS} are possible", spec.vcpus);
        return Err(MachineError::Spec(text));
    }
    if spec.memory_mib < LEAST_MEMORY {
        let text = format!(
            "{} MiB of RAM, the least is {LEAST_MEMORY}",
            spec.memory_mib
        );
        return Err(MachineError::Spec(text));
    }
    // Two more devices: vsock and entropy.
    if spec.disks.len() + 2 > layout::MAX_VIRTIO {
        let text = format!("{} disks are too many", spec.disks.len());
        return Err(MachineError::Spec(text));
    }
    Ok(())
}

/// The device of a disk, and the largest size of its files.
fn open_disk(
    index: usize,
    spec: &DiskSpec,
    files: &mut Files,
    changed: EventFd,
) -> Result<(Block, u64), MachineError> {
    let backing = match spec.backing {
        DiskBacking::Raw { file, read_only } => Backing::Raw {
            file: files.take(file)?.into(),
            read_only,
        },
        DiskBacking::Diff { diff, base } => Backing::Diff {
            diff: files.take(diff)?.into(),
            base: files.take(base)?.into(),
        },
    };
    let failed = |source| MachineError::Disk {
        serial: spec.serial.clone(),
        source,
    };
    let disk = disk::open(backing).map_err(|error| failed(error.into()))?;
    let size = disk.max_file_size();
    let block = Block::new(index, &spec.serial, disk, changed);
    Ok((block.map_err(|error| failed(error.into()))?, size))
}

fn plug(
    vm: &Vm,
    memory: &GuestMemoryMmap,
    number: usize,
    device: Box<dyn Device>,
    wake: &EventFd,
) -> Result<Transport, MachineError> {
    let host = |what| move |source| MachineError::Host { what, source };
    let wake = wake.try_clone().map_err(host("eventfd"))?;
    let irq = new_eventfd().map_err(host("eventfd"))?;
    vm.register_irqfd(&irq, layout::VIRTIO_GSI + number as u32)?;
    let interrupt = Interrupt::new(irq, device.name(), wake);
    let transport = Transport::new(device, memory.clone(), interrupt).map_err(host("eventfd"))?;
    let base = layout::MMIO_START + number as u64 * layout::VIRTIO_STRIDE;
    let kicks = transport.kicks().map_err(host("eventfd"))?;
    for (queue, kick) in kicks.iter().enumerate() {
        vm.register_ioeventfd(kick, base + NOTIFY, queue as u32)?;
    }
    Ok(transport)
}

fn new_eventfd() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}
