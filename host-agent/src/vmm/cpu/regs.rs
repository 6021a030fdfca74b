//! Registers of a vCPU at the 64-bit entry point of Linux
//! (`Documentation/arch/x86/boot.rst`, "64-bit Boot Protocol").

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::vmm::boot::EntryPoint;
use crate::vmm::layout;

/// Selector and descriptor of the code, data and task segments of the boot GDT
/// (Intel SDM volume 3, 3.4.5 and 8.2.2).
const SELECTORS: [(u16, u64); 3] = [
    (0x08, 0x00af_9b00_0000_ffff),
    (0x10, 0x00cf_9300_0000_ffff),
    (0x18, 0x008f_8b00_0000_ffff),
];
/// Bits of `CR0` and `CR4` (Intel SDM volume 3, 2.5) and `IA32_EFER` (2.2.1).
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// x87 control word after `FNINIT`, and `MXCSR` after reset (Intel SDM volume 1,
/// 8.1.5 and 10.2.3).
const FPU_CONTROL: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;
/// `IA32_MTRR_DEF_TYPE`: MTRRs enabled, write-back by default (Intel SDM volume 3,
/// 12.11.2.1).
const MSR_MTRR_DEFAULT: u32 = 0x2ff;
const MTRR_ON_WRITE_BACK: u64 = (1 << 11) | 6;
/// `IA32_MISC_ENABLE` bit 0: fast string operations (Intel SDM volume 4, 2.1).
const MSR_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRING: u64 = 1;
/// Registers `LINT0` and `LINT1` of the local vector table, and their delivery
/// modes (Intel SDM volume 3, 11.5.1).
const APIC_LINT0: usize = 0x350;
const APIC_LINT1: usize = 0x360;
const MODE_EXTINT: u32 = 7 << 8;
const MODE_NMI: u32 = 4 << 8;
/// Page table entry bits: present and writable, and page size (Intel SDM volume 3,
/// 4.5).
const PRESENT_WRITABLE: u64 = 3;
const PAGE_SIZE: u64 = 1 << 7;

/// Why the initial state cannot be set.
#[derive(Debug, thiserror::Error)]
pub enum RegsError {
    /// The boot structures do not fit in guest RAM.
    #[error("boot structures in guest RAM")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// An ioctl failed.
    #[error("set {what}")]
    Kvm {
        /// Which registers.
        what: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Writes the GDT, an empty IDT, and page tables with an identity mapping of the
/// first GiB.
pub fn write_tables(memory: &GuestMemoryMmap) -> Result<(), RegsError> {
    for (selector, descriptor) in SELECTORS {
        memory.write_obj(descriptor, GuestAddress(layout::GDT + u64::from(selector)))?;
    }
    memory.write_obj(0u64, GuestAddress(layout::GDT))?;
    memory.write_obj(0u64, GuestAddress(layout::IDT))?;
    let (level4, level3, level2) = (
        layout::PAGE_TABLES,
        layout::PAGE_TABLES + 0x1000,
        layout::PAGE_TABLES + 0x2000,
    );
    memory.write_obj(level3 | PRESENT_WRITABLE, GuestAddress(level4))?;
    memory.write_obj(level2 | PRESENT_WRITABLE, GuestAddress(level3))?;
    for page in 0..512u64 {
        let entry = (page << 21) | PRESENT_WRITABLE | PAGE_SIZE;
        memory.write_obj(entry, GuestAddress(level2 + page * 8))?;
    }
    Ok(())
}

/// Sets the state of one vCPU. Only the first starts at `entry`; the others wait
/// for a start-up IPI of the guest (Intel SDM volume 3, 9.4).
pub fn set(vcpu: &VcpuFd, first: bool, entry: EntryPoint) -> Result<(), RegsError> {
    let kvm = |what| move |source| RegsError::Kvm { what, source };
    let msrs = Msrs::from_entries(&[
        msr(MSR_MISC_ENABLE, FAST_STRING),
        msr(MSR_MTRR_DEFAULT, MTRR_ON_WRITE_BACK),
    ])
    .expect("two entries are fewer than KVM_MAX_MSR_ENTRIES");
    vcpu.set_msrs(&msrs).map_err(kvm("MSRs"))?;
    let fpu = kvm_fpu {
        fcw: FPU_CONTROL,
        mxcsr: MXCSR,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu).map_err(kvm("FPU"))?;
    let mut lapic = vcpu.get_lapic().map_err(kvm("local APIC"))?;
    for (register, mode) in [(APIC_LINT0, MODE_EXTINT), (APIC_LINT1, MODE_NMI)] {
        for (offset, byte) in mode.to_le_bytes().into_iter().enumerate() {
            lapic.regs[register + offset] = byte as std::ffi::c_char;
        }
    }
    vcpu.set_lapic(&lapic).map_err(kvm("local APIC"))?;
    if !first {
        return Ok(());
    }
    let mut sregs = vcpu.get_sregs().map_err(kvm("segments"))?;
    let [code, data, task] = SELECTORS.map(|(selector, d)| segment(selector, d));
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task;
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = 31;
    sregs.idt.base = layout::IDT;
    sregs.idt.limit = 7;
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PE | CR0_ET | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs).map_err(kvm("segments"))?;
    let regs = kvm_regs {
        rflags: 2,
        rip: entry.0.0,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rsi: layout::ZERO_PAGE,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(kvm("registers"))
}

fn msr(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

/// A segment register from its selector and descriptor (Intel SDM volume 3, 3.4.5).
fn segment(selector: u16, descriptor: u64) -> kvm_segment {
    let bit = |shift: u32, width: u32| ((descriptor >> shift) & ((1 << width) - 1)) as u8;
    kvm_segment {
        base: ((descriptor >> 16) & 0xff_ffff) | ((descriptor >> 32) & 0xff00_0000),
        limit: 0xf_ffff << 12 | 0xfff,
        selector,
        type_: bit(40, 4),
        s: bit(44, 1),
        dpl: bit(45, 2),
        present: bit(47, 1),
        avl: bit(52, 1),
        l: bit(53, 1),
        db: bit(54, 1),
        g: bit(55, 1),
        unusable: 0,
        padding: 0,
    }
}
