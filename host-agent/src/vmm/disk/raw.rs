//! A raw file as a disk: what the guest sees is what the file holds.

use std::io;

use vm_memory::VolatileSlice;

use super::storage::Storage;
use super::{Disk, DiskError, SECTOR, slices};

/// A raw disk. What the guest writes is never looked at: a qcow2 header in
/// sector 0 is data like any other.
#[derive(Debug)]
pub struct Raw<S> {
    storage: S,
    size: u64,
    read_only: bool,
    sync_failed: bool,
}

impl<S: Storage> Raw<S> {
    /// Takes the length of `storage` as the size of the disk.
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

/// A failed sync, which is never [`super::is_full`]: what has no room then was
/// acknowledged before and may be gone, and a second try does not bring it back.
pub(super) fn sync_failed(error: &io::Error) -> io::Error {
    io::Error::other(format!("flush failed, data may be lost: {error}"))
}

/// After a failed `fdatasync` the kernel forgets which pages did not reach the
/// disk, and the next call succeeds without them. So the first failure is final.
pub(super) fn earlier_sync_failed() -> io::Error {
    io::Error::other("an earlier flush failed, data may be lost")
}

/// The device checks ranges too, against the same size; nothing here relies on it.
pub(super) fn check_range(size: u64, offset: u64, part: &[VolatileSlice<'_>]) -> io::Result<()> {
    match offset.checked_add(slices::total(part)) {
        Some(end) if end <= size => Ok(()),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}
