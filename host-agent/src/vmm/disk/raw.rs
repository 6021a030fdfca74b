//! A raw disk: the content of the disk is the content of the file.

use std::io;

use vm_memory::VolatileSlice;

use super::storage::Storage;
use super::{Disk, DiskError, SECTOR, slices};

/// A raw disk. The content is never interpreted: a qcow2 header that the guest
/// writes to sector 0 is data.
#[derive(Debug)]
pub struct Raw<S> {
    storage: S,
    size: u64,
    read_only: bool,
    sync_failed: bool,
}

impl<S: Storage> Raw<S> {
    /// A disk whose size is the length of `storage`.
    pub fn new(storage: S, read_only: bool) -> Result<Self, DiskError> {
        let size = storage.len().map_err(|source| DiskError::Io {
            action: "measure the raw file",
            source,
        })?;
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(DiskError::Size { bytes: size });
        }
        Ok(Self {
            storage,
            size,
            read_only,
            sync_failed: false,
        })
    }
}

impl<S: Storage> Disk for Raw<S> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&mut self, offset: u64, to: &[VolatileSlice<'_>]) -> io::Result<()> {
        check_range(self.size, offset, to)?;
        self.storage.read_at(offset, to)
    }

    fn write(&mut self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        check_range(self.size, offset, from)?;
        self.storage.write_at(offset, from)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        if self.sync_failed {
            return Err(earlier_sync_failed());
        }
        self.storage.sync().map_err(|error| {
            self.sync_failed = true;
            sync_failed(&error)
        })
    }
}

/// The error of a failed sync. It is never [`super::is_full`], even for ENOSPC: the
/// lost writes were acknowledged before, and a second sync cannot restore them.
pub(super) fn sync_failed(error: &io::Error) -> io::Error {
    io::Error::other(format!("flush failed, data may be lost: {error}"))
}

/// The error of every flush after a failed one. The kernel marks the pages of a
/// failed `fdatasync` clean, so the next call would succeed without them.
pub(super) fn earlier_sync_failed() -> io::Error {
    io::Error::other("an earlier flush failed, data may be lost")
}

/// Checks that `part` at `offset` is in the disk, independently of the device's own
/// check.
pub(super) fn check_range(size: u64, offset: u64, part: &[VolatileSlice<'_>]) -> io::Result<()> {
    match offset.checked_add(slices::total(part)) {
        Some(end) if end <= size => Ok(()),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}
