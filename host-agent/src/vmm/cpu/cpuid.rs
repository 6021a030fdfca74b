//! CPUID leaves of each vCPU: what KVM supports, with the topology of this
//! machine: one socket, one thread per core.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1: features and initial APIC id (Intel SDM volume 2A, CPUID).
const FEATURES: u32 = 1;
/// ECX bits 31 (reserved for hypervisors) and 24, EDX bit 28 of leaf 1.
const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const HTT: u32 = 1 << 28;
/// Leaves of the extended topology, and their subleaves: threads, cores, the end
/// (Intel SDM volume 2A, CPUID).
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];
const TOPOLOGY_SUBLEAVES: u32 = 3;

/// The table has more than `KVM_MAX_CPUID_ENTRIES` entries.
#[derive(Debug, thiserror::Error)]
#[error("too many CPUID entries")]
pub struct CpuidFull;

/// Adapts `cpuid` to vCPU `id` of `count`.
pub fn adapt(cpuid: &mut CpuId, id: u8, count: u8) -> Result<(), CpuidFull> {
    add_topology(cpuid)?;
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
            // Deterministic cache parameters: cores per package, and the vCPUs that
            // share a level-3 cache (Intel SDM volume 2A, CPUID leaf 4).
            (4, _) if entry.eax & 0x1f != 0 => {
                entry.eax = (entry.eax & 0x03ff_ffff & !(0xfff << 14)) | ((count - 1) << 26);
                if (entry.eax >> 5) & 7 == 3 {
                    entry.eax |= (count - 1) << 14;
                }
            }
            (0xb | 0x1f, index) => topology(entry, index, id, count, bits),
            // Cores per package and width of the APIC id, then the extended APIC id,
            // core and node (AMD APM volume 3, E.4).
            (0x8000_0008, _) => entry.ecx = (count - 1) | (bits << 12),
            (0x8000_001e, _) => {
                entry.eax = id;
                entry.ebx = id & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Adds missing subleaves of the topology. Since Linux 6.2 KVM returns only
/// subleaf 0 of each leaf, so as not to expose the host's topology; with it alone,
/// the guest would see a single core.
fn add_topology(cpuid: &mut CpuId) -> Result<(), CpuidFull> {
    for function in TOPOLOGY {
        let has_entry = |cpuid: &CpuId, index| {
            let entries = cpuid.as_slice();
            entries
                .iter()
                .any(|entry| (entry.function, entry.index) == (function, index))
        };
        for index in 1..TOPOLOGY_SUBLEAVES {
            if has_entry(cpuid, 0) && !has_entry(cpuid, index) {
                let entry = kvm_cpuid_entry2 {
                    function,
                    index,
                    flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                    ..kvm_cpuid_entry2::default()
                };
                cpuid.push(entry).map_err(|_| CpuidFull)?;
            }
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            // Values of the host, which the guest must not see.
            eax: 7,
            ebx: 0x7777_7777,
            ecx: 0x7777,
            edx: 0x7777,
            ..kvm_cpuid_entry2::default()
        }
    }

    fn adapted(entries: &[(u32, u32)], id: u8, count: u8) -> CpuId {
        let entries: Vec<_> = entries.iter().map(|(f, i)| entry(*f, *i)).collect();
        let mut cpuid = CpuId::from_entries(&entries).unwrap();
        adapt(&mut cpuid, id, count).unwrap();
        cpuid
    }

    /// Registers of the only entry for this leaf, if there is one.
    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> Option<[u32; 4]> {
        let mut found = cpuid
            .as_slice()
            .iter()
            .filter(|entry| (entry.function, entry.index) == (function, index));
        let registers = found
            .next()
            .map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx]);
        assert!(found.next().is_none());
        registers
    }

    #[test]
    fn every_vcpu_is_a_core_whatever_topology_kvm_returns() {
        let before_6_2 = [(0, 0), (1, 0), (0xb, 0), (0xb, 1), (0xb, 2), (0x1f, 0)];
        let since_6_2 = [(0, 0), (1, 0), (0xb, 0), (0x1f, 0)];
        for entries in [&before_6_2[..], &since_6_2[..]] {
            for (count, bits) in [(1, 0), (2, 1), (3, 2), (8, 3)] {
                for id in 0..count {
                    let cpuid = adapted(entries, id, count);
                    let (id, count) = (u32::from(id), u32::from(count));
                    for function in TOPOLOGY {
                        let part = |index| leaf(&cpuid, function, index).unwrap();
                        assert_eq!(part(0), [0, 1, 0x100, id]);
                        assert_eq!(part(1), [bits, count, 0x201, id]);
                        assert_eq!(part(2), [0, 0, 2, id]);
                    }
                    let [_, ebx, _, edx] = leaf(&cpuid, 1, 0).unwrap();
                    assert_eq!(ebx, 0x7777 | count << 16 | id << 24);
                    assert_eq!(edx & HTT != 0, count > 1);
                }
            }
        }
    }

    #[test]
    fn a_guest_sees_the_hypervisor_and_the_tsc_deadline_timer() {
        // Linux uses kvmclock and the deadline timer only with these bits.
        for (id, count) in [(0, 1), (1, 2)] {
            let [.., ecx, _] = leaf(&adapted(&[(1, 0)], id, count), 1, 0).unwrap();
            assert_eq!(ecx, 0x7777 | HYPERVISOR | TSC_DEADLINE);
            assert_eq!(HYPERVISOR | TSC_DEADLINE, 0x8100_0000);
        }
    }

    #[test]
    fn leaves_that_the_host_lacks_are_not_added() {
        let cpuid = adapted(&[(0, 0), (1, 0)], 1, 2);
        assert_eq!(cpuid.as_slice().len(), 2);
    }

    #[test]
    fn added_subleaves_are_found_by_their_index() {
        let cpuid = adapted(&[(0xb, 0)], 0, 2);
        let added = &cpuid.as_slice()[1..];
        assert_eq!(added.len(), 2);
        let by_index = |entry: &kvm_cpuid_entry2| entry.flags == KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        assert!(added.iter().all(by_index));
    }
}
