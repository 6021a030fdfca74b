//! Requests in progress: what they block, and what a reset waits for.

use std::sync::mpsc::Receiver;

use super::*;
use crate::vmm::virtio::test_driver::{alone, open_files_and_threads};

/// A disk that waits in each read until the test releases it.
struct SlowDisk {
    disk: TestDisk,
    entered: Sender<()>,
    go: Receiver<()>,
}

impl Disk for SlowDisk {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&mut self, offset: u64, to: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.entered.send(()).unwrap();
        let _ = self.go.recv();
        self.disk.read(offset, to)
    }

    fn write(&mut self, _: u64, _: &[VolatileSlice<'_>]) -> io::Result<()> {
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn slow() -> (SlowDisk, Receiver<()>, Sender<()>) {
    let (entered, wait) = mpsc::channel();
    let (release, go) = mpsc::channel();
    let disk = TestDisk::new();
    (SlowDisk { disk, entered, go }, wait, release)
}

#[test]
fn a_slow_read_blocks_neither_other_disks_nor_the_front() {
    let (disk, entered, release) = slow();
    let mut stuck = Block::new(0, "slow", Box::new(disk), event()).unwrap();
    let mut stuck_driver = TestDriver::new(&[QUEUE_SIZE]);
    stuck.activate(stuck_driver.activation(ALL)).unwrap();
    header(&stuck_driver, HEADERS, IN, 0);
    stuck_driver.submit(&parts(512, true));
    entered.recv().unwrap();
    let (_block, mut driver) = start(&TestDisk::new(), ALL);
    for _ in 0..100 {
        assert_eq!(request(&mut driver, IN, 0, 512).0, OK);
        assert_eq!(stuck.identity().config.len(), 24);
    }
    assert_eq!(stuck_driver.used(0), None);
    release.send(()).unwrap();
    assert_eq!(stuck_driver.wait_used(0), (0, 513));
}

#[test]
fn a_reset_waits_for_the_read_in_progress() {
    let (disk, entered, release) = slow();
    let inside = Arc::clone(&disk.disk.inside);
    let calls = Arc::clone(&disk.disk.calls);
    let mut block = Block::new(0, "slow", Box::new(disk), event()).unwrap();
    let mut driver = TestDriver::new(&[QUEUE_SIZE]);
    block.activate(driver.activation(ALL)).unwrap();
    header(&driver, HEADERS, IN, 0);
    for head in [0, 3, 6] {
        driver.chain(0, head, &parts(512, true));
        driver.offer(0, head);
    }
    driver.kick(0);
    entered.recv().unwrap();
    let stop = Arc::clone(&block.stop);
    let (done, reset) = mpsc::channel();
    let resetter = std::thread::spawn(move || {
        block.reset();
        done.send(()).unwrap();
        block
    });
    while !stop.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    // The worker is still in the read, so the reset has not returned.
    assert!(reset.try_recv().is_err());
    release.send(()).unwrap();
    reset.recv().unwrap();
    assert!(!inside.load(Ordering::SeqCst));
    assert_eq!(
        calls.load(Ordering::SeqCst),
        1,
        "later requests are dropped"
    );
    drop(resetter.join().unwrap());
}

#[test]
fn a_reset_at_any_time_stops_access_and_leaks_nothing() {
    // In a process of its own, because it counts descriptors and threads.
    if !alone("blk::tests::reset::a_reset_at_any_time_stops_access_and_leaks_nothing") {
        return;
    }
    let disk = TestDisk::new();
    let mut block = Block::new(0, "serial", Box::new(disk.clone()), event()).unwrap();
    let mut driver = TestDriver::new(&[QUEUE_SIZE]);
    let pattern = vec![0x5a; 0x4_0000];
    let before = open_files_and_threads();
    for round in 0..10_000_u32 {
        block.activate(driver.activation(ALL)).unwrap();
        header(&driver, HEADERS, IN, 3);
        for n in 0..16_u16 {
            let at = u64::from(n);
            let parts = [
                (HEADERS, 16, false),
                (DATA + at * 0x4000, 0x4000, true),
                (STATUS + at, 1, true),
            ];
            driver.chain(0, n * 3, &parts);
            driver.offer(0, n * 3);
        }
        driver.kick(0);
        // Varies the number of requests that are served before the reset.
        for _ in 0..(round % 97) * 20 {
            std::hint::spin_loop();
        }
        block.reset();
        assert!(!disk.inside.load(Ordering::SeqCst));
        let calls = disk.calls.load(Ordering::SeqCst);
        if round.is_multiple_of(50) {
            driver.write(DATA, &pattern);
            driver.kick(0);
            std::thread::yield_now();
            let found = driver.read(DATA, pattern.len());
            assert!(found == pattern, "guest memory changed after reset");
        }
        block.reset();
        assert_eq!(disk.calls.load(Ordering::SeqCst), calls);
    }
    assert_eq!(open_files_and_threads(), before);
    let calls = disk.calls.load(Ordering::SeqCst);
    assert!(
        calls > 0 && calls < 160_000,
        "no reset interrupted a request: {calls}"
    );
    block.activate(driver.activation(ALL)).unwrap();
    assert_eq!(request(&mut driver, IN, 0, 512).0, OK);
}
