//! A host without room for a write: who waits, for how long, and who is told.

use super::*;

/// A device on a full host with one write of 1 KiB, which it holds.
fn held(disk: &TestDisk, features: u64) -> (Block, TestDriver, EventFd) {
    let changed = event();
    let told = changed.try_clone().unwrap();
    let mut block = Block::new(0, "serial", Box::new(disk.clone()), changed).unwrap();
    let mut driver = TestDriver::new(&[QUEUE_SIZE]);
    block.activate(driver.activation(features)).unwrap();
    disk.fail.store(true, Ordering::SeqCst);
    driver
        .memory
        .write_slice(&[0x77; 1024], GuestAddress(DATA))
        .unwrap();
    header(&driver, HEADERS, OUT, 3);
    let parts = [(HEADERS, 16, false), (DATA, 1024, false), (STATUS, 1, true)];
    driver.chain(0, 0, &parts);
    driver.offer(0, 0);
    driver.kick(0);
    let hold = block.enospc_hold();
    until("shortage", || hold.shortage().is_some());
    let shortage = Shortage {
        needed: 1024,
        quota: false,
    };
    assert_eq!(hold.shortage(), Some(shortage));
    assert!(told.read().is_ok());
    (block, driver, told)
}

#[test]
fn a_write_without_room_is_held_and_goes_through_when_there_is() {
    let disk = TestDisk::new();
    let before = disk.bytes();
    let (block, mut driver, told) = held(&disk, ALL);
    let calls = disk.calls.load(Ordering::SeqCst);
    // It is tried again, now and then, and the driver sees nothing of it.
    until("second try", || disk.calls.load(Ordering::SeqCst) > calls);
    assert_eq!((driver.used(0), disk.bytes()), (None, before));
    disk.fail.store(false, Ordering::SeqCst);
    assert_eq!(driver.wait_used(0), (0, 1));
    assert_eq!(
        driver.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(),
        OK
    );
    assert_eq!(disk.bytes()[3 * 512..5 * 512], [0x77; 1024]);
    assert_eq!(block.enospc_hold().shortage(), None);
    assert!(told.read().is_ok());
    assert_eq!(block.counters().first_failure.get(), None);
    assert_eq!(request(&mut driver, IN, 3, 512).0, OK);
    // Nothing changed since.
    assert!(told.read().is_err());
}

#[test]
fn what_is_held_fails_at_once_when_it_is_given_up() {
    let disk = TestDisk::new();
    let (block, mut driver, told) = held(&disk, ALL);
    block.enospc_hold().fail_when_full();
    assert_eq!(driver.wait_used(0), (0, 1));
    assert_eq!(
        driver.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(),
        IOERR
    );
    assert!(block.enospc_hold().shortage().is_none() && told.read().is_ok());
    assert!(block.counters().first_failure.get().unwrap().full);
    // From here on nothing is held.
    assert_eq!(request(&mut driver, OUT, 0, 512).0, IOERR);
}

#[test]
fn a_reset_and_the_end_wait_for_no_room() {
    let disk = TestDisk::new();
    for features in [0, ALL] {
        let (mut block, mut driver, told) = held(&disk, features);
        block.reset();
        assert!(block.enospc_hold().shortage().is_none() && told.read().is_ok());
        assert_eq!(driver.used(0), None);
        disk.fail.store(false, Ordering::SeqCst);
        driver = TestDriver::new(&[QUEUE_SIZE]);
        block.activate(driver.activation(features)).unwrap();
        assert_eq!(request(&mut driver, OUT, 0, 512).0, OK);
    }
    let (block, ..) = held(&disk, ALL);
    drop(block);
}
