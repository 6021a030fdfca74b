//! What a request costs, however its buffers lie.

use super::*;
use crate::vmm::virtio::test_driver::{RAM, alone, memory_for};

/// A disk without end and without bytes, that looks at what it is asked.
struct Endless;

impl Endless {
    fn look(slices: &[VolatileSlice<'_>]) {
        let total: usize = slices.iter().map(VolatileSlice::len).sum();
        assert!(total <= 1 << 20 && slices.len() <= usize::from(QUEUE_SIZE));
    }
}

impl Disk for Endless {
    fn size(&self) -> u64 {
        1 << 40
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&mut self, _: u64, to: &[VolatileSlice<'_>]) -> io::Result<()> {
        Self::look(to);
        Ok(())
    }

    fn write(&mut self, _: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        Self::look(from);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn buffers_that_overlap_cost_no_memory() {
    // Alone, so that nothing else takes any.
    if !alone("blk::tests::bounds::buffers_that_overlap_cost_no_memory") {
        return;
    }
    let mut block = Block::new(0, "serial", Box::new(Endless), event()).unwrap();
    let mut driver = TestDriver::new(&[QUEUE_SIZE]);
    block.activate(driver.activation(ALL)).unwrap();
    let used = memory_for(&driver.memory.clone(), || {
        // A page, and what is left of RAM: 254 times.
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
