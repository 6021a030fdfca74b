//! Guest RAM: demand-paged, around the hole for device registers.

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::layout::{HIGH_RAM_START, MMIO_START};

/// Why guest RAM cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot map {mib} MiB of guest RAM: {reason}")]
pub struct MemoryError {
    mib: u32,
    reason: String,
}

/// The parts of `mib` MiB of RAM: guest address and length in bytes.
pub fn regions(mib: u32) -> Vec<(u64, u64)> {
    let total = u64::from(mib) << 20;
    let low = total.min(MMIO_START);
    let mut regions = vec![(0, low)];
    if total > low {
        regions.push((HIGH_RAM_START, total - low));
    }
    regions
}

/// Maps RAM. Pages come into being when the guest touches them, and are left
/// out of core dumps.
pub fn allocate(mib: u32) -> Result<GuestMemoryMmap, MemoryError> {
    let error = |reason: String| MemoryError { mib, reason };
    let mut mapped = Vec::new();
    for (start, length) in regions(mib) {
        let region = MmapRegionBuilder::new(length as usize)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .map_err(|e| error(e.to_string()))?;
        dont_dump(&region);
        let region = GuestRegionMmap::new(region, GuestAddress(start))
            .ok_or_else(|| error("address overflow".into()))?;
        mapped.push(region);
    }
    GuestMemoryMmap::from_regions(mapped).map_err(|e| error(e.to_string()))
}

#[allow(unsafe_code)]
fn dont_dump(region: &vm_memory::MmapRegion) {
    // SAFETY: the range is the mapping that `region` owns; the advice changes
    // nothing but what a core dump contains. Its failure is harmless.
    unsafe {
        libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_DONTDUMP);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_that_does_not_fit_below_the_device_hole_continues_at_4_gib() {
        assert_eq!(regions(128), [(0, 128 << 20)]);
        let hole = (MMIO_START >> 20) as u32;
        assert_eq!(regions(hole), [(0, MMIO_START)]);
        assert_eq!(
            regions(hole + 1),
            [(0, MMIO_START), (HIGH_RAM_START, 1 << 20)]
        );
    }
}
