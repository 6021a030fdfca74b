//! Content of a diff after a power cut, and after failed operations of the host.

use super::host::{Fault, Op, apply};
use super::*;
use crate::vmm::disk::is_full;

/// An operation of the guest, with the number of host operations before or after it.
#[derive(Debug, Clone, Copy)]
enum Event {
    Write { write: Write, from: usize },
    Flushed { until: usize },
}

/// The allowed tags of each hot sector.
struct Allowed(Vec<Vec<u64>>);

impl Allowed {
    /// After a power cut that follows `cut` host operations.
    fn after(start: &[u64], events: &[Event], cut: usize) -> Self {
        let flushed = events
            .iter()
            .rposition(|event| matches!(event, Event::Flushed { until } if *until <= cut))
            .map_or(0, |index| index + 1);
        let mut tags: Vec<Vec<u64>> = start.iter().map(|tag| vec![*tag]).collect();
        for (index, event) in events.iter().enumerate() {
            let Event::Write { write, from } = event else {
                continue;
            };
            for tags in &mut tags[write.first..write.first + write.count] {
                if index < flushed {
                    *tags = vec![write.tag];
                } else if *from < cut {
                    tags.push(write.tag);
                }
            }
        }
        Self(tags)
    }

    fn check(&self, found: &[u64], context: &str) {
        for (index, (found, allowed)) in found.iter().zip(&self.0).enumerate() {
            assert!(
                allowed.contains(found),
                "{context}: sector {index} is {found:x}, may be {allowed:x?}"
            );
        }
    }
}

/// Writes and flushes at random, and returns the operations.
fn work(disk: &mut Tested, memory: &Memory, random: &mut Random, steps: u64) -> Vec<Event> {
    let mut events = Vec::new();
    for step in 0..steps {
        let tag = 1 + step + (random.below(1 << 20) << 20);
        let one = random_write(random, tag);
        let from = memory.ops();
        write(disk, one, random).unwrap();
        events.push(Event::Write { write: one, from });
        if random.below(6) == 0 {
            disk.flush().unwrap();
            let until = memory.ops();
            events.push(Event::Flushed { until });
        }
    }
    events
}

/// The image after a power cut that follows `cut` operations. `pick` selects the
/// unsynced ones that reached the disk, whole or sector by sector if `torn`.
fn crashed(
    start: &[u8],
    log: &[Op],
    cut: usize,
    torn: bool,
    mut pick: impl FnMut(usize) -> bool,
) -> Vec<u8> {
    let synced = log[..cut]
        .iter()
        .rposition(|op| matches!(op, Op::Sync))
        .map_or(0, |sync| sync + 1);
    let mut image = start.to_vec();
    for (index, op) in log[..cut].iter().enumerate() {
        let Op::Write { offset, bytes } = op else {
            continue;
        };
        if index < synced {
            apply(&mut image, *offset, bytes);
        } else if torn {
            for (number, sector) in bytes.chunks(512).enumerate() {
                if pick(index - synced) {
                    apply(&mut image, offset + 512 * number as u64, sector);
                }
            }
        } else if pick(index - synced) {
            apply(&mut image, *offset, bytes);
        }
    }
    image
}

/// Most states per cut; all subsets of the unsynced writes if there are fewer.
const STATES: u64 = 48;

#[test]
fn flushed_data_survives_every_power_cut() {
    let dir = image_dir();
    let mut states = 0_u64;
    for seed in [1, 2] {
        let mut random = Random(0x9e37_79b9_7f4a_7c15 + seed);
        let memory = fresh();
        let start = memory.bytes();
        let mut disk = open(&memory);
        let events = work(&mut disk, &memory, &mut random, 70);
        let log = memory.log();
        for cut in 0..=log.len() {
            let allowed = Allowed::after(&fresh_tags(), &events, cut);
            let unsynced = log[..cut].iter().rev();
            let unsynced = unsynced
                .take_while(|op| matches!(op, Op::Write { .. }))
                .count();
            let subsets = 1_u64.checked_shl(unsynced as u32).unwrap_or(u64::MAX);
            for state in 0..subsets.min(STATES) {
                // The first two of many states: nothing and everything arrived.
                let torn = subsets > STATES && state >= 2 && state % 2 == 0;
                let image = crashed(&start, &log, cut, torn, |index| match state {
                    0 => false,
                    1 if subsets > STATES => true,
                    _ if subsets > STATES => random.below(2) == 0,
                    _ => state >> index & 1 != 0,
                });
                let crashed = Memory::new(image);
                let context = format!("seed {seed} cut {cut} state {state}");
                let mut disk = open(&crashed);
                allowed.check(&read_all(&mut disk), &context);
                drop(disk);
                states += 1;
                if states.is_multiple_of(97) {
                    check(dir.path(), &crashed.bytes(), true);
                    crash_again(&crashed, &mut random, &context);
                    check(dir.path(), &crashed.bytes(), true);
                }
            }
        }
        disk.flush().unwrap();
        check(dir.path(), &memory.bytes(), false);
    }
    assert!(states > 5_000, "only {states} states");
}

