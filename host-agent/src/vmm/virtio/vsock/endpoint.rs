//! The host socket of a vsock connection and what it has not taken yet.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{self as sys, MsgFlags};
use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::packet::HEADER_SIZE;
use super::socket;
use crate::vmm::virtio::queue::Chain;

/// Who wanted a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The guest.
    Guest,
    /// The host, to join it with a socket; answered with this id.
    Dial(u64),
    /// The host, to see whether the guest answers; answered with this id.
    Probe(u64),
}

/// The host's end of a connection.
#[derive(Debug)]
pub struct Endpoint {
    /// Who wanted it.
    pub origin: Origin,
    /// The socket may have something to read, if only its end. Set by an edge,
    /// cleared when the socket says otherwise.
    pub readable: bool,
    /// Nothing will come after what is there: the peer closed altogether.
    pub hung_up: bool,
    stream: Option<OwnedFd>,
    writable: bool,
    finished_reading: bool,
    finished_writing: bool,
    backlog: VecDeque<u8>,
}

impl Endpoint {
    /// An end on `stream`; none for a probe.
    pub fn new(origin: Origin, stream: Option<OwnedFd>) -> Self {
        Self {
            origin,
            readable: false,
            hung_up: false,
            stream,
            writable: true,
            finished_reading: false,
            finished_writing: false,
            backlog: VecDeque::new(),
        }
    }

    /// The socket, unless it was closed.
    pub fn stream(&self) -> Option<BorrowedFd<'_>> {
        self.stream.as_ref().map(AsFd::as_fd)
    }

    /// Gives up the socket and what it did not take.
    pub fn close(&mut self) -> Option<OwnedFd> {
        self.backlog = VecDeque::new();
        self.stream.take()
    }

    /// Bytes that the socket has not taken yet.
    pub fn backlog(&self) -> usize {
        self.backlog.len()
    }

    /// The socket takes bytes again.
    pub fn set_writable(&mut self) {
        self.writable = true;
    }

    /// Drops what the socket has not taken: nobody reads it.
    pub fn drop_backlog(&mut self) {
        self.backlog = VecDeque::new();
    }

    /// Writes `len` bytes of payload of a packet to the socket and keeps what
    /// it does not take. Returns how many it took.
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
        // The connection's credit bounds what gets here.
        for slice in chain.readable_slices(memory, start + done, (len - done) as usize) {
            self.keep(&slice);
        }
        Ok(done)
    }

    fn keep(&mut self, slice: &VolatileSlice<'_>) {
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

    /// Writes what was kept; returns how many bytes the socket took now.
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
            // A connection that once had a slow reader does not keep its
            // buffer for ever.
            self.backlog = VecDeque::new();
        }
        Ok(done)
    }

    /// The guest sends no more and all of it was taken: so tell the reader.
    pub fn finish_writing(&mut self) {
        if !std::mem::replace(&mut self.finished_writing, true) {
            self.shutdown(sys::Shutdown::Write);
        }
    }

    /// The guest takes no more.
    pub fn finish_reading(&mut self) {
        if !std::mem::replace(&mut self.finished_reading, true) {
            self.shutdown(sys::Shutdown::Read);
        }
    }

    fn shutdown(&self, how: sys::Shutdown) {
        if let Some(stream) = &self.stream {
            // It fails only when the peer closed already, which the socket
            // reports by itself.
            let _ = sys::shutdown(stream.as_raw_fd(), how);
        }
    }
}
