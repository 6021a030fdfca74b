//! The KVM virtual machine: memory, interrupt controllers, eventfds.

use std::os::fd::{IntoRawFd, OwnedFd};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::boot::EntryPoint;
use super::cpu::{cpuid, regs};
use super::layout;

/// The only version of the KVM API (KVM API, 4.1).
const KVM_API_VERSION: i32 = 12;

/// KVM failed or lacks a feature.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// An ioctl failed.
    #[error("KVM: {what}")]
    Kvm {
        /// The operation.
        what: &'static str,
        /// The error.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The host's KVM lacks a feature.
    #[error("KVM lacks {0}")]
    Missing(&'static str),
    /// The initial state of a vCPU cannot be set.
    #[error("vCPU {id}")]
    Vcpu {
        /// Its number.
        id: u8,
        /// The error.
        #[source]
        source: regs::RegsError,
    },
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Kvm { what, source }
}

/// A virtual machine.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    /// What the host's processors and KVM support.
    cpuid: CpuId,
}

impl Vm {
    /// Creates a machine without vCPUs on the open `/dev/kvm`, with `memory` as its
    /// RAM and KVM's in-kernel interrupt controllers. `device` is closed: with it a
    /// guest that takes over this process could make more machines.
    pub fn new(device: OwnedFd, memory: &GuestMemoryMmap) -> Result<Self, VmError> {
        let kvm_device = open(device);
        if kvm_device.get_api_version() != KVM_API_VERSION {
            return Err(VmError::Missing("API version 12"));
        }
        for (capability, name) in [
            (Cap::Irqchip, "interrupt controllers"),
            (Cap::Ioeventfd, "ioeventfd"),
            (Cap::Irqfd, "irqfd"),
            (Cap::UserMemory, "user memory"),
        ] {
            if !kvm_device.check_extension(capability) {
                return Err(VmError::Missing(name));
            }
        }
        let fd = kvm_device.create_vm().map_err(kvm("create a machine"))?;
        fd.set_identity_map_address(layout::KVM_IDENTITY)
            .map_err(kvm("set the identity map address"))?;
        fd.set_tss_address(layout::KVM_TSS)
            .map_err(kvm("set the TSS address"))?;
        map(&fd, memory)?;
        fd.create_irq_chip()
            .map_err(kvm("create interrupt controllers"))?;
        let cpuid = kvm_device
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("get CPUID"))?;
        Ok(Self { fd, cpuid })
    }

    /// Makes each signal of `event` raise the interrupt line `gsi` (`KVM_IRQFD`).
    pub fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), VmError> {
        self.fd
            .register_irqfd(event, gsi)
            .map_err(kvm("register an irqfd"))
    }

    /// Makes a write of `value` to `address` signal `event` without an exit to this
    /// process (`KVM_IOEVENTFD`).
    pub fn register_ioeventfd(
        &self,
        event: &EventFd,
        address: u64,
        value: u32,
    ) -> Result<(), VmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(kvm("register an ioeventfd"))
    }

    /// Creates vCPU `id` of `count` in its initial state.
    pub fn create_vcpu(&self, id: u8, count: u8, entry: EntryPoint) -> Result<VcpuFd, VmError> {
        let vcpu = self
            .fd
            .create_vcpu(u64::from(id))
            .map_err(kvm("create a vCPU"))?;
        let mut cpuid = self.cpuid.clone();
        cpuid::adapt(&mut cpuid, id, count).map_err(|_| VmError::Missing("room for CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(kvm("set CPUID"))?;
        regs::set(&vcpu, id == 0, entry).map_err(|source| VmError::Vcpu { id, source })?;
        Ok(vcpu)
    }
}

#[allow(unsafe_code)]
fn open(device: OwnedFd) -> Kvm {
    use std::os::fd::FromRawFd;
    // SAFETY: `into_raw_fd` gives up the ownership, which `Kvm` takes.
    unsafe { Kvm::from_raw_fd(device.into_raw_fd()) }
}

#[allow(unsafe_code)]
fn map(fd: &VmFd, memory: &GuestMemoryMmap) -> Result<(), VmError> {
    for (slot, region) in memory.iter().enumerate() {
        let address = memory
            .get_host_address(region.start_addr())
            .map_err(|_| VmError::Missing("a host address of guest RAM"))?;
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: address as u64,
        };
        // SAFETY: the range is guest RAM of `memory::allocate`, which stays mapped
        // for the lifetime of the process and so of the machine.
        unsafe { fd.set_user_memory_region(region) }.map_err(kvm("map guest RAM"))?;
    }
    Ok(())
}
