//! The file as QEMU reads it, and damaged files.

use std::fs::File;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::time::ClockId;
use sha2::{Digest, Sha256};

use super::super::super::{Backing, create_diff};
use super::super::layout::HEAD;
use super::*;
use crate::vmm::disk::{Access, DiskError, LayoutError, MAX_VIRTUAL_SIZE, lock, open as open_disk};

fn digest(path: &Path) -> Vec<u8> {
    Sha256::digest(fs::read(path).unwrap()).to_vec()
}

fn pseudo_random(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed | 1);
    (0..len / 8)
        .flat_map(|_| (random.below(1 << 31) ^ random.below(1 << 31) << 32).to_le_bytes())
        .collect()
}

/// Waits until no process has a lock on the file: between fork and exec, a child of
/// another test has copies of all descriptors.
fn wait_unlocked(path: &Path) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let start = Instant::now();
    while let Err(error) = lock(&file, Access::Exclusive) {
        assert!(start.elapsed() < Duration::from_secs(20), "{error}");
    }
    // Opened by name, because a child may have a copy of this descriptor too.
    let all = libc::flock {
        l_type: libc::F_UNLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_SETLK(&all)).unwrap();
}

#[test]
fn qemu_reads_the_same_content_and_the_base_is_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let base_len = 40 * CLUSTER as usize + 1024;
    let size = 64 * CLUSTER + 512;
    let mut model = pseudo_random(base_len, 3);
    fs::write(at("base.raw"), &model).unwrap();
    let before = digest(&at("base.raw"));
    model.resize(size as usize, 0);

    let diff = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(at("diff.qcow2"));
    create_diff(diff.unwrap(), size, "base.raw").unwrap();
    let files = || Backing::Diff {
        diff: File::options()
            .read(true)
            .write(true)
            .open(at("diff.qcow2"))
            .unwrap(),
        base: File::open(at("base.raw")).unwrap(),
    };
    let mut disk = open_disk(files()).unwrap();
    assert_eq!((disk.size(), disk.read_only()), (size, false));
    let mut random = Random(11);
    for round in 0..600_u64 {
        let start = random.below(size / 512) * 512;
        let most = if round % 10 == 0 { 700 } else { 20 };
        let len = ((1 + random.below(most)) * 512).min(size - start);
        let mut bytes = pseudo_random(len as usize, round);
        disk.write(start, &[VolatileSlice::from(&mut bytes[..])])
            .unwrap();
        model[start as usize..(start + len) as usize].copy_from_slice(&bytes);
        if round % 50 == 0 {
            disk.flush().unwrap();
        }
        if round == 300 {
            drop(disk);
            disk = open_disk(files()).unwrap();
        }
    }
    let mut found = vec![0; size as usize];
    disk.read(0, &[VolatileSlice::from(&mut found[..])])
        .unwrap();
    assert!(found == model, "differs from the model");
    drop(disk);

    fs::write(at("model.raw"), &model).unwrap();
    let path = |name: &str| at(name).to_str().unwrap().to_owned();
    wait_unlocked(&at("diff.qcow2"));
    let compare = qemu_img(&[
        "compare",
        "-f",
        "qcow2",
        "-F",
        "raw",
        &path("diff.qcow2"),
        &path("model.raw"),
    ]);
    assert!(compare.status.success(), "{compare:?}");
    let checked = qemu_img(&["check", "-f", "qcow2", &path("diff.qcow2")]);
    assert!(checked.status.success(), "{checked:?}");
    let info = qemu_img(&["info", "--backing-chain", &path("diff.qcow2")]);
    let text = String::from_utf8(info.stdout).unwrap();
    assert!(text.contains("backing file format: raw"), "{text}");
    assert_eq!(digest(&at("base.raw")), before);
    let held = fs::metadata(at("diff.qcow2")).unwrap().len();
    assert!(
        held <= size + size / 100 + 6 * CLUSTER,
        "{held} bytes for {size}"
    );
}

