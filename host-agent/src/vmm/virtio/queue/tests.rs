//! The queue against a reference implementation of the chain walk.

use std::sync::atomic::AtomicBool;

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::*;
use crate::vmm::virtio::test_driver::{
    BUFFERS, HIGH, HIGH_LEN, NEXT, RAM, TestDriver, WRITE, avail,
};

const INDIRECT: u16 = 4;

/// A driver with a ring of `size`, and the device's end of the ring.
fn setup(size: u16, features: u64) -> (TestDriver, CheckedQueue) {
    let mut driver = TestDriver::new(&[size]);
    let active = driver.activation(features).queues.remove(0);
    let queue = CheckedQueue::new(active, driver.memory.clone(), features);
    (driver, queue)
}

#[test]
fn a_chain_of_several_buffers_is_read_and_written_in_order() {
    let (mut driver, mut queue) = setup(8, 0);
    driver.chain(
        0,
        0,
        &[
            (BUFFERS + 0x4000, 3, false),
            (BUFFERS + 0x5000, 0, false),
            (HIGH, 5, false),
            (BUFFERS + 0x6000, 2, true),
            (BUFFERS + 0x7000, 4, true),
        ],
    );
    driver.write(BUFFERS + 0x4000, b"abc");
    driver.write(HIGH, b"defgh");
    driver.offer(0, 0);
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (8, 6));
    let mut buf = [0; 16];
    assert_eq!(chain.read_at(queue.memory(), 1, &mut buf), 7);
    assert_eq!(&buf[..7], b"bcdefgh");
    assert_eq!(chain.write_at(queue.memory(), 1, b"uvwxyz"), 5);
    assert_eq!(driver.read(BUFFERS + 0x7000, 4), b"vwxy");
    queue.push_used(chain, 6).unwrap();
    assert_eq!(driver.used(0), Some((0, 6)));
    assert_eq!(driver.used(0), None);
    assert!(queue.pop().unwrap().is_none());
}

#[test]
fn an_available_index_beyond_the_queue_size_is_refused() {
    for delta in 0..=u16::MAX {
        if delta > 32 && delta < u16::MAX - 32 && delta % 251 != 0 {
            continue;
        }
        let (mut driver, mut queue) = setup(16, 0);
        driver.chain(0, 0, &[(BUFFERS + 0x4000, 1, false)]);
        driver.jump(0, delta);
        match (delta, queue.pop()) {
            (0, Ok(None)) | (1..=16, Ok(Some(_))) => {}
            (17.., Err(QueueError::AvailJump { pending, size: 16 })) => assert_eq!(pending, delta),
            (_, other) => panic!("jump by {delta}: {other:?}"),
        }
    }
}

#[test]
fn more_chains_in_flight_than_the_queue_size_are_refused() {
    let (mut driver, mut queue) = setup(4, 0);
    driver.chain(0, 0, &[(BUFFERS + 0x4000, 1, false)]);
    let mut held = Vec::new();
    for _ in 0..4 {
        driver.offer(0, 0);
        held.push(queue.pop().unwrap().unwrap());
    }
    driver.offer(0, 0);
    assert!(matches!(
        queue.pop(),
        Err(QueueError::TooManyInFlight { size: 4 })
    ));
    queue.push_used(held.pop().unwrap(), 0).unwrap();
    assert!(queue.pop().unwrap().is_some());
}

#[test]
fn an_index_that_changes_is_read_whole() {
    // Both bytes of the index change. One byte of each value is a jump.
    const INDICES: [u16; 2] = [0x00ff, 0x0100];
    let stop = AtomicBool::new(false);
    let mut driver = TestDriver::new(&[16]);
    let activation = driver.activation(0);
    let state = activation.queues[0].queue.state();
    driver.chain(0, 0, &[(BUFFERS + 0x4000, 1, false)]);
    driver.put(avail(0) + 2, INDICES[0]);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for index in INDICES {
                    let at = GuestAddress(avail(0) + 2);
                    driver.memory.store(index, at, Ordering::Relaxed).unwrap();
                }
            }
        });
        let results: Vec<_> = (0..100_000)
            .map(|_| {
                let mut active = ActiveQueue {
                    queue: Queue::try_from(state).unwrap(),
                    kick: activation.queues[0].kick.try_clone().unwrap(),
                };
                active.queue.set_next_avail(0x00f8);
                CheckedQueue::new(active, driver.memory.clone(), 0).pop()
            })
            .filter_map(Result::err)
            .collect();
        stop.store(true, Ordering::Relaxed);
        assert!(results.is_empty(), "{:?}", results.first());
    });
}

#[test]
fn a_buffer_may_end_where_ram_ends_and_not_one_byte_later() {
    let ends = [(0, RAM), (HIGH, HIGH + HIGH_LEN)];
    for (start, end) in ends {
        for len in [1_u64, 2, 0x1000, end - start] {
            for (addr, fits) in [
                (end - len, true),
                (end - len + 1, false),
                (end, false),
                (u64::MAX - len + 1, false),
                (u64::MAX, false),
                (1 << 32, false),
            ] {
                let (mut driver, mut queue) = setup(4, 0);
                driver.chain(0, 0, &[(addr, len as u32, true)]);
                driver.offer(0, 0);
                assert_eq!(queue.pop().is_ok(), fits, "{len} bytes at {addr:#x}");
            }
        }
    }
    let (mut driver, mut queue) = setup(4, 0);
    driver.chain(0, 0, &[(0, (HIGH + 1) as u32, true)]);
    driver.offer(0, 0);
    assert!(matches!(queue.pop(), Err(QueueError::OutsideRam { .. })));
}

