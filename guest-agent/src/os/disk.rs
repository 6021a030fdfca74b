//! Disks by serial number; file systems on them.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use vmbus::text::chain;

use crate::clock;
use crate::failure::Failure;

/// `EXT4_IOC_RESIZE_FS` (Linux `fs/ext4/ext4.h`), and its unit: blocks of the file system,
/// of 4 KiB in an image.
const EXT4_RESIZE: libc::c_ulong = 0x4008_6610;
const EXT4_BLOCK: u64 = 4096;
/// Blocks of a group, and where the superblock lies.
const EXT4_GROUP: u64 = 8 * EXT4_BLOCK;
const EXT4_SUPERBLOCK_AT: u64 = 1024;
const EXT4_SUPERBLOCK_BYTES: usize = 1024;
/// Time between two looks for a disk.
const POLL_EVERY: Duration = Duration::from_millis(2);

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// No disk has the serial number.
    #[error("no disk with serial number {0}")]
    Missing(String),
    /// Its file system cannot be grown to the size of the disk.
    #[error("grow the file system on {}", .0.display())]
    Grow(PathBuf, #[source] io::Error),
    /// It cannot be mounted.
    #[error("mount {path} at {target}", path = .0.display(), target = .1)]
    Mount(PathBuf, String, #[source] io::Error),
}

/// The device of the disk with this serial number; waits at most `limit` for it to appear.
pub fn by_serial(serial: &str, limit: Duration) -> Result<PathBuf, DiskError> {
    let mut device = None;
    clock::eventually(limit, POLL_EVERY, || {
        device = find(serial);
        device.is_some()
    });
    device.ok_or_else(|| DiskError::Missing(serial.to_owned()))
}

fn find(serial: &str) -> Option<PathBuf> {
    let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let mut devices = entries.filter_map(|entry| {
        let found = fs::read_to_string(entry.path().join("serial")).ok()?;
        let device = Path::new("/dev").join(entry.file_name());
        (found.trim() == serial && device.exists()).then_some(device)
    });
    devices.next()
}

impl DiskError {
    /// Whether another attempt may succeed.
    pub fn failure(&self) -> Failure {
        let detail = chain(self);
        match self {
            Self::Missing(_) => Failure::passing(detail),
            Self::Grow(_, error) | Self::Mount(_, _, error) => Failure::of_setup(detail, error),
        }
    }
}

/// Mounts a disk. Does nothing where a disk is mounted at `target` already.
pub fn mount_at(
    device: &Path,
    target: &str,
    kind: &str,
    flags: MsFlags,
    data: Option<&str>,
) -> Result<(), DiskError> {
    let failed = |error| DiskError::Mount(device.to_owned(), target.to_owned(), error);
    let mounts = fs::read_to_string("/proc/mounts").map_err(failed)?;
    if mounts
        .lines()
        .any(|line| line.split(' ').nth(1) == Some(target))
    {
        return Ok(());
    }
    fs::create_dir_all(target).map_err(failed)?;
    mount(Some(device), target, Some(kind), flags, data).map_err(|errno| failed(errno.into()))
}

/// Mounts the resource disk, an ext4 file system with project quotas that the host copied
/// from the image, and grows it to the size of the disk. The kernel journals each step of
/// the growth, so a guest that ends half-way continues at its next boot.
pub fn mount_resource(device: &Path, target: &str, flags: MsFlags) -> Result<(), DiskError> {
    let quotas = "prjquota";
    mount_at(device, target, "ext4", flags, Some(quotas))?;
    grow(device, Path::new(target)).map_err(|error| DiskError::Grow(device.to_owned(), error))?;
    // A fresh disk reads as zeros, so the kernel need not zero its inode tables, which
    // kept an idle guest busy for minutes and filled the sparse file. The option is set only
    // now: with it the growth would zero the tables itself.
    let options = format!("{quotas},noinit_itable");
    let again = flags | MsFlags::MS_REMOUNT;
    mount(
        None::<&str>,
        target,
        None::<&str>,
        again,
        Some(options.as_str()),
    )
    .map_err(|errno| DiskError::Mount(device.to_owned(), target.to_owned(), errno.into()))
}

/// Grows the file system to the size of its disk. One that fills the disk is left alone,
/// since the kernel refuses to resize a file system that had an error, even to its size.
fn grow(device: &Path, mounted: &Path) -> io::Result<()> {
    let mut disk = File::open(device)?;
    let blocks = disk.seek(SeekFrom::End(0))? / EXT4_BLOCK;
    let mut superblock = [0; EXT4_SUPERBLOCK_BYTES];
    disk.read_exact_at(&mut superblock, EXT4_SUPERBLOCK_AT)?;
    // The kernel adds no last group that is too small for its own tables.
    if blocks.saturating_sub(ext4_blocks(&superblock)) < EXT4_GROUP {
        return Ok(());
    }
    let root = File::open(mounted)?;
    // SAFETY: the kernel reads one u64, which lives through the call.
    let result = unsafe { libc::ioctl(root.as_raw_fd(), EXT4_RESIZE, &raw const blocks) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// `s_blocks_count_lo` and `s_blocks_count_hi` (Linux `fs/ext4/ext4.h`).
fn ext4_blocks(superblock: &[u8; EXT4_SUPERBLOCK_BYTES]) -> u64 {
    let word = |at: usize| {
        let bytes = superblock[at..at + 4].try_into();
        u64::from(u32::from_le_bytes(bytes.expect("four bytes were cut out")))
    };
    word(0x4) | word(0x150) << 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_size_of_a_file_system_is_read_from_its_superblock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        File::create(&path).unwrap().set_len(64 << 20).unwrap();
        let made = Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-b", "4096"])
            .arg(&path)
            .arg("10001")
            .env("PATH", crate::environment::PATH)
            .status()
            .unwrap();
        assert!(made.success());
        let mut superblock = [0; EXT4_SUPERBLOCK_BYTES];
        let disk = File::open(&path).unwrap();
        disk.read_exact_at(&mut superblock, EXT4_SUPERBLOCK_AT)
            .unwrap();
        assert_eq!(ext4_blocks(&superblock), 10001);
        superblock[0x150] = 1;
        assert_eq!(ext4_blocks(&superblock), (1 << 32) + 10001);
    }
}