#[test]
fn the_file_is_bounded_by_the_written_clusters() {
    let memory = fresh();
    let mut random = Random(3);
    let mut bytes = [9; 512];
    for _ in 0..4 {
        let mut disk = open(&memory);
        for step in 0..5_000_u64 {
            let offset = hot_offset(random.below(HOT_SECTORS as u64) as usize);
            disk.write(offset, &[VolatileSlice::from(&mut bytes[..])])
                .unwrap();
            if step % 100 == 0 {
                disk.flush().unwrap();
            }
        }
    }
    // The three hot ranges touch at most 11 clusters.
    let layout = Layout::new(SIZE).unwrap();
    let most = layout.metadata_bytes() + 11 * CLUSTER;
    assert!(memory.bytes().len() as u64 <= most);
    // At the largest size, the metadata is less than 1 %.
    let largest = Layout::new(MAX_VIRTUAL_SIZE).unwrap();
    assert!(largest.metadata_bytes() <= MAX_VIRTUAL_SIZE / 100);
}

#[test]
fn refcount_blocks_cover_the_file_at_every_size() {
    let sizes = [
        512,
        CLUSTER,
        CLUSTER + 512,
        512 << 20,
        (512 << 20) + 512,
        2 << 30,
    ];
    for size in sizes
        .into_iter()
        .chain([8 << 30, 64 << 30, MAX_VIRTUAL_SIZE])
    {
        let layout = Layout::new(size).unwrap();
        assert!(
            layout.refcount_offset(layout.end) <= layout.l2_offset(0),
            "{size}"
        );
        assert_eq!(
            layout.l2_offset(layout.l2_tables),
            layout.metadata_bytes(),
            "{size}"
        );
    }
    for size in [0, 1, 513, MAX_VIRTUAL_SIZE + 512, u64::MAX] {
        assert_eq!(Layout::new(size), Err(LayoutError::VirtualSize(size)));
    }
}

/// Offsets and new values of header fields and table entries.
fn mutations() -> Vec<(usize, Vec<u8>)> {
    let mut list = Vec::new();
    let field = |at: usize, len: usize| {
        let values = [
            0,
            1,
            9,
            0x7fff_ffff,
            0xffff_ffff,
            1 << 40,
            1 << 62,
            u64::MAX,
        ];
        values.map(|value: u64| (at, value.to_be_bytes()[8 - len..].to_vec()))
    };
    // Every field of the header (qcow2.txt), the extension, and the tables.
    for at in [0, 4, 16, 20, 32, 36, 56, 60, 96, 100, 104, 108] {
        list.extend(field(at, 4));
    }
    for at in [8, 24, 40, 48, 64, 72, 80, 88] {
        list.extend(field(at, 8));
    }
    let layout = Layout::new(SIZE).unwrap();
    for at in [
        layout.l1().0,
        layout.refcounts().0,
        layout.l2_offset(0),
        layout.l2_offset(2),
    ] {
        list.extend(field(at as usize, 8));
        list.extend(field(at as usize + 16, 8));
    }
    list
}

#[test]
fn a_damaged_image_is_refused_or_read_safely() {
    let good = {
        let memory = fresh();
        let mut disk = open(&memory);
        let mut random = Random(1);
        for index in [0, 200, HOT_SECTORS - 1] {
            let one = Write {
                first: index,
                count: 1,
                tag: 5,
            };
            write(&mut disk, one, &mut random).unwrap();
        }
        disk.flush().unwrap();
        memory.bytes()
    };
    let mutations = mutations();
    assert!(mutations.len() >= 60);
    let mut refused = 0;
    let mut try_open = |image: Vec<u8>, what: &str| {
        // CPU time of this thread: other tests run at the same time.
        let clock = || Duration::from(ClockId::CLOCK_THREAD_CPUTIME_ID.now().unwrap());
        let started = clock();
        let result = Diff::open(Memory::new(image), Computed { len: BASE_LEN });
        let took = clock().saturating_sub(started);
        assert!(took < Duration::from_millis(50) * 4, "{what}: {took:?}");
        match result {
            Ok(mut disk) => {
                read_all_bytes(&mut disk);
            }
            Err(DiskError::Layout(_) | DiskError::Io { .. }) => refused += 1,
            Err(error) => panic!("{what}: {error}"),
        }
    };
    for (at, value) in &mutations {
        let mut image = good.clone();
        image[*at..at + value.len()].copy_from_slice(value);
        try_open(image, &format!("{value:x?} at {at}"));
    }
    for len in [
        0,
        1,
        103,
        104,
        HEAD - 1,
        HEAD,
        good.len() / 2,
        good.len() - 1,
    ] {
        try_open(good[..len].to_vec(), &format!("cut to {len}"));
    }
    let mut random = Random(21);
    for _ in 0..500 {
        let mut image = good.clone();
        let at = random.below(160) as usize;
        image[at] ^= 1 << random.below(8);
        try_open(image, &format!("bit flip in byte {at}"));
    }
    assert!(refused > mutations.len() / 2, "{refused} refused");
}

