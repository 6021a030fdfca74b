//! Locks of disk images: one writer, or many readers.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// How long to wait for a lock. A process that has just ended may still hold it, and
/// so may a child between fork and exec, which has copies of its parent's
/// descriptors.
const LOCK_LIMIT: Duration = Duration::from_millis(500);
/// Time between two attempts: the system call has no time limit.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// How a file is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read and written by one user.
    Exclusive,
    /// Only read, by any number of users.
    Shared,
}

/// Why a file cannot be used as a disk.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Only a regular file can be a disk: a path that was replaced must not give a
    /// guest a device of the host.
    #[error("not a regular file")]
    NotRegular,
    /// Another process uses the file.
    #[error("in use by another process (see `lslocks`)")]
    InUse,
    /// The system call failed.
    #[error("cannot lock")]
    Io(#[source] io::Error),
}

/// Checks that `file` is a regular file and locks all of it. Blocks for at most
/// [`LOCK_LIMIT`].
///
/// The lock is an open-file-description lock (`fcntl(2)`, `F_OFD_SETLK`): it moves
/// with the descriptor to another process, ends when the last copy of the
/// descriptor is closed, and conflicts with the locks of `qemu-img`. An exclusive
/// lock needs a writable descriptor, a shared lock a readable one.
pub fn lock(file: &File, access: Access) -> Result<(), LockError> {
    let metadata = file.metadata().map_err(LockError::Io)?;
    if !metadata.is_file() {
        return Err(LockError::NotRegular);
    }
    let kind = match access {
        Access::Exclusive => libc::F_WRLCK,
        Access::Shared => libc::F_RDLCK,
    };
    let range = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        // A writer locks everything (0: to the end of the file, also if it
        // grows). A reader locks one byte, which excludes a writer. It does not
        // lock the bytes from 100 on, by which qemu-img detects other users:
        // qemu-img could not check a diff while a guest uses its base.
        l_len: match access {
            Access::Exclusive => 0,
            Access::Shared => 1,
        },
        l_pid: 0,
    };
    let start = Instant::now();
    loop {
        match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&range)) {
            Ok(_) => return Ok(()),
            Err(nix::Error::EAGAIN | nix::Error::EACCES) if start.elapsed() < LOCK_LIMIT => {
                std::thread::sleep(RETRY_INTERVAL);
            }
            Err(nix::Error::EAGAIN | nix::Error::EACCES) => return Err(LockError::InUse),
            Err(error) => return Err(LockError::Io(error.into())),
        }
    }
}

/// Whether the descriptor is open for reading only.
pub fn is_read_only(file: &File) -> bool {
    fcntl(file.as_fd(), FcntlArg::F_GETFL)
        .is_ok_and(|flags| OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE == OFlag::O_RDONLY)
}
