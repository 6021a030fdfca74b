//! CPUID leaves of each processor: what KVM supports, with the topology of
//! this machine: one socket, one thread per core.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Leaf 1: features and initial APIC id (Intel SDM 2A, CPUID).
const FEATURES: u32 = 1;
const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const HTT: u32 = 1 << 28;

/// Adapts `cpuid` to processor `id` of `count`.
pub fn adapt(cpuid: &mut CpuId, id: u8, count: u8) {
    let id = u32::from(id);
    let count = u32::from(count);
    let bits = u32::BITS - (count - 1).leading_zeros();
    for entry in cpuid.as_mut_slice() {
        match (entry.function, entry.index) {
            (FEATURES, _) => {
                entry.ecx |= HYPERVISOR | TSC_DEADLINE;
                entry.ebx = (entry.ebx & 0xffff) | (count << 16) | (id << 24);
                if count > 1 {
                    entry.edx |= HTT;
                } else {
                    entry.edx &= !HTT;
                }
            }
            // Deterministic cache parameters: cores in the package.
            (4, _) if entry.eax & 0x1f != 0 => {
                entry.eax = (entry.eax & 0x03ff_ffff & !(0xfff << 14)) | ((count - 1) << 26);
                if (entry.eax >> 5) & 7 == 3 {
                    entry.eax |= (count - 1) << 14;
                }
            }
            // Extended topology: one thread per core, `count` cores.
            (0xb | 0x1f, index) => topology(entry, index, id, count, bits),
            // AMD: cores per package and width of the APIC id.
            (0x8000_0008, _) => entry.ecx = (count - 1) | (bits << 12),
            (0x8000_001e, _) => {
                entry.eax = id;
                entry.ebx = id & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
}

fn topology(entry: &mut kvm_cpuid_entry2, index: u32, id: u32, count: u32, bits: u32) {
    let (shift, number, kind) = match index {
        0 => (0, 1, 1),
        1 => (bits, count, 2),
        _ => (0, 0, 0),
    };
    entry.eax = shift;
    entry.ebx = number;
    entry.ecx = index | (kind << 8);
    entry.edx = id;
}
