//! The file operations of a disk, as a trait that tests implement too.

use std::io;

use vm_memory::VolatileSlice;

/// A file. Writes beyond its end extend it, and unwritten parts read as zero.
pub trait Storage: Send {
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Whether the length is 0.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills `to` from `offset` on. `UnexpectedEof` if the file is too short.
    fn read_at(&self, offset: u64, to: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// Writes all of `from` at `offset`. After an error a part may be written.
    fn write_at(&mut self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// Returns when everything written is on stable storage.
    fn sync(&mut self) -> io::Result<()>;
}

/// [`Storage::read_at`] into plain memory.
pub fn read_bytes(storage: &impl Storage, offset: u64, to: &mut [u8]) -> io::Result<()> {
    storage.read_at(offset, &[VolatileSlice::from(to)])
}

/// [`Storage::write_at`] from plain memory, which is `mut` because a
/// [`VolatileSlice`] also allows writes to it.
pub fn write_bytes(storage: &mut impl Storage, offset: u64, from: &mut [u8]) -> io::Result<()> {
    storage.write_at(offset, &[VolatileSlice::from(from)])
}
