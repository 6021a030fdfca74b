//! The host socket of a vsock connection, and the backlog of bytes for it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{self as sys, MsgFlags};
use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::packet::HEADER_SIZE;
use super::socket;
use crate::vmm::virtio::queue::Chain;

/// Who requested a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The guest.
    Guest,
    /// The host, for a socket; the id goes into the result.
    Dial(u64),
    /// The host, to test whether the guest answers; the id goes into the result.
    Probe(u64),
}

/// The host's end of a connection.
#[derive(Debug)]
pub struct Endpoint {
    /// Who requested it.
    pub origin: Origin,
    /// The socket may be readable or at its end. An epoll edge sets it, `EAGAIN`
    /// or the end of the stream clears it.
    pub readable: bool,
    /// The peer closed both directions (`EPOLLHUP`).
    pub hung_up: bool,
    /// Bytes for the guest before those of the socket.
    first: Vec<u8>,
    stream: Option<OwnedFd>,
    writable: bool,
    finished_reading: bool,
    finished_writing: bool,
    backlog: VecDeque<u8>,
}

impl Endpoint {
    /// The end of a connection on `stream`; a probe has none.
    pub fn new(origin: Origin, stream: Option<OwnedFd>) -> Self {
        Self {
            origin,
            readable: false,
            hung_up: false,
            first: Vec::new(),
            stream,
            writable: true,
            finished_reading: false,
            finished_writing: false,
            backlog: VecDeque::new(),
        }
    }

    /// The end of a connection to the guest, which gets the bytes `first` before those of
    /// `stream`.
    pub fn dialing(origin: Origin, stream: OwnedFd, first: Vec<u8>) -> Self {
        Self {
            readable: !first.is_empty(),
            first,
            ..Self::new(origin, Some(stream))
        }
    }

    /// The bytes for the guest before those of the socket.
    pub fn first(&self) -> &[u8] {
        &self.first
    }

    /// Moves bytes that precede those of the socket into `slices`, in order; how many.
    pub fn take_first<'m>(&mut self, slices: impl Iterator<Item = VolatileSlice<'m>>) -> u32 {
        if self.first.is_empty() {
            return 0;
        }
        let mut taken = 0;
        for slice in slices {
            let left = &self.first[taken..];
            let part = slice.len().min(left.len());
            slice.copy_from(&left[..part]);
            taken += part;
        }
        self.first.drain(..taken);
        taken as u32
    }

    /// The socket, unless it is closed.
    pub fn stream(&self) -> Option<BorrowedFd<'_>> {
        self.stream.as_ref().map(AsFd::as_fd)
    }

    /// Drops the backlog and takes the socket out.
    pub fn close(&mut self) -> Option<OwnedFd> {
        self.backlog = VecDeque::new();
        self.stream.take()
    }

    /// Bytes that the socket has not accepted yet.
    pub fn backlog(&self) -> usize {
        self.backlog.len()
    }

    /// The socket is writable again.
    pub fn set_writable(&mut self) {
        self.writable = true;
    }

    /// Drops the backlog: the peer reads no more.
    pub fn drop_backlog(&mut self) {
        self.backlog = VecDeque::new();
    }

    /// Writes `len` bytes of a packet's payload to the socket, and the rest to the
    /// backlog. Returns how many bytes the socket accepted.
    pub fn deliver(
        &mut self,
        chain: &Chain,
        memory: &GuestMemoryMmap,
        len: u32,
    ) -> io::Result<u32> {
        let start = HEADER_SIZE as u32;
        let mut done = 0;
        if self.backlog.is_empty() {
            while done < len && self.writable {
                let Some(stream) = self.stream.as_ref() else {
                    break;
                };
                let slices = chain.readable_slices(memory, start + done, (len - done) as usize);
                match socket::send(stream.as_fd(), slices) {
                    Ok(count) => done += count as u32,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        self.writable = false;
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        // The connection's credit bounds the backlog.
        for slice in chain.readable_slices(memory, start + done, (len - done) as usize) {
            self.append(&slice);
        }
        Ok(done)
    }

    fn append(&mut self, slice: &VolatileSlice<'_>) {
        let mut part = [0; 4096];
        let mut at = 0;
        while at < slice.len() {
            let Ok(rest) = slice.offset(at) else {
                return;
            };
            let count = rest.copy_to(&mut part[..]);
            self.backlog.extend(&part[..count]);
            at += count;
        }
    }

    /// Writes the backlog; returns how many bytes the socket accepted.
    pub fn flush(&mut self) -> io::Result<u32> {
        let mut done = 0;
        while self.writable && !self.backlog.is_empty() {
            let Some(stream) = self.stream.as_ref() else {
                break;
            };
            let (front, _) = self.backlog.as_slices();
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match sys::send(stream.as_raw_fd(), front, flags) {
                Ok(count) => {
                    self.backlog.drain(..count);
                    done += count as u32;
                }
                Err(nix::Error::EAGAIN) => self.writable = false,
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if self.backlog.is_empty() {
            // Frees the buffer, which `drain` keeps allocated.
            self.backlog = VecDeque::new();
        }
        Ok(done)
    }

    /// Ends the stream to the host: the guest sends no more, and the backlog is
    /// empty.
    pub fn finish_writing(&mut self) {
        if !std::mem::replace(&mut self.finished_writing, true) {
            self.shutdown(sys::Shutdown::Write);
        }
    }

    /// Makes the close of a client's TCP socket a reset if the guest's stream did not end, so
    /// that the client does not take the part that it got for the whole. A Unix socket, that
    /// of an `exec`, ignores the option: it carries frames, and its reader notices that the
    /// last one is missing.
    pub fn reset_if_cut_off(&self) {
        if let Some(stream) = &self.stream
            && matches!(self.origin, Origin::Dial(_))
            && !self.finished_writing
        {
            let linger = libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            // Does not fail for an open socket.
            let _ = sys::setsockopt(stream, sys::sockopt::Linger, &linger);
        }
    }

    /// Ends the stream from the host: the guest receives no more.
    pub fn finish_reading(&mut self) {
        if !std::mem::replace(&mut self.finished_reading, true) {
            self.shutdown(sys::Shutdown::Read);
        }
    }

    fn shutdown(&self, how: sys::Shutdown) {
        if let Some(stream) = &self.stream {
            // Fails only if the peer has closed, which epoll reports.
            let _ = sys::shutdown(stream.as_raw_fd(), how);
        }
    }
}
