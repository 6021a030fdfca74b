//! Disks by serial number; file systems on them.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};

/// Offset and value of ext4's magic (Linux `fs/ext4/ext4.h`).
const EXT4_MAGIC_AT: u64 = 0x438;
const EXT4_MAGIC: [u8; 2] = [0x53, 0xef];
/// A disk is blank when this many bytes at its start are zero.
const BLANK_BYTES: usize = 64 * 1024;
/// The end of a disk is no part of the file system on it: from before it is made
/// until it is whole, these words are there. A guest can end at any time, and
/// half a file system is neither blank nor to be mounted.
const UNFINISHED: &[u8; 32] = b"host-agent: format not finished\n";
const END_BYTES: u64 = 4096;
/// Time for a disk to appear, and between two looks.
const APPEAR_LIMIT: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// What went wrong with a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// No disk has the serial number.
    #[error("no disk with serial number {0}")]
    Missing(String),
    /// It cannot be read.
    #[error("read {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// It holds something that is no file system of ours.
    #[error("{} holds unknown data: it is left alone", .0.display())]
    Foreign(PathBuf),
    /// How far its formatting is cannot be noted on it.
    #[error("write to {}", .0.display())]
    Mark(PathBuf, #[source] io::Error),
    /// No file system could be made.
    #[error("make a file system on {path}: {reason}", path = .0.display(), reason = .1)]
    Format(PathBuf, String),
    /// It cannot be mounted.
    #[error("mount {path} at {target}", path = .0.display(), target = .1)]
    Mount(PathBuf, String, #[source] io::Error),
}

/// The device of the disk with this serial number; waits for it to appear.
pub fn by_serial(serial: &str) -> Result<PathBuf, DiskError> {
    let deadline = Instant::now() + APPEAR_LIMIT;
    loop {
        for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
            let found = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
            let device = Path::new("/dev").join(entry.file_name());
            if found.trim() == serial && device.exists() {
                return Ok(device);
            }
        }
        if Instant::now() > deadline {
            return Err(DiskError::Missing(serial.to_owned()));
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// Makes an ext4 file system with project quotas on a blank disk, or on one
/// where that was begun and not finished. A disk with one is left as it is; a
/// disk with anything else is an error.
pub fn format_if_blank(device: &Path) -> Result<(), DiskError> {
    format_with(device, make_ext4)
}

/// `make` is given the device and the size of the file system in KiB.
fn format_with(
    device: &Path,
    make: impl FnOnce(&Path, u64) -> Result<(), DiskError>,
) -> Result<(), DiskError> {
    let read = |error| DiskError::Read(device.to_owned(), error);
    let mark = |error| DiskError::Mark(device.to_owned(), error);
    let mut file = File::options()
        .read(true)
        .write(true)
        .open(device)
        .map_err(read)?;
    let size = file.seek(SeekFrom::End(0)).map_err(read)?;
    let Some(end) = size.checked_sub(END_BYTES) else {
        return Err(DiskError::Foreign(device.to_owned()));
    };
    let mut found = [0; UNFINISHED.len()];
    file.read_exact_at(&mut found, end).map_err(read)?;
    if found != *UNFINISHED {
        let mut magic = [0; 2];
        file.read_exact_at(&mut magic, EXT4_MAGIC_AT)
            .map_err(read)?;
        if magic == EXT4_MAGIC {
            return Ok(());
        }
        let mut start = vec![0; BLANK_BYTES];
        file.read_exact_at(&mut start, 0).map_err(read)?;
        if start.iter().any(|byte| *byte != 0) {
            return Err(DiskError::Foreign(device.to_owned()));
        }
        file.write_all_at(UNFINISHED, end).map_err(mark)?;
        file.sync_all().map_err(mark)?;
    }
    make(device, end / 1024)?;
    // All of it is on the disk before it is said to be whole, and that before
    // anything is written into it.
    file.sync_all().map_err(mark)?;
    file.write_all_at(&[0; UNFINISHED.len()], end)
        .map_err(mark)?;
    file.sync_all().map_err(mark)
}

fn make_ext4(device: &Path, kib: u64) -> Result<(), DiskError> {
    let output = Command::new("mkfs.ext4")
        // "default" whatever the size: for less than 512 MiB it would make small
        // blocks and many inodes.
        .args(["-q", "-F", "-T", "default", "-O", "quota,project"])
        .args([
            "-E",
            "quotatype=prjquota,lazy_itable_init=1,lazy_journal_init=1,nodiscard",
        ])
        .arg(device)
        .arg(format!("{kib}k"))
        .env("PATH", crate::setup::PATH)
        .output()
        .map_err(|e| DiskError::Format(device.to_owned(), format!("mkfs.ext4: {e}")))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(DiskError::Format(device.to_owned(), text))
}

/// Mounts a disk; one that is mounted there already is fine.
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

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 8 << 20;

    fn killed(device: &Path) -> DiskError {
        DiskError::Format(device.to_owned(), "killed".into())
    }

    fn never(device: &Path, _: u64) -> Result<(), DiskError> {
        panic!("{} is formatted", device.display())
    }

    /// The state after a guest that ended while `at` held `bytes` already.
    fn cut_short(at: u64, bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        File::create(&disk).unwrap().set_len(SIZE).unwrap();
        format_with(&disk, |device, kib| {
            assert_eq!(kib * 1024, SIZE - END_BYTES);
            let file = File::options().write(true).open(device).unwrap();
            file.write_all_at(bytes, at).unwrap();
            Err(killed(device))
        })
        .unwrap_err();
        (dir, disk)
    }

    #[test]
    fn a_format_that_was_cut_short_is_done_again_and_a_whole_one_never() {
        // Tables without a superblock, and a superblock without tables.
        for (at, bytes) in [(4096, &[7; 64][..]), (EXT4_MAGIC_AT, &EXT4_MAGIC)] {
            let (_dir, disk) = cut_short(at, bytes);
            format_with(&disk, |device, _| Err(killed(device))).unwrap_err();
            format_if_blank(&disk).unwrap();
            let whole = fs::read(&disk).unwrap();
            format_with(&disk, never).unwrap();
            assert_eq!(whole, fs::read(&disk).unwrap());
            let check = Command::new("e2fsck")
                .args(["-f", "-n"])
                .arg(&disk)
                .env("PATH", crate::setup::PATH)
                .output()
                .unwrap();
            assert!(check.status.success(), "{check:?}");
        }
    }

    #[test]
    fn a_disk_with_unknown_data_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        let file = File::create(&disk).unwrap();
        file.set_len(SIZE).unwrap();
        file.write_all_at(b"data", 512).unwrap();
        let before = fs::read(&disk).unwrap();
        let refused = format_with(&disk, never).unwrap_err();
        assert!(matches!(refused, DiskError::Foreign(_)), "{refused}");
        assert_eq!(before, fs::read(&disk).unwrap());
    }
}
