//! The block device as a driver sees it, on disks that are slow, full or failing.

mod bounds;
mod enospc_hold;
mod hostile;
mod reset;

use std::collections::HashSet;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, VolatileSlice};

use super::*;
use crate::vmm::virtio::interrupt::USED_BUFFER;
use crate::vmm::virtio::test_driver::{BUFFERS, TestDriver};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const ALL: u64 = (1 << VIRTIO_BLK_F_FLUSH) | queue::EVENT_IDX;

/// Addresses of headers, status bytes and data.
const HEADERS: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x1_0000;
const DATA: u64 = BUFFERS + 0x10_0000;
const SECTORS: u64 = 64;

/// A disk in memory that counts calls, and fails or waits on request.
#[derive(Clone)]
struct TestDisk {
    bytes: Arc<Mutex<Vec<u8>>>,
    read_only: bool,
    fail: Arc<AtomicBool>,
    flushes: Arc<AtomicUsize>,
    calls: Arc<AtomicUsize>,
    inside: Arc<AtomicBool>,
    /// A flush waits until this is free.
    busy: Arc<Mutex<()>>,
}

impl TestDisk {
    fn new() -> Self {
        let bytes = (0..SECTORS * 512).map(|i| (i / 512 + i % 7) as u8);
        Self {
            bytes: Arc::new(Mutex::new(bytes.collect())),
            read_only: false,
            fail: Arc::default(),
            flushes: Arc::default(),
            calls: Arc::default(),
            inside: Arc::default(),
            busy: Arc::default(),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    fn transfer(
        &self,
        offset: u64,
        slices: &[VolatileSlice<'_>],
        copy: impl Fn(&VolatileSlice<'_>, &mut [u8]),
    ) -> io::Result<()> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        self.inside.store(true, Ordering::SeqCst);
        let result = if self.fail.load(Ordering::SeqCst) {
            Err(io::Error::from_raw_os_error(libc::ENOSPC))
        } else {
            let mut bytes = self.bytes.lock().unwrap();
            let mut at = offset as usize;
            for slice in slices {
                copy(slice, &mut bytes[at..at + slice.len()]);
                at += slice.len();
            }
            Ok(())
        };
        self.inside.store(false, Ordering::SeqCst);
        result
    }
}

impl Disk for TestDisk {
    fn size(&self) -> u64 {
        SECTORS * 512
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&mut self, offset: u64, to: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.transfer(offset, to, |slice, bytes| slice.copy_from(bytes))
    }

    fn write(&mut self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        assert!(!self.read_only, "write to a read-only disk");
        self.transfer(offset, from, |slice, bytes| {
            slice.copy_to(bytes);
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        drop(self.busy.lock().unwrap());
        if self.fail.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }
}

fn event() -> EventFd {
    new_event().unwrap()
}

fn header(driver: &TestDriver, at: u64, kind: u32, sector: u64) {
    let [low, high] = [sector as u32, (sector >> 32) as u32];
    let words = [kind, 0, low, high];
    driver.put(at, words);
}

fn start(disk: &TestDisk, features: u64) -> (Block, TestDriver) {
    let mut block = Block::new(0, "serial", Box::new(disk.clone()), event()).unwrap();
    let mut driver = TestDriver::new(&[QUEUE_SIZE]);
    block.activate(driver.activation(features)).unwrap();
    (block, driver)
}

/// Header, data and status in one buffer each.
fn parts(len: u32, writable: bool) -> [(u64, u32, bool); 3] {
    [
        (HEADERS, 16, false),
        (DATA, len, writable),
        (STATUS, 1, true),
    ]
}

/// Runs one request; its status byte and used length.
fn request(driver: &mut TestDriver, kind: u32, sector: u64, len: u32) -> (u8, u32) {
    header(driver, HEADERS, kind, sector);
    run(driver, &parts(len, kind != OUT))
}

fn run(driver: &mut TestDriver, parts: &[(u64, u32, bool)]) -> (u8, u32) {
    driver.put(STATUS, 0xaa_u8);
    driver.submit(parts);
    let (head, len) = driver.wait_used(0);
    assert_eq!(head, 0);
    (driver.get(STATUS), len)
}

#[test]
fn features_and_configuration_describe_the_disk() {
    let mut disk = TestDisk::new();
    let block = Block::new(3, "os", Box::new(disk.clone()), event()).unwrap();
    let identity = block.identity();
    assert_eq!((identity.id, identity.name.as_str()), (2, "blk-3"));
    assert_eq!(identity.queue_sizes, [256]);
    let bits = |bits: &[u32]| bits.iter().fold(0, |all, bit| all | 1_u64 << bit);
    assert_eq!(identity.features, bits(&[2, 6, 9, 29]));
    let config = &identity.config;
    assert_eq!(config.len(), 24);
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(config[12..16], 254_u32.to_le_bytes());
    assert_eq!(config[20..24], 512_u32.to_le_bytes());
    disk.read_only = true;
    let block = Block::new(3, "os", Box::new(disk.clone()), event()).unwrap();
    assert_eq!(block.identity().features, bits(&[2, 5, 6, 9, 29]));
    for serial in ["123456789012345678901", "a\0b", "a b", "é"] {
        let result = Block::new(0, serial, Box::new(disk.clone()), event());
        assert!(matches!(result, Err(BlockError::Serial(_))), "{serial}");
    }
}

#[test]
fn every_type_sector_and_length_has_the_expected_result() {
    let disk = TestDisk::new();
    let (block, mut driver) = start(&disk, ALL);
    let mut model = disk.bytes();
    let sectors = [0, 1, SECTORS - 1, SECTORS, SECTORS + 1, 1 << 55, u64::MAX];
    let lengths = [0, 1, 20, 511, 512, 513, 1024, 4096, 32_768, 33_280, 1 << 21];
    let mut fill = 0_u8;
    for kind in [IN, OUT, FLUSH, GET_ID, 2, 3, 11, 13, 14, u32::MAX] {
        for (sector, len) in sectors.iter().flat_map(|s| lengths.map(|l| (*s, l))) {
            fill = fill.wrapping_add(1);
            let before = vec![fill; (1 << 21) + 512];
            driver.write(DATA, &before);
            let (status, used) = request(&mut driver, kind, sector, len);
            let fits = len % 512 == 0
                && u128::from(sector) * 512 + u128::from(len) <= u128::from(SECTORS * 512);
            let what = format!("type {kind} sector {sector} length {len}");
            let expected = match kind {
                IN | OUT if !fits => IOERR,
                IN | OUT | FLUSH | GET_ID => OK,
                _ => UNSUPP,
            };
            assert_eq!(status, expected, "{what}");
            let mut after = before.clone();
            let at = (sector as usize).wrapping_mul(512);
            let mut written = 0;
            match kind {
                IN if fits => {
                    written = len;
                    after[..len as usize].copy_from_slice(&model[at..at + len as usize]);
                }
                OUT if fits => model[at..at + len as usize].fill(fill),
                GET_ID => {
                    written = len.min(20);
                    let mut serial = *b"serial\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
                    serial[written as usize..].fill(fill);
                    after[..20].copy_from_slice(&serial);
                }
                _ => {}
            }
            let complete = written == if kind == OUT { 0 } else { len };
            assert_eq!(used, written + u32::from(complete), "{what}");
            assert!(driver.read(DATA, after.len()) == after, "{what}: memory");
        }
    }
    assert!(disk.bytes() == model);
    assert!(block.counters().refused.load(Ordering::Relaxed) > 100);
    assert!(!driver.interrupt.is_broken());
}

#[test]
fn the_status_is_the_last_writable_byte_of_any_layout() {
    let disk = TestDisk::new();
    let (_block, mut driver) = start(&disk, ALL);
    header(&driver, HEADERS, IN, 5);
    let expected = disk.bytes()[5 * 512..6 * 512].to_vec();
    // The status lies right after the data, so that a buffer can span both.
    for head_cut in [1, 8, 15, 16] {
        for cut in [1, 256, 511, 512, 513] {
            driver.write(DATA, &[0xaa; 600]);
            let parts = [
                (HEADERS, head_cut, false),
                (HEADERS + u64::from(head_cut), 16 - head_cut, false),
                (DATA, cut, true),
                (DATA + u64::from(cut), 513 - cut, true),
            ];
            driver.submit(&parts);
            assert_eq!(driver.wait_used(0), (0, 513));
            assert_eq!(driver.read(DATA, 512), expected);
            assert_eq!(driver.read(DATA + 512, 2), [OK, 0xaa]);
        }
    }
}

#[test]
fn chains_without_status_or_header_are_returned_unserved() {
    let disk = TestDisk::new();
    let (block, mut driver) = start(&disk, ALL);
    let before = disk.bytes();
    header(&driver, HEADERS, OUT, 0);
    assert_eq!(run(&mut driver, &[(HEADERS, 16, false)]), (0xaa, 0));
    assert_eq!(
        run(&mut driver, &[(HEADERS, 16, false), (DATA, 512, false)]),
        (0xaa, 0)
    );
    assert_eq!(
        run(&mut driver, &[(HEADERS, 15, false), (STATUS, 1, true)]),
        (IOERR, 1)
    );
    assert_eq!(run(&mut driver, &[(STATUS, 1, true)]), (IOERR, 1));
    assert_eq!(run(&mut driver, &[(STATUS, 0, true)]), (0xaa, 0));
    // A write with a writable buffer, and a read with a readable one.
    let both = [
        (HEADERS, 16, false),
        (DATA, 512, false),
        (DATA, 512, true),
        (STATUS, 1, true),
    ];
    assert_eq!(run(&mut driver, &both).0, IOERR);
    header(&driver, HEADERS, IN, 0);
    assert_eq!(run(&mut driver, &both).0, IOERR);
    assert_eq!(disk.bytes(), before);
    assert_eq!(block.counters().refused.load(Ordering::Relaxed), 7);
    assert_eq!(disk.calls.load(Ordering::SeqCst), 0);
}

#[test]
fn a_read_only_disk_refuses_writes_with_any_features() {
    let mut disk = TestDisk::new();
    disk.read_only = true;
    for features in [0, ALL, ALL | 1 << VIRTIO_BLK_F_RO] {
        let (_block, mut driver) = start(&disk, features);
        assert_eq!(request(&mut driver, OUT, 0, 512).0, IOERR);
        assert_eq!(request(&mut driver, IN, 0, 512).0, OK);
        assert_eq!(request(&mut driver, FLUSH, 0, 0).0, OK);
    }
}

#[test]
fn a_header_that_changes_during_the_read_is_read_once() {
    let disk = TestDisk::new();
    let (_block, mut driver) = start(&disk, ALL);
    let memory = driver.memory.clone();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let racer = std::thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            // A valid read, a write beyond the end, or an unknown type.
            for (kind, sector) in [(IN, SECTORS - 1), (OUT, u64::MAX), (77, 1 << 60)] {
                let words = [kind, 0, sector as u32, (sector >> 32) as u32];
                memory.write_obj(words, GuestAddress(HEADERS)).unwrap();
            }
        }
    });
    let before = disk.bytes();
    let mut seen = HashSet::new();
    for _ in 0..3_000 {
        seen.insert(run(&mut driver, &parts(512, true)));
    }
    stop.store(true, Ordering::Relaxed);
    racer.join().unwrap();
    let possible = HashSet::from([(OK, 513), (IOERR, 0), (UNSUPP, 0)]);
    assert!(seen.is_subset(&possible), "{seen:?}");
    assert_eq!(disk.bytes(), before);
}

#[test]
fn a_host_error_fails_the_request_and_not_the_device() {
    let disk = TestDisk::new();
    let (block, mut driver) = start(&disk, ALL);
    disk.fail.store(true, Ordering::SeqCst);
    block.enospc_hold().fail_when_full();
    for kind in [OUT, IN, FLUSH] {
        assert_eq!(
            request(&mut driver, kind, 0, 512),
            (IOERR, u32::from(kind == OUT))
        );
    }
    let first = block.counters().first_failure.get().cloned();
    assert!(first.unwrap().full);
    disk.fail.store(false, Ordering::SeqCst);
    assert_eq!(request(&mut driver, IN, 0, 512).0, OK);
    assert_eq!(request(&mut driver, OUT, 0, 512).0, OK);
}

/// Waits for a condition without an interrupt.
fn until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "no {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn without_the_flush_feature_every_write_is_flushed() {
    let disk = TestDisk::new();
    let (_block, mut driver) = start(&disk, 0);
    for done in 1..=3 {
        assert_eq!(request(&mut driver, OUT, 0, 512).0, OK);
        assert_eq!(disk.flushes.load(Ordering::SeqCst), done);
    }
    let disk = TestDisk::new();
    let (_block, mut driver) = start(&disk, ALL);
    assert_eq!(request(&mut driver, OUT, 0, 512).0, OK);
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 0);
}