#[test]
fn interrupts_follow_the_driver_flag_or_its_event_index() {
    let (mut driver, mut queue) = setup(4, 0);
    driver.chain(0, 0, &[(BUFFERS + 0x4000, 1, true)]);
    driver.offer(0, 0);
    let chain = queue.pop().unwrap().unwrap();
    queue.push_used(chain, 0).unwrap();
    assert!(queue.notify_needed().unwrap());
    driver.put(avail(0), 1_u16);
    assert!(!queue.notify_needed().unwrap());

    // EVENT_IDX: used_event = 1 requests an interrupt after the second chain.
    let (mut driver, mut queue) = setup(4, EVENT_IDX);
    driver.chain(0, 0, &[(BUFFERS + 0x4000, 1, true)]);
    driver.put(avail(0) + 4 + 8, 1_u16);
    for expected in [false, true, false] {
        driver.offer(0, 0);
        let chain = queue.pop().unwrap().unwrap();
        queue.push_used(chain, 0).unwrap();
        assert_eq!(queue.notify_needed().unwrap(), expected);
    }
}

/// The readable and writable buffers of a chain by the rules of virtio 1.2, 2.7.5.
fn reference(table: &[(u64, u32, u16, u16)], head: u16) -> Option<(Vec<Range>, Vec<Range>)> {
    let in_ram = |addr: u64, len: u64| {
        let end = addr as u128 + len as u128;
        end <= RAM as u128 || (addr >= HIGH && end <= (HIGH + HIGH_LEN) as u128)
    };
    let (mut readable, mut writable) = (Vec::new(), Vec::new());
    let mut seen = vec![false; table.len()];
    let mut wrote = false;
    let mut total = 0_u64;
    let mut index = usize::from(head);
    loop {
        let &(addr, len, flags, next) = table.get(index)?;
        if std::mem::replace(&mut seen[index], true) || flags & INDIRECT != 0 {
            return None;
        }
        total += u64::from(len);
        if flags & WRITE == 0 && wrote || total > u64::from(u32::MAX) {
            return None;
        }
        wrote |= flags & WRITE != 0;
        if len > 0 {
            if !in_ram(addr, u64::from(len)) {
                return None;
            }
            let range = Range {
                addr: GuestAddress(addr),
                len,
            };
            if wrote { &mut writable } else { &mut readable }.push(range);
        }
        if flags & NEXT == 0 {
            return Some((readable, writable));
        }
        index = usize::from(next);
    }
}

fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let addr = prop_oneof![
        8 => 0..RAM,
        4 => HIGH..HIGH + HIGH_LEN,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        8 => 0..0x200_u32,
        1 => Just(u32::MAX),
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![
        4 => Just(NEXT),
        2 => Just(NEXT | WRITE),
        2 => Just(0),
        2 => Just(WRITE),
        1 => 0..8_u16,
    ];
    let next = prop_oneof![8 => 0..16_u16, 1 => any::<u16>()];
    (addr, len, flags, next)
}

proptest! {
    #[test]
    fn a_chain_equals_the_reference_walk_or_is_an_error(
        table in prop::collection::vec(descriptor(), 16),
        head in prop_oneof![8 => 0..16_u16, 1 => any::<u16>()],
    ) {
        let (mut driver, mut queue) = setup(16, 0);
        for (i, (addr, len, flags, next)) in table.iter().enumerate() {
            driver.describe(0, i as u16, (*addr, *len), *flags, *next);
        }
        driver.offer(0, head);
        match (queue.pop(), reference(&table, head)) {
            (Ok(Some(chain)), Some((readable, writable))) => {
                prop_assert_eq!(chain.readable(), &readable[..]);
                prop_assert_eq!(chain.writable(), &writable[..]);
                queue.push_used(chain, 0).unwrap();
                prop_assert_eq!(driver.used(0), Some((u32::from(head), 0)));
            }
            (Err(_), None) => prop_assert!(driver.used(0).is_none()),
            (got, expected) => prop_assert!(false, "{:?} but {:?}", got, expected),
        }
    }
}

#[test]
fn a_chain_of_over_4_gib_is_refused() {
    let (mut driver, mut queue) = setup(256, 0);
    // All of RAM, again and again: 256 times 16 MiB are 4 GiB. Neither the readable
    // nor the writable half is too long.
    let mut parts = [(0, RAM as u32, false); 256];
    for part in &mut parts[128..] {
        part.2 = true;
    }
    driver.chain(0, 0, &parts);
    driver.offer(0, 0);
    let error = queue.pop().unwrap_err();
    assert!(matches!(error, QueueError::TooLong { head: 0 }), "{error}");
    // One byte less is valid.
    let (mut driver, mut queue) = setup(256, 0);
    parts[255].1 -= 1;
    driver.chain(0, 0, &parts);
    driver.offer(0, 0);
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!(chain.readable_len(), 1 << 31);
    assert_eq!(chain.writable_len(), (1 << 31) - 1);
}
