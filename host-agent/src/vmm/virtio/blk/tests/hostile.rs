//! Any requests and rings over a real diff disk, against a model of its content.

use std::fs::File;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::vmm::disk::{self, Backing, create_diff};
use crate::vmm::virtio::test_driver::{NEXT, RingAction, WRITE, ring_action};

/// Size of the disk, and of its base, which ends in the middle of a cluster.
const SIZE: u64 = (2 << 20) + SECTOR;
const BASE: usize = (1 << 20) + 3 * SECTOR as usize;

/// A fresh diff disk, and its content.
fn diff(dir: &Path) -> (Box<dyn Disk>, Vec<u8>) {
    let mut content: Vec<u8> = (0..BASE)
        .map(|at| (at / 512 * 7 + at % 251) as u8)
        .collect();
    std::fs::write(dir.join("base"), &content).unwrap();
    let file = File::create_new(dir.join("diff")).unwrap();
    create_diff(file, SIZE, "base").unwrap();
    content.resize(SIZE as usize, 0);
    (open(dir), content)
}

fn open(dir: &Path) -> Box<dyn Disk> {
    let mut options = File::options();
    let diff = options.read(true).write(true).open(dir.join("diff"));
    let (diff, base) = (diff.unwrap(), File::open(dir.join("base")).unwrap());
    disk::open(Backing::Diff { diff, base }).unwrap()
}

fn features(event_idx: bool, flush: bool) -> u64 {
    let event_idx = if event_idx { queue::EVENT_IDX } else { 0 };
    event_idx | (u64::from(flush) << VIRTIO_BLK_F_FLUSH)
}

/// A well-formed chain with any request in it: slot, type, sector, bytes.
type AnyRequest = (u16, u32, u64, u32);

fn any_request() -> impl Strategy<Value = AnyRequest> {
    let kind = prop_oneof![4 => Just(IN), 4 => Just(OUT), 2 => Just(FLUSH), 2 => Just(GET_ID), 1 => any::<u32>()];
    let sector = prop_oneof![8 => 0..5000_u64, 1 => any::<u64>()];
    let length = prop_oneof![
        4 => 0..5000_u32,
        4 => (0..20_u32).prop_map(|sectors| sectors * 512),
        1 => any::<u32>(),
    ];
    (0..60_u16, kind, sector, length)
}

#[derive(Debug, Clone)]
enum HostileAction {
    Ring(RingAction),
    Request(AnyRequest),
}

fn action() -> impl Strategy<Value = HostileAction> {
    prop_oneof![
        ring_action(QUEUE_SIZE).prop_map(HostileAction::Ring),
        any_request().prop_map(HostileAction::Request),
    ]
}

/// An operation of a driver that follows the rules, and of the host.
#[derive(Debug, Clone)]
enum Operation {
    Reset,
    /// The VMM process ends, and another one opens the disk.
    Reopen,
    Flush,
    /// First sector, sectors, lengths of the first buffers.
    Read(u64, u64, Vec<u32>),
    /// The same, and what is written.
    Write(u64, u64, Vec<u32>, u8),
}

fn operation() -> impl Strategy<Value = Operation> {
    let sector = prop_oneof![
        0..SIZE / SECTOR,
        // Around the end of the base.
        (BASE as u64 / SECTOR - 2)..(BASE as u64 / SECTOR + 4),
    ];
    let range = (sector, 1..200_u64).prop_map(|(first, count)| {
        let last = SIZE / SECTOR;
        (first, count.min(last - first))
    });
    let cuts = || prop::collection::vec(1..3000_u32, 0..4);
    prop_oneof![
        1 => Just(Operation::Reset),
        1 => Just(Operation::Reopen),
        1 => Just(Operation::Flush),
        4 => (range.clone(), cuts()).prop_map(|((first, count), cuts)| {
            Operation::Read(first, count, cuts)
        }),
        4 => (range, cuts(), any::<u8>()).prop_map(|((first, count), cuts, fill)| {
            Operation::Write(first, count, cuts, fill)
        }),
    ]
}

/// Runs one request whose header and data are split over buffers; its status.
fn run_split(driver: &mut TestDriver, kind: u32, first: u64, len: u32, cuts: &[u32]) -> u8 {
    header(driver, HEADERS, kind, first);
    let mut parts = vec![(HEADERS, 7, false), (HEADERS + 7, 9, false)];
    let (mut done, mut cuts) = (0, cuts.iter());
    while done < len {
        let count = cuts.next().map_or(len, |cut| *cut).min(len - done);
        parts.push((DATA + u64::from(done), count, kind == IN));
        done += count;
    }
    parts.push((STATUS, 1, true));
    run(driver, &parts).0
}

