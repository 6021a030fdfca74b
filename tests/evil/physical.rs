//! Physical memory of the guest, through `/dev/mem`.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

/// A mapped range of physical addresses. Each access has exactly the width of its
/// type.
#[derive(Debug)]
pub struct Physical {
    base: *mut u8,
    /// First physical address.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
}

impl Physical {
    /// Maps device registers (`uncached`), or memory that the kernel does not use.
    pub fn map(start: u64, length: u64, uncached: bool) -> io::Result<Self> {
        let flags = if uncached { libc::O_SYNC } else { 0 };
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open("/dev/mem")?;
        let offset = i64::try_from(start).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address that the kernel chooses overlaps
        // no other mapping; it is never unmapped.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                memory.as_raw_fd(),
                offset,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            base: base.cast(),
            start,
            length,
        })
    }

    /// Reads at physical address `at`.
    pub fn read<T: Copy>(&self, at: u64) -> T {
        // SAFETY: `pointer` checks range and alignment; `T` is an integer, for
        // which every bit pattern is valid.
        unsafe { self.pointer::<T>(at).read_volatile() }
    }

    /// Writes at physical address `at`.
    pub fn write<T: Copy>(&self, at: u64, value: T) {
        // SAFETY: `pointer` checks range and alignment. A device may access the
        // memory at the same time, so the access is volatile.
        unsafe { self.pointer::<T>(at).write_volatile(value) }
    }

    fn pointer<T>(&self, at: u64) -> *mut T {
        let size = size_of::<T>() as u64;
        let offset = at.checked_sub(self.start).expect("address in the mapping");
        assert!(offset + size <= self.length && offset.is_multiple_of(size));
        // SAFETY: the assertion above keeps the offset within the mapping.
        unsafe { self.base.add(offset as usize) }.cast()
    }
}
