//! What backs a virtual disk: a raw file, or a qcow2 diff over a raw base.
//!
//! Disks are made of open files only. Nothing named inside an image is ever
//! opened, and a base is only ever read, through a descriptor that cannot
//! write.

mod create;
mod diff;
mod file;
mod lock;
mod raw;
mod slices;
mod storage;

use std::fs::File;
use std::io;

use vm_memory::VolatileSlice;

pub use create::create_diff;
pub use diff::Diff;
pub use diff::layout::{LayoutError, MAX_VIRTUAL_SIZE};
pub use lock::{Access, LockError, lock};
pub use raw::Raw;
pub use storage::Storage;

/// Unit of addressing on a virtio disk (virtio 1.2, 5.2.4).
pub const SECTOR: u64 = 512;

/// A disk in the hands of one thread. Offsets and lengths are in bytes.
///
/// A completed write is visible to later reads at once and is on stable storage
/// after the next successful [`Disk::flush`]. When a write fails, the range
/// holds old or new bytes, sector by sector. A write or flush that fails for want
/// of room ([`is_full`]) has lost nothing: it can be made again.
pub trait Disk: Send {
    /// Size in bytes, a multiple of [`SECTOR`]. Never changes.
    fn size(&self) -> u64;

    /// Whether every write is refused.
    fn read_only(&self) -> bool;

    /// Fills `to` from `offset` on. The range must lie in the disk.
    fn read(&mut self, offset: u64, to: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// Writes all of `from` at `offset`. The range must lie in the disk.
    fn write(&mut self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// Returns when everything written before is on stable storage. After the
    /// host failed to make something durable, no flush succeeds any more.
    fn flush(&mut self) -> io::Result<()>;
}

/// Whether the host had no room for what was tried.
pub fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// The open files of a disk.
#[derive(Debug)]
pub enum Backing {
    /// A raw file.
    Raw {
        /// The file; open for writing unless `read_only`.
        file: File,
        /// Refuse every write.
        read_only: bool,
    },
    /// A qcow2 diff made by [`create_diff`], over a raw base.
    Diff {
        /// The diff, open for reading and writing.
        diff: File,
        /// The base, open read-only.
        base: File,
    },
}

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file cannot be used as a disk, or somebody else uses it.
    #[error("{what} is not available")]
    Lock {
        /// Which file of the disk.
        what: &'static str,
        /// Why.
        #[source]
        source: LockError,
    },
    /// A file could not be read, written or measured.
    #[error("cannot {action}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The size is not one that a disk can have.
    #[error("a disk of {bytes} bytes: the size must be a positive multiple of {SECTOR}")]
    Size {
        /// The size.
        bytes: u64,
    },
    /// The base is open for writing.
    #[error("the base image is open for writing; open it read-only")]
    WritableBase,
    /// The diff is not one that [`create_diff`] makes.
    #[error("the diff disk cannot be used; re-create it, or inspect it with qemu-img")]
    Layout(#[from] LayoutError),
}

/// Locks the files of `backing` ([`lock()`]), checks them, and makes a disk of
/// them. The locks live as long as the files are open, here or in the process
/// that passed them.
pub fn open(backing: Backing) -> Result<Box<dyn Disk>, DiskError> {
    match backing {
        Backing::Raw { file, read_only } => {
            let access = if read_only {
                Access::Shared
            } else {
                Access::Exclusive
            };
            lock_as("the raw file", &file, access)?;
            Ok(Box::new(Raw::new(file, read_only)?))
        }
        Backing::Diff { diff, base } => {
            lock_as("the diff disk", &diff, Access::Exclusive)?;
            lock_as("the base image", &base, Access::Shared)?;
            if !lock::is_read_only(&base) {
                return Err(DiskError::WritableBase);
            }
            Ok(Box::new(Diff::open(diff, base)?))
        }
    }
}

fn lock_as(what: &'static str, file: &File, access: Access) -> Result<(), DiskError> {
    lock(file, access).map_err(|source| DiskError::Lock { what, source })
}

#[cfg(test)]
mod tests;