fn read_all_bytes(disk: &mut Tested) {
    let mut bytes = vec![0; CLUSTER as usize];
    for (start, _) in HOT {
        disk.read(start, &[VolatileSlice::from(&mut bytes[..])])
            .unwrap();
    }
}

#[test]
fn an_image_with_unknown_incompatible_features_is_refused() {
    let good = fresh().bytes();
    // Known bits, such as that of a dirty image, have no meaning for this reader
    // either (qcow2.txt, bytes 72 to 79).
    for bit in 0..64 {
        let mut image = good.clone();
        image[72..80].copy_from_slice(&(1_u64 << bit).to_be_bytes());
        let error = Diff::open(Memory::new(image), Computed { len: BASE_LEN }).unwrap_err();
        let text = vmbus::text::chain(&error);
        assert!(text.contains("incompatible_features"), "{bit}: {text}");
    }
}

/// An image whose first cluster has data.
fn with_one_cluster() -> Vec<u8> {
    let memory = fresh();
    let mut disk = open(&memory);
    let one = Write {
        first: 0,
        count: 1,
        tag: 5,
    };
    write(&mut disk, one, &mut Random(1)).unwrap();
    disk.flush().unwrap();
    memory.bytes()
}

#[test]
fn two_entries_for_one_cluster_are_refused() {
    let mut image = with_one_cluster();
    let table = Layout::new(SIZE).unwrap().l2_offset(0) as usize;
    image.copy_within(table..table + 8, table + 8);
    let error = Diff::open(Memory::new(image), Computed { len: BASE_LEN }).unwrap_err();
    assert!(
        matches!(
            error,
            DiskError::Layout(LayoutError::Entry { index: 1, .. })
        ),
        "{error}"
    );
}

#[test]
fn a_compressed_cluster_is_refused() {
    let good = with_one_cluster();
    let table = Layout::new(SIZE).unwrap().l2_offset(0) as usize;
    // Bit 62 of an entry: the cluster is compressed; bit 0: it reads as zeros
    // (qcow2.txt, "L2 table entry").
    for (byte, bit) in [(0, 0x40), (7, 1)] {
        let mut image = good.clone();
        image[table + byte] |= bit;
        let opened = Diff::open(Memory::new(image), Computed { len: BASE_LEN });
        let error = opened.map(drop).unwrap_err();
        assert!(
            matches!(
                error,
                DiskError::Layout(LayoutError::Entry { index: 0, .. })
            ),
            "{error}"
        );
    }
}

#[test]
fn images_of_other_tools_are_refused() {
    let dir = image_dir();
    let path = dir.path().join("foreign.qcow2");
    let path = path.to_str().unwrap();
    let made = qemu_img(&[
        "create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", path, "1G",
    ]);
    assert!(made.status.success(), "{made:?}");
    let image = Memory::new(fs::read(path).unwrap());
    let error = Diff::open(image, Computed { len: BASE_LEN }).unwrap_err();
    assert!(matches!(error, DiskError::Layout(_)), "{error}");
}

#[test]
fn an_image_repaired_by_qemu_opens() {
    let dir = image_dir();
    let memory = fresh();
    let mut disk = open(&memory);
    for first in [0, 300, 700] {
        let one = Write {
            first,
            count: 3,
            tag: 9,
        };
        write(&mut disk, one, &mut Random(1)).unwrap();
    }
    disk.flush().unwrap();
    let expected = read_all(&mut disk);
    // A leaked cluster, as after a crash.
    let layout = Layout::new(SIZE).unwrap();
    let mut image = memory.bytes();
    let count = layout.refcount_offset(layout.first_data + 50) as usize;
    image[count + 1] = 1;
    let path = dir.path().join("leaky.qcow2");
    fs::write(&path, &image).unwrap();
    let repaired = qemu_img(&[
        "check",
        "-r",
        "leaks",
        "-f",
        "qcow2",
        path.to_str().unwrap(),
    ]);
    assert!(repaired.status.success(), "{repaired:?}");
    let image = fs::read(&path).unwrap();
    let mut disk = open(&Memory::new(image));
    assert_eq!(read_all(&mut disk), expected);
}
