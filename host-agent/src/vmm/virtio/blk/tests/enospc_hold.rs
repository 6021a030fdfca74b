//! A host without free space: writes are held, retried, failed and dropped.

use super::*;

/// A device on a full host that holds a write of 1 KiB.
fn held(disk: &TestDisk, features: u64) -> (Block, TestDriver, EventFd) {
    let changed = event();
    let signal = changed.try_clone().unwrap();
    let mut block = Block::new(0, "serial", Box::new(disk.clone()), changed).unwrap();
    let mut driver = TestDriver::new(&[QUEUE_SIZE]);
    block.activate(driver.activation(features)).unwrap();
    disk.fail.store(true, Ordering::SeqCst);
    driver.write(DATA, &[0x77; 1024]);
    header(&driver, HEADERS, OUT, 3);
    driver.submit(&parts(1024, false));
    let hold = block.enospc_hold();
    until("shortage", || hold.shortage().is_some());
    let shortage = Shortage {
        needed: 1024,
        quota: false,
    };
    assert_eq!(hold.shortage(), Some(shortage));
    assert!(signal.read().is_ok());
    (block, driver, signal)
}

#[test]
fn a_held_write_succeeds_once_the_host_has_space() {
    let disk = TestDisk::new();
    let before = disk.bytes();
    let (block, mut driver, signal) = held(&disk, ALL);
    let calls = disk.calls.load(Ordering::SeqCst);
    // The worker retries; the driver sees neither a result nor an error.
    until("second try", || disk.calls.load(Ordering::SeqCst) > calls);
    assert_eq!((driver.used(0), disk.bytes()), (None, before));
    disk.fail.store(false, Ordering::SeqCst);
    assert_eq!(driver.wait_used(0), (0, 1));
    assert_eq!(driver.get::<u8>(STATUS), OK);
    assert_eq!(disk.bytes()[3 * 512..5 * 512], [0x77; 1024]);
    assert_eq!(block.enospc_hold().shortage(), None);
    assert!(signal.read().is_ok());
    assert_eq!(block.counters().first_failure.get(), None);
    assert_eq!(request(&mut driver, IN, 3, 512).0, OK);
    assert!(signal.read().is_err());
}

#[test]
fn fail_when_full_fails_the_held_write_at_once() {
    let disk = TestDisk::new();
    let (block, mut driver, signal) = held(&disk, ALL);
    block.enospc_hold().fail_when_full();
    assert_eq!(driver.wait_used(0), (0, 1));
    assert_eq!(driver.get::<u8>(STATUS), IOERR);
    assert!(block.enospc_hold().shortage().is_none() && signal.read().is_ok());
    assert!(block.counters().first_failure.get().unwrap().full);
    // Later writes are not held either.
    assert_eq!(request(&mut driver, OUT, 0, 512).0, IOERR);
}

#[test]
fn a_reset_or_a_drop_ends_a_hold() {
    let disk = TestDisk::new();
    for features in [0, ALL] {
        let (mut block, mut driver, signal) = held(&disk, features);
        block.reset();
        assert!(block.enospc_hold().shortage().is_none() && signal.read().is_ok());
        assert_eq!(driver.used(0), None);
        disk.fail.store(false, Ordering::SeqCst);
        driver = TestDriver::new(&[QUEUE_SIZE]);
        block.activate(driver.activation(features)).unwrap();
        assert_eq!(request(&mut driver, OUT, 0, 512).0, OK);
    }
    let (block, ..) = held(&disk, ALL);
    drop(block);
}