/// Uses the disk again after a crash, until a second power cut.
fn crash_again(memory: &Memory, random: &mut Random, context: &str) {
    let before = read_all(&mut open(memory));
    let start = memory.bytes();
    let mut disk = open(memory);
    let skip = memory.ops();
    let events = work(&mut disk, memory, random, 12);
    let log = memory.log();
    let cut = skip + random.below((log.len() - skip) as u64 + 1) as usize;
    let image = crashed(&start, &log[skip..], cut - skip, false, |_| {
        random.below(2) == 0
    });
    let allowed = Allowed::after(&before, &events, cut);
    let mut again = open(&Memory::new(image));
    allowed.check(&read_all(&mut again), &format!("{context}, then cut {cut}"));
}

#[test]
fn an_error_of_any_operation_loses_no_flushed_data() {
    let dir = image_dir();
    let total = run_with(Fault::None, false, None);
    for n in 0..total {
        let sample = n.is_multiple_of(11).then(|| dir.path());
        for patient in [false, true] {
            run_with(Fault::Once(n), patient, sample);
            run_with(Fault::From(n), patient, sample);
        }
    }
}

/// Runs a fixed workload on a host with `fault`. No completed write may be missing
/// while the disk is open, and no flushed one after it is opened again. If `patient`,
/// frees space after ENOSPC and repeats the operation, which must succeed. Returns
/// the number of host operations.
fn run_with(fault: Fault, patient: bool, check_in: Option<&Path>) -> usize {
    let mut random = Random(77);
    let memory = fresh();
    memory.fail(fault);
    let mut disk = open(&memory);
    let mut now: Vec<Vec<u64>> = fresh_tags().into_iter().map(|tag| vec![tag]).collect();
    let mut flushed = now.clone();
    for step in 1..=40 {
        let one = random_write(&mut random, step);
        let mut done = write(&mut disk, one, &mut random);
        if patient && done.as_ref().is_err_and(is_full) {
            memory.fail(Fault::None);
            done = write(&mut disk, one, &mut random);
            assert!(done.is_ok(), "{fault:?}: {done:?}");
        }
        let done = done.is_ok();
        for index in one.first..one.first + one.count {
            if done {
                now[index] = vec![step];
            } else {
                now[index].push(step);
            }
            flushed[index].push(step);
        }
        if step % 5 == 0 {
            let mut done = disk.flush();
            if patient && done.as_ref().is_err_and(is_full) {
                memory.fail(Fault::None);
                done = disk.flush();
                assert!(done.is_ok(), "{fault:?}: {done:?}");
            }
            if done.is_ok() {
                flushed.clone_from(&now);
            }
        }
    }
    let context = format!("{fault:?}");
    // While the disk is open, completed writes are visible, flushed or not.
    Allowed(now).check(&read_all(&mut disk), &context);
    drop(disk);
    memory.fail(Fault::None);
    Allowed(flushed).check(&read_all(&mut open(&memory)), &context);
    if let Some(dir) = check_in {
        check(dir, &memory.bytes(), true);
        crash_again(&memory, &mut random, &context);
        check(dir, &memory.bytes(), true);
    }
    memory.ops()
}

/// A write of one sector.
const ONE: Write = Write {
    first: 0,
    count: 1,
    tag: 7,
};

#[test]
fn after_a_failed_sync_every_flush_and_write_fails() {
    let memory = fresh();
    let mut disk = open(&memory);
    let mut random = Random(5);
    write(&mut disk, ONE, &mut random).unwrap();
    memory.fail(Fault::Once(memory.ops() + 1)); // the count, then the sync
    // Not `is_full` despite ENOSPC: free space does not restore the lost data.
    assert!(disk.flush().is_err_and(|error| !is_full(&error)));
    assert!(disk.flush().is_err(), "the next fdatasync would succeed");
    assert!(write(&mut disk, ONE, &mut random).is_err());
    assert_eq!(read_all(&mut disk)[0], 7);
}

#[test]
fn first_writes_that_fail_use_up_no_clusters() {
    let memory = fresh();
    let mut disk = open(&memory);
    let mut random = Random(5);
    memory.fail(Fault::From(0));
    for _ in 0..1000 {
        let error = write(&mut disk, ONE, &mut random).unwrap_err();
        assert!(is_full(&error), "{error}");
    }
    memory.fail(Fault::None);
    write(&mut disk, ONE, &mut random).unwrap();
    disk.flush().unwrap();
    let metadata = Layout::new(SIZE).unwrap().metadata_bytes();
    assert_eq!(memory.bytes().len() as u64, metadata + CLUSTER);
}
