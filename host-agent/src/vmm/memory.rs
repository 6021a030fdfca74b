//! Guest RAM: mapped on demand, with a hole for device registers.

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::layout::{HIGH_RAM_START, MMIO_START};

/// Guest RAM cannot be mapped.
#[derive(Debug, thiserror::Error)]
#[error("cannot map {mib} MiB of guest RAM: {reason}")]
pub struct MemoryError {
    mib: u32,
    reason: String,
}

/// The regions of `mib` MiB of RAM: guest-physical address and length in bytes.
pub fn regions(mib: u32) -> Vec<(u64, u64)> {
    let total = u64::from(mib) << 20;
    let low = total.min(MMIO_START);
    let mut regions = vec![(0, low)];
    if total > low {
        regions.push((HIGH_RAM_START, total - low));
    }
    regions
}

/// Size and alignment of a page that one level-2 entry of a second-level page
/// table maps (Intel SDM volume 3, 29.3.2; AMD APM volume 2, 15.25).
const HUGE: usize = 2 << 20;

/// Maps RAM for the lifetime of the process. Pages are allocated on first access
/// and are not part of core dumps.
pub fn allocate(mib: u32) -> Result<GuestMemoryMmap, MemoryError> {
    let error = |reason: String| MemoryError { mib, reason };
    let mut mapped = Vec::new();
    for (start, length) in regions(mib) {
        let region = map(length as usize).map_err(error)?;
        let region = GuestRegionMmap::new(region, GuestAddress(start))
            .ok_or_else(|| error("address overflow".into()))?;
        mapped.push(region);
    }
    GuestMemoryMmap::from_regions(mapped).map_err(|e| error(e.to_string()))
}

/// Maps `length` bytes so that KVM can use huge pages, for which host and guest
/// addresses must be equal modulo [`HUGE`]. Each page costs an exit on its first
/// access, and a booting guest accesses tens of MiB.
#[allow(unsafe_code)]
fn map(length: usize) -> Result<MmapRegion, String> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new anonymous mapping at an address that the kernel chooses
    // changes no existing mapping.
    let reserved = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length + HUGE,
            protection,
            flags,
            -1,
            0,
        )
    };
    if reserved == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error().to_string());
    }
    let reserved = reserved.cast::<u8>();
    let skip = reserved.align_offset(HUGE);
    // SAFETY: the mapping is `length + HUGE` bytes long and `skip` < `HUGE`, so
    // `length` bytes from `start` lie within it. It is never unmapped, so no
    // pointer into it outlives it. `madvise` changes only the page size and the
    // content of core dumps, and its failure is harmless.
    unsafe {
        let start = reserved.add(skip);
        libc::madvise(start.cast(), length, libc::MADV_HUGEPAGE);
        libc::madvise(reserved.cast(), length + HUGE, libc::MADV_DONTDUMP);
        MmapRegionBuilder::new(length)
            .with_raw_mmap_pointer(start)
            .with_mmap_prot(protection)
            .with_mmap_flags(flags)
            .build()
            .map_err(|e| e.to_string())
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;
    use crate::vmm::smaps::mappings;

    #[test]
    fn ram_above_the_device_hole_continues_at_4_gib() {
        assert_eq!(regions(128), [(0, 128 << 20)]);
        let hole = (MMIO_START >> 20) as u32;
        assert_eq!(regions(hole), [(0, MMIO_START)]);
        assert_eq!(
            regions(hole + 1),
            [(0, MMIO_START), (HIGH_RAM_START, 1 << 20)]
        );
    }

    #[test]
    fn ram_is_not_part_of_core_dumps() {
        let memory = allocate(3).unwrap();
        let first = memory.iter().next().unwrap().as_ptr() as usize;
        let mut ram = mappings();
        ram.retain(|it| it.range.start < first + (3 << 20) && first < it.range.end);
        assert!(!ram.is_empty());
        for mapping in ram {
            let flags = mapping.field("VmFlags");
            assert!(flags.split(' ').any(|flag| flag == "dd"), "{flags}");
        }
    }

    #[test]
    fn ram_is_aligned_to_huge_pages_and_usable_to_its_end() {
        let memory = allocate(3).unwrap();
        let region = memory.iter().next().unwrap();
        assert_eq!(region.as_ptr() as usize % HUGE, 0);
        memory.write_obj(7_u8, GuestAddress((3 << 20) - 1)).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
    }
}
