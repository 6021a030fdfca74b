//! One writer per image, by locks that belong to the open file.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// How long a lock may be held by a process that has just ended, or by one that
/// is just being started: between fork and exec a child has copies of all its
/// parent's descriptors, and with them the locks.
const GRACE: Duration = Duration::from_millis(500);
/// Time between two tries; there is no lock call with a time limit.
const PAUSE: Duration = Duration::from_millis(5);

/// How a file is going to be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Written, by nobody else.
    Exclusive,
    /// Only read, by as many as like.
    Shared,
}

/// Why a file cannot be used as a disk.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Devices, pipes and directories are never disks: a path that was swapped
    /// must not give a guest the host's disk.
    #[error("not a regular file")]
    NotRegular,
    /// Another process uses the file.
    #[error("in use by another process (see `lslocks`)")]
    InUse,
    /// The host refused.
    #[error("cannot lock")]
    Io(#[source] io::Error),
}

/// Checks that `file` is a regular file and locks all of it. Waits for half a
/// second at most, so not for a thread that has something else to do.
///
/// The lock is an open-file-description lock (`fcntl(2)`, `F_OFD_SETLK`): it goes
/// with the descriptor to another process, is gone when the last copy of the
/// descriptor is closed, and conflicts with the locks of `qemu-img`. An
/// exclusive lock needs a descriptor that can write, a shared one that can read.
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
        // A writer takes everything (0: to the end, wherever that will be). A
        // reader takes one byte, which is enough against a writer and leaves
        // alone those from 100 on by which qemu-img sees other users: with
        // them, nobody could check a diff while any guest runs on its base.
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
            Err(nix::Error::EAGAIN | nix::Error::EACCES) if start.elapsed() < GRACE => {
                std::thread::sleep(PAUSE);
            }
            Err(nix::Error::EAGAIN | nix::Error::EACCES) => return Err(LockError::InUse),
            Err(error) => return Err(LockError::Io(error.into())),
        }
    }
}

/// Whether nothing can be written through this descriptor.
pub fn is_read_only(file: &File) -> bool {
    fcntl(file.as_fd(), FcntlArg::F_GETFL)
        .is_ok_and(|flags| OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE == OFlag::O_RDONLY)
}
