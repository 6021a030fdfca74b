//! Transfers between a stream socket and guest memory without an extra copy.
//!
//! A running guest changes its memory at any time, so no Rust reference to those
//! bytes may exist; the kernel copies from and to the raw ranges.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

/// Most ranges per system call: more than a driver needs for 64 KiB in pages, and
/// few enough for the stack. The next call transfers the rest.
pub const MAX_RANGES: usize = 64;

/// Reads available bytes into `slices`, in order. 0 means end of stream, so
/// `slices` must not be empty.
pub fn receive<'m>(
    socket: BorrowedFd<'_>,
    slices: impl Iterator<Item = VolatileSlice<'m>>,
) -> io::Result<usize> {
    with_message(slices, |message| {
        // SAFETY: the message points to ranges of mapped guest memory that the
        // slices keep borrowed for the duration of the call, and the kernel
        // writes nowhere else. The descriptor is open, as it is borrowed.
        unsafe { libc::recvmsg(socket.as_raw_fd(), message, libc::MSG_DONTWAIT) }
    })
}

/// Writes `slices`, in order; returns the number of bytes that the socket accepted.
pub fn send<'m>(
    socket: BorrowedFd<'_>,
    slices: impl Iterator<Item = VolatileSlice<'m>>,
) -> io::Result<usize> {
    with_message(slices, |message| {
        // SAFETY: as in `receive`, except that the kernel only reads. A guest
        // that changes the bytes meanwhile only changes what it sends.
        unsafe {
            libc::sendmsg(
                socket.as_raw_fd(),
                message,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        }
    })
}

fn with_message<'m>(
    slices: impl Iterator<Item = VolatileSlice<'m>>,
    call: impl Fn(&mut libc::msghdr) -> isize,
) -> io::Result<usize> {
    let mut ranges = [libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    }; MAX_RANGES];
    let mut count = 0;
    for (range, slice) in ranges.iter_mut().zip(slices) {
        range.iov_base = slice.ptr_guard_mut().as_ptr().cast();
        range.iov_len = slice.len();
        count += 1;
    }
    // SAFETY: an all-zero msghdr is a valid one: null pointers, zero lengths.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = ranges.as_mut_ptr();
    message.msg_iovlen = count;
    loop {
        let result = call(&mut message);
        if result >= 0 {
            return Ok(result as usize);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    #[test]
    fn scattered_ranges_are_sent_and_received_in_order() {
        let memory =
            GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).expect("memory");
        memory
            .write_slice(b"hello, ", GuestAddress(0x100))
            .expect("write");
        memory
            .write_slice(b"guest", GuestAddress(0x40))
            .expect("write");
        let slice = |at, len| memory.get_slice(GuestAddress(at), len).expect("slice");
        let (a, b) = UnixStream::pair().expect("pair");

        let sent = send(a.as_fd(), [slice(0x100, 7), slice(0x40, 5)].into_iter()).expect("send");
        assert_eq!(sent, 12);
        let got = receive(
            b.as_fd(),
            [slice(0x1000, 3), slice(0x2000, 100)].into_iter(),
        );
        assert_eq!(got.expect("receive"), 12);
        let mut out = [0; 12];
        memory
            .read_slice(&mut out[..3], GuestAddress(0x1000))
            .expect("read");
        memory
            .read_slice(&mut out[3..], GuestAddress(0x2000))
            .expect("read");
        assert_eq!(&out, b"hello, guest");
    }

    #[test]
    fn calls_never_block_and_a_closed_peer_raises_no_signal() {
        let memory =
            GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("memory");
        let slice = || std::iter::once(memory.get_slice(GuestAddress(0), 0x1000).expect("slice"));
        let (a, b) = UnixStream::pair().expect("pair");
        let empty = receive(a.as_fd(), slice()).expect_err("nothing to read");
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
        let full = loop {
            if let Err(error) = send(a.as_fd(), slice()) {
                break error;
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        drop(b);
        let closed = send(a.as_fd(), slice()).expect_err("closed");
        assert_eq!(closed.kind(), io::ErrorKind::BrokenPipe);
    }
}
