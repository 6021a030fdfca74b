//! A file in memory that records writes and syncs, and fails on demand.

use std::io;
use std::sync::{Arc, Mutex};

use vm_memory::VolatileSlice;

use super::super::super::storage::Storage;

/// A recorded operation on a file.
#[derive(Debug, Clone)]
pub enum Op {
    Write { offset: u64, bytes: Vec<u8> },
    Sync,
}

/// Which of the next operations fail.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Fault {
    #[default]
    None,
    /// Operation n (from 0) fails; of a write, the first half is written.
    Once(usize),
    /// Operation n and all later ones fail like that.
    From(usize),
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    log: Vec<Op>,
    fault: Fault,
}

/// A file in memory, shared by its clones.
#[derive(Debug, Clone, Default)]
pub struct Memory(Arc<Mutex<State>>);

impl Memory {
    pub fn new(bytes: Vec<u8>) -> Self {
        let memory = Self::default();
        memory.0.lock().unwrap().bytes = bytes;
        memory
    }

    pub fn fail(&self, fault: Fault) {
        self.0.lock().unwrap().fault = fault;
    }

    pub fn ops(&self) -> usize {
        self.0.lock().unwrap().log.len()
    }

    pub fn log(&self) -> Vec<Op> {
        self.0.lock().unwrap().log.clone()
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().bytes.clone()
    }
}

pub fn apply(bytes: &mut Vec<u8>, offset: u64, part: &[u8]) {
    let start = offset as usize;
    let end = start + part.len();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[start..end].copy_from_slice(part);
}

impl State {
    fn faulty(&self) -> bool {
        match self.fault {
            Fault::None => false,
            Fault::Once(n) => self.log.len() == n,
            Fault::From(n) => self.log.len() >= n,
        }
    }
}

impl Storage for Memory {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().bytes.len() as u64)
    }

    fn read_at(&self, offset: u64, to: &[VolatileSlice<'_>]) -> io::Result<()> {
        let state = self.0.lock().unwrap();
        let mut at = offset as usize;
        for slice in to {
            let Some(part) = state.bytes.get(at..at + slice.len()) else {
                return Err(io::ErrorKind::UnexpectedEof.into());
            };
            slice.copy_from(part);
            at += slice.len();
        }
        Ok(())
    }

    fn write_at(&mut self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        let mut bytes = Vec::new();
        for slice in from {
            let start = bytes.len();
            bytes.resize(start + slice.len(), 0);
            slice.copy_to(&mut bytes[start..]);
        }
        let mut state = self.0.lock().unwrap();
        let faulty = state.faulty();
        if faulty {
            // A sector is written completely or not at all.
            bytes.truncate(bytes.len() / 2 / 512 * 512);
        }
        apply(&mut state.bytes, offset, &bytes);
        state.log.push(Op::Write { offset, bytes });
        if faulty {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        let faulty = state.faulty();
        state.log.push(Op::Sync);
        if faulty {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        Ok(())
    }
}

/// A base of any size whose sector `n` is [`super::tagged`] with `BASE + n`.
#[derive(Debug, Clone, Copy)]
pub struct Computed {
    pub len: u64,
}

pub const BASE: u64 = 0xba5e << 48;

impl Storage for Computed {
    fn len(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn read_at(&self, offset: u64, to: &[VolatileSlice<'_>]) -> io::Result<()> {
        let mut at = offset;
        for slice in to {
            // Sector by sector; the first may be partial.
            let mut done = 0;
            while done < slice.len() {
                let inside = (at % 512) as usize;
                let count = (512 - inside).min(slice.len() - done);
                let sector = super::tagged(BASE + at / 512);
                let part = slice.subslice(done, count).unwrap();
                part.copy_from(&sector[inside..inside + count]);
                done += count;
                at += count as u64;
            }
        }
        if at > self.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    fn write_at(&mut self, _: u64, _: &[VolatileSlice<'_>]) -> io::Result<()> {
        panic!("the base is never written");
    }

    fn sync(&mut self) -> io::Result<()> {
        panic!("the base is never synced");
    }
}
