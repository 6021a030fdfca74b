//! Disks by serial number; file systems on them.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};

/// Offset and value of ext4's magic (Linux `fs/ext4/ext4.h`).
const EXT4_MAGIC_AT: u64 = 0x438;
const EXT4_MAGIC: [u8; 2] = [0x53, 0xef];
/// A disk is blank when this many bytes at its start are zero.
const BLANK_BYTES: u64 = 64 * 1024;
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

/// Makes an ext4 file system with project quotas on a blank disk. A disk with
/// one is left as it is; a disk with anything else is an error.
pub fn format_if_blank(device: &Path) -> Result<(), DiskError> {
    let read = |error| DiskError::Read(device.to_owned(), error);
    let mut file = File::open(device).map_err(read)?;
    let mut magic = [0; 2];
    file.seek(SeekFrom::Start(EXT4_MAGIC_AT)).map_err(read)?;
    file.read_exact(&mut magic).map_err(read)?;
    if magic == EXT4_MAGIC {
        return Ok(());
    }
    file.rewind().map_err(read)?;
    let mut start = Vec::new();
    file.take(BLANK_BYTES)
        .read_to_end(&mut start)
        .map_err(read)?;
    if start.iter().any(|byte| *byte != 0) {
        return Err(DiskError::Foreign(device.to_owned()));
    }
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-O", "quota,project"])
        .args([
            "-E",
            "quotatype=prjquota,lazy_itable_init=1,lazy_journal_init=1,nodiscard",
        ])
        .arg(device)
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
