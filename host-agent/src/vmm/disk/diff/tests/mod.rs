//! Tests of a diff on hosts that crash and fail, against a model of what may be lost.

mod crash;
mod format;
mod host;

use std::fs;
use std::path::Path;
use std::process::Command;

use vm_memory::VolatileSlice;

use super::super::create::write_metadata;
use super::super::{Disk, SECTOR};
use super::Diff;
use super::layout::{CLUSTER, Layout};
use crate::property::Random;
use host::{BASE, Computed, Memory};

/// A sector filled with the tag of its write.
pub fn tagged(tag: u64) -> [u8; 512] {
    let mut sector = [0; 512];
    for word in sector.chunks_exact_mut(8) {
        word.copy_from_slice(&tag.to_le_bytes());
    }
    sector
}

/// The tag of a sector, which must come from one write.
fn tag(sector: &[u8]) -> u64 {
    let tag = u64::from_le_bytes(sector[..8].try_into().unwrap());
    assert_eq!(sector, tagged(tag), "a sector mixes two writes");
    tag
}

/// Size of the virtual disk: a little over 1 GiB, so three L2 tables. It ends in the
/// middle of a cluster.
const SIZE: u64 = (1 << 30) + 5 * CLUSTER + 3 * SECTOR;
/// Size of the base, which ends in the middle of a cluster too.
const BASE_LEN: u64 = (512 << 20) + CLUSTER + 7 * SECTOR;
/// The ranges that tests write: the start, a range across two L2 tables and the end
/// of the base, and the end.
const HOT: [(u64, u64); 3] = [
    (0, 3 * CLUSTER),
    ((512 << 20) - 2 * CLUSTER, 4 * CLUSTER),
    (SIZE - 2 * CLUSTER - 3 * SECTOR, 2 * CLUSTER + 3 * SECTOR),
];
const HOT_SECTORS: usize = ((HOT[0].1 + HOT[1].1 + HOT[2].1) / SECTOR) as usize;

/// Tags of all hot sectors in an untouched disk.
fn fresh_tags() -> Vec<u64> {
    let sectors = HOT.iter().flat_map(|(start, len)| {
        let first = start / SECTOR;
        first..first + len / SECTOR
    });
    sectors
        .map(|sector| {
            if sector < BASE_LEN / SECTOR {
                BASE + sector
            } else {
                0
            }
        })
        .collect()
}

/// A write of the test: index of the first hot sector, number of sectors, tag.
#[derive(Debug, Clone, Copy)]
struct Write {
    first: usize,
    count: usize,
    tag: u64,
}

/// A random write within one hot range: often small, sometimes all of it.
fn random_write(random: &mut Random, tag: u64) -> Write {
    let range = random.below(3) as usize;
    let before: u64 = HOT[..range].iter().map(|(_, len)| len / SECTOR).sum();
    let sectors = HOT[range].1 / SECTOR;
    let start = random.below(sectors);
    let most = match random.below(8) {
        0 => sectors,
        1 => 200,
        _ => 12,
    };
    Write {
        first: (before + start) as usize,
        count: (1 + random.below(most)).min(sectors - start) as usize,
        tag,
    }
}

fn hot_offset(index: usize) -> u64 {
    let mut left = index as u64 * SECTOR;
    for (start, len) in HOT {
        if left < len {
            return start + left;
        }
        left -= len;
    }
    unreachable!("index within the hot sectors");
}

type Tested = Diff<Memory, Computed>;

fn write(disk: &mut Tested, write: Write, random: &mut Random) -> std::io::Result<()> {
    let mut bytes = tagged(write.tag).repeat(write.count);
    // Two buffers, split at any byte.
    let cut = random.below(bytes.len() as u64 + 1) as usize;
    let (left, right) = bytes.split_at_mut(cut);
    let parts = [VolatileSlice::from(left), VolatileSlice::from(right)];
    disk.write(hot_offset(write.first), &parts)
}

/// Tags of all hot sectors.
fn read_all(disk: &mut Tested) -> Vec<u64> {
    let mut tags = Vec::with_capacity(HOT_SECTORS);
    for (start, len) in HOT {
        let mut bytes = vec![0xee; len as usize];
        let cut = 1000;
        let (left, right) = bytes.split_at_mut(cut);
        let parts = [VolatileSlice::from(left), VolatileSlice::from(right)];
        disk.read(start, &parts).unwrap();
        tags.extend(bytes.chunks_exact(512).map(tag));
    }
    tags
}

/// A new diff of [`SIZE`] in memory.
fn fresh() -> Memory {
    let layout = Layout::new(SIZE).unwrap();
    let mut memory = Memory::new(vec![0; layout.metadata_bytes() as usize]);
    let mut head = layout.head("base.raw").unwrap();
    write_metadata(&mut memory, &layout, &mut head).unwrap();
    Memory::new(memory.bytes())
}

fn open(memory: &Memory) -> Tested {
    Diff::open(memory.clone(), Computed { len: BASE_LEN }).unwrap()
}

/// A directory in which `qemu-img` finds the base of images from [`fresh`].
fn image_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let base = fs::File::create(dir.path().join("base.raw")).unwrap();
    base.set_len(BASE_LEN).unwrap();
    dir
}

/// Fails if `qemu-img check` finds errors, or leaked clusters that are not allowed.
fn check(dir: &Path, image: &[u8], leaks_allowed: bool) {
    let path = dir.join("diff.qcow2");
    fs::write(&path, image).unwrap();
    let output = qemu_img(&["check", "-f", "qcow2", path.to_str().unwrap()]);
    // Exit code 3: only leaked clusters (qemu-img(1)).
    let fine = match output.status.code() {
        Some(0) => true,
        Some(3) => leaks_allowed,
        _ => false,
    };
    assert!(fine, "{output:?}");
}

fn qemu_img(arguments: &[&str]) -> std::process::Output {
    Command::new("qemu-img")
        .args(arguments)
        .output()
        .expect("qemu-img is installed (Debian package qemu-utils)")
}
