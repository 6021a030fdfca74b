//! Backing of a virtual disk: a raw file, or a qcow2 diff over a raw base.
//!
//! Disks use only files that are already open: a name inside an image is never
//! opened. A base has a read-only descriptor.

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

/// A disk that one thread uses. Offsets and lengths are in bytes.
///
/// A completed write is visible to later reads at once, and is on stable storage
/// after the next successful [`Disk::flush`]. After a failed write each sector of
/// the range has old or new content. A write or flush that fails because the host's
/// disk is full ([`is_full`]) loses nothing and can be repeated.
pub trait Disk: Send {
    /// Constant size in bytes, a multiple of [`SECTOR`].
    fn size(&self) -> u64;

    /// Whether every write fails.
    fn read_only(&self) -> bool;

    /// Largest size in bytes that a file of the disk can reach.
    fn max_file_size(&self) -> u64 {
        self.size()
    }

    /// Fills `to` with the content from `offset` on. The range must be in the disk.
    fn read(&mut self, offset: u64, to: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// Writes all of `from` at `offset`. The range must be in the disk.
    fn write(&mut self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// Returns when everything written before is on stable storage. After a failed
    /// `fdatasync` every flush fails.
    fn flush(&mut self) -> io::Result<()>;
}

/// Whether the operation failed because the host's disk or quota is full.
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
        /// Every write fails.
        read_only: bool,
    },
    /// A qcow2 diff that [`create_diff`] created, over a raw base.
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
    /// The file is not a regular file, or is in use.
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
        /// The operation.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The size is not a positive multiple of [`SECTOR`].
    #[error("a disk of {bytes} bytes: the size must be a positive multiple of {SECTOR}")]
    Size {
        /// The size.
        bytes: u64,
    },
    /// The base is open for writing.
    #[error("the base image is open for writing; open it read-only")]
    WritableBase,
    /// The diff differs from those that [`create_diff`] creates.
    #[error("the diff disk cannot be used; re-create it, or inspect it with qemu-img")]
    Layout(#[from] LayoutError),
}

/// Locks the files of `backing` ([`lock()`]), checks them, and opens the disk. The
/// locks last as long as the files are open in any process.
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