proptest! {
    #![proptest_config(ProptestConfig {
        max_shrink_iters: 200,
        failure_persistence: None,
        ..crate::property::cases(60)
    })]

    #[test]
    fn a_reset_recovers_from_any_ring_and_request(
        actions in prop::collection::vec(action(), 1..150),
        event_idx: bool,
        flush: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let features = features(event_idx, flush);
        let mut block = Block::new(0, "serial", diff(dir.path()).0, event()).unwrap();
        let mut driver = TestDriver::new(&[QUEUE_SIZE]);
        block.activate(driver.activation(features)).unwrap();
        let base = std::fs::read(dir.path().join("base")).unwrap();
        for action in &actions {
            match *action {
                HostileAction::Ring(RingAction::Reset) => {
                    block.reset();
                    block.activate(driver.activation(features)).unwrap();
                }
                HostileAction::Ring(ref action) => driver.act(action),
                HostileAction::Request((slot, kind, sector, len)) => {
                    let at = BUFFERS + 0x4000 * u64::from(slot);
                    header(&driver, at, kind, sector);
                    let head = slot * 3;
                    let data = if kind == OUT { NEXT } else { NEXT | WRITE };
                    driver.describe(0, head, (at, 16), NEXT, head + 1);
                    driver.describe(0, head + 1, (at + 64, len), data, head + 2);
                    driver.describe(0, head + 2, (at + 32, 1), WRITE, 0);
                    driver.offer(0, head);
                    driver.kick(0);
                }
            }
        }
        block.reset();
        block.activate(driver.activation(features)).unwrap();
        prop_assert_eq!(request(&mut driver, IN, 0, 512).0, OK);
        prop_assert_eq!(request(&mut driver, OUT, 1, 512).0, OK);
        // What the guest wrote is a diff that opens; the base is unchanged.
        drop(block);
        drop(open(dir.path()));
        prop_assert!(std::fs::read(dir.path().join("base")).unwrap() == base);
    }

    #[test]
    fn a_disk_keeps_its_content_over_resets_and_restarts(
        operations in prop::collection::vec(operation(), 1..60),
        event_idx: bool,
        flush: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let features = features(event_idx, flush);
        let (disk, mut content) = diff(dir.path());
        let mut block = Block::new(0, "serial", disk, event()).unwrap();
        let mut driver = TestDriver::new(&[QUEUE_SIZE]);
        block.activate(driver.activation(features)).unwrap();
        for operation in operations {
            match operation {
                Operation::Reset => {
                    block.reset();
                    block.activate(driver.activation(features)).unwrap();
                }
                Operation::Reopen => {
                    // The disk has one writer at a time.
                    drop(block);
                    block = Block::new(0, "serial", open(dir.path()), event()).unwrap();
                    block.activate(driver.activation(features)).unwrap();
                }
                Operation::Flush => {
                    prop_assert_eq!(run_split(&mut driver, FLUSH, 0, 0, &[]), OK);
                }
                Operation::Read(first, count, cuts) => {
                    let len = (count * SECTOR) as usize;
                    driver.write(DATA, &vec![0xee; len]);
                    let status = run_split(&mut driver, IN, first, len as u32, &cuts);
                    prop_assert_eq!(status, OK);
                    let start = (first * SECTOR) as usize;
                    prop_assert!(driver.read(DATA, len) == content[start..start + len]);
                }
                Operation::Write(first, count, cuts, fill) => {
                    let len = (count * SECTOR) as usize;
                    let bytes: Vec<u8> =
                        (0..len).map(|at| fill.wrapping_add((at % 253) as u8)).collect();
                    driver.write(DATA, &bytes);
                    let status = run_split(&mut driver, OUT, first, len as u32, &cuts);
                    prop_assert_eq!(status, OK);
                    let start = (first * SECTOR) as usize;
                    content[start..start + len].copy_from_slice(&bytes);
                }
            }
        }
        drop(block);
        let mut found = vec![0; SIZE as usize];
        let mut disk = open(dir.path());
        disk.read(0, &[VolatileSlice::from(&mut found[..])]).unwrap();
        prop_assert!(found == content);
    }
}
