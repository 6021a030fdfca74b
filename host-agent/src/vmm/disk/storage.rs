//! What a disk needs of a file, so that tests can stand in for the host.

use std::io;

use vm_memory::VolatileSlice;

/// A file that grows when written beyond its end. Unwritten parts read zero.
pub trait Storage: Send {
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Whether there is nothing in it.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills `to` from `offset` on; `UnexpectedEof` if the file ends before.
    fn read_at(&self, offset: u64, to: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// Writes all of `from` at `offset`. On an error a part may be written.
    fn write_at(&mut self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// Returns when everything written is on stable storage.
    fn sync(&mut self) -> io::Result<()>;
}

/// [`Storage::read_at`] into plain memory.
pub fn read_bytes(storage: &impl Storage, offset: u64, to: &mut [u8]) -> io::Result<()> {
    storage.read_at(offset, &[VolatileSlice::from(to)])
}

/// [`Storage::write_at`] from plain memory (which must be exclusive because a
/// [`VolatileSlice`] could also be written to).
pub fn write_bytes(storage: &mut impl Storage, offset: u64, from: &mut [u8]) -> io::Result<()> {
    storage.write_at(offset, &[VolatileSlice::from(from)])
}
