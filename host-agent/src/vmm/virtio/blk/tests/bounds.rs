//! The memory that a request costs, for any layout of its buffers.

use super::*;
use crate::vmm::virtio::test_driver::{RAM, alone, memory_for};

/// A huge disk without content, which checks the size of each transfer.
struct HugeDisk;

impl HugeDisk {
    fn check(slices: &[VolatileSlice<'_>]) {
        let total: usize = slices.iter().map(VolatileSlice::len).sum();
        assert!(total <= 1 << 20 && slices.len() <= usize::from(QUEUE_SIZE));
    }
}

impl Disk for HugeDisk {
    fn size(&self) -> u64 {
        1 << 40
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&mut self, _: u64, to: &[VolatileSlice<'_>]) -> io::Result<()> {
        Self::check(to);
        Ok(())
    }

    fn write(&mut self, _: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        Self::check(from);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn overlapping_buffers_cost_no_memory() {
    // In a process of its own, because it measures the memory of the process.
    if !alone("blk::tests::bounds::overlapping_buffers_cost_no_memory") {
        return;
    }
    let mut block = Block::new(0, "serial", Box::new(HugeDisk), event()).unwrap();
    let mut driver = TestDriver::new(&[QUEUE_SIZE]);
    block.activate(driver.activation(ALL)).unwrap();
    let used = memory_for(&driver.memory.clone(), || {
        // One page, or the last 14 MiB of RAM, listed 254 times.
        for (kind, len) in [IN, OUT]
            .into_iter()
            .flat_map(|kind| [(kind, 4096), (kind, 14 << 20)])
        {
            header(&driver, HEADERS, kind, 0);
            let mut parts = vec![(RAM - (14 << 20), len, kind == IN); usize::from(QUEUE_SIZE)];
            parts[0] = (HEADERS, 16, false);
            parts[255] = (STATUS, 1, true);
            for _ in 0..20 {
                let (status, used) = run(&mut driver, &parts);
                let expected = if kind == IN { 254 * len + 1 } else { 1 };
                assert_eq!((status, used), (OK, expected));
            }
        }
    });
    assert!(used <= 1 << 20, "{used} bytes");
}
