//! Positioned reads and writes between a file and guest memory, without copies.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vm_memory::VolatileSlice;

use super::storage::Storage;

/// Buffers per system call. The kernel's limit is 1024 (`IOV_MAX`).
const BATCH: usize = 64;

type Transfer = unsafe extern "C" fn(RawFd, *const libc::iovec, i32, libc::off_t) -> isize;

/// Repeats `transfer` until all of `slices` is transferred.
fn transfer_all(
    file: &File,
    transfer: Transfer,
    at_end: io::ErrorKind,
    offset: u64,
    slices: &[VolatileSlice<'_>],
) -> io::Result<()> {
    let mut offset = offset;
    let mut first = 0;
    let mut skip = 0;
    loop {
        let mut batch = [libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        }; BATCH];
        let mut count = 0;
        for slice in slices[first..].iter().take(BATCH) {
            let start = if count == 0 { skip } else { 0 };
            batch[count] = libc::iovec {
                // `wrapping_add`: `start` is less than the slice's length, or
                // both are 0.
                iov_base: slice.ptr_guard_mut().as_ptr().wrapping_add(start).cast(),
                iov_len: slice.len() - start,
            };
            count += 1;
        }
        if count == 0 {
            return Ok(());
        }
        let wanted: usize = batch[..count].iter().map(|part| part.iov_len).sum();
        let mut done = 0;
        if wanted > 0 {
            let position = libc::off_t::try_from(offset)
                .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            // SAFETY: the first `count` elements of `batch` describe memory of
            // `slices`, which is mapped for the slices' lifetime. A
            // `VolatileSlice` guarantees that no Rust reference to it exists,
            // because the guest may change it at any time. The kernel accesses
            // nothing else.
            let result = unsafe {
                transfer(
                    file.as_raw_fd(),
                    batch.as_ptr(),
                    i32::try_from(count).expect("count is at most BATCH"),
                    position,
                )
            };
            if result < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
            if result == 0 {
                return Err(at_end.into());
            }
            done = result as usize;
        }
        offset += done as u64;
        // Advance to the first byte that was not transferred.
        skip += done;
        while first < slices.len() && skip >= slices[first].len() {
            skip -= slices[first].len();
            first += 1;
        }
    }
}

impl Storage for File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, offset: u64, to: &[VolatileSlice<'_>]) -> io::Result<()> {
        transfer_all(self, libc::preadv, io::ErrorKind::UnexpectedEof, offset, to)
    }

    fn write_at(&mut self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        transfer_all(self, libc::pwritev, io::ErrorKind::WriteZero, offset, from)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}