#[test]
fn a_completed_request_does_not_wait_for_a_later_flush() {
    // A flush request, and a write without the flush feature.
    for (features, kind) in [(ALL, FLUSH), (0, OUT)] {
        let disk = TestDisk::new();
        let (_block, mut driver) = start(&disk, features);
        let busy = disk.busy.lock().unwrap();
        header(&driver, HEADERS, IN, 0);
        header(&driver, HEADERS + 16, kind, 0);
        let mut flush = parts(512, kind != OUT);
        flush[0].0 += 16;
        driver.chain(0, 0, &parts(512, true));
        driver.chain(0, 3, &flush);
        driver.offer(0, 0);
        driver.offer(0, 3);
        driver.kick(0);
        until("interrupt", || driver.interrupt.status() == USED_BUFFER);
        assert_eq!(driver.used(0), Some((0, 513)));
        assert_eq!(driver.used(0), None);
        drop(busy);
        assert_eq!(driver.wait_used(0).0, 3);
    }
}

#[test]
fn a_ring_violation_stops_the_device_until_a_reset() {
    let disk = TestDisk::new();
    let (mut block, mut driver) = start(&disk, ALL);
    for round in 1..=20 {
        driver.jump(0, QUEUE_SIZE + round);
        driver.kick(0);
        driver.wait_until("violation", |driver| driver.interrupt.is_broken());
        assert_eq!(driver.interrupt.violations(), u64::from(round));
        // A broken device serves no chain.
        driver.kick(0);
        block.reset();
        assert_eq!(driver.used(0), None);
        block.activate(driver.activation(ALL)).unwrap();
        assert_eq!(request(&mut driver, IN, 0, 512).0, OK);
    }
}

#[test]
fn a_full_queue_is_served_completely() {
    let disk = TestDisk::new();
    let (_block, mut driver) = start(&disk, ALL);
    for round in 0..50_u64 {
        header(&driver, HEADERS, IN, round);
        let heads: Vec<u16> = (0..QUEUE_SIZE / 3).map(|n| n * 3).collect();
        for head in &heads {
            let n = u64::from(*head);
            let parts = [
                (HEADERS, 16, false),
                (DATA + n * 512, 512, true),
                (STATUS + n, 1, true),
            ];
            driver.chain(0, *head, &parts);
            driver.offer(0, *head);
        }
        driver.kick(0);
        let mut back: Vec<u32> = heads.iter().map(|_| driver.wait_used(0).0).collect();
        back.sort_unstable();
        assert!(
            back.iter()
                .copied()
                .eq(heads.iter().map(|head| u32::from(*head)))
        );
        assert_eq!(driver.used(0), None);
    }
}
