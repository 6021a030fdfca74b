//! Files that a user or a crash may have damaged: diff disks, packages, XML.

use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use vm_memory::VolatileSlice;
use vmbus::agent_package::{START, parse};
use vmbus::agent_signature::{TrustedKeys, check};

use super::input::Input;
use crate::progress::Progress;
use crate::service::size::Sizes;
use crate::service::{configuration, definition, validate};
use crate::vmm::disk::{Diff, Disk, Storage, create_diff};

/// Size of the virtual disk, and of its base.
const DISK: u64 = (1 << 20) + 512;
const BASE: usize = 600 << 10;
/// Far more than a diff of [`DISK`] has.
const MOST: usize = 16 << 20;

/// A file in memory, shared by its clones.
#[derive(Clone)]
struct MemoryFile(Arc<Mutex<Vec<u8>>>);

impl Storage for MemoryFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().len() as u64)
    }

    fn read_at(&self, offset: u64, to: &[VolatileSlice<'_>]) -> io::Result<()> {
        let bytes = self.0.lock().unwrap();
        let mut at = usize::try_from(offset).unwrap();
        for slice in to {
            let part = bytes.get(at..at + slice.len());
            slice.copy_from(part.ok_or(io::ErrorKind::UnexpectedEof)?);
            at += slice.len();
        }
        Ok(())
    }

    fn write_at(&mut self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        let mut bytes = self.0.lock().unwrap();
        let mut at = usize::try_from(offset).unwrap();
        for slice in from {
            let end = at + slice.len();
            assert!(end <= MOST, "write at {at:#x}");
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            slice.copy_to(&mut bytes[at..end]);
            at = end;
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A base that is never written.
struct Base;

impl Storage for Base {
    fn len(&self) -> io::Result<u64> {
        Ok(BASE as u64)
    }

    fn read_at(&self, offset: u64, to: &[VolatileSlice<'_>]) -> io::Result<()> {
        let mut at = offset as usize;
        for slice in to {
            at += slice.len();
            assert!(at <= BASE, "read beyond the base");
            slice.copy_from(&vec![0xba_u8; slice.len()]);
        }
        Ok(())
    }

    fn write_at(&mut self, _: u64, _: &[VolatileSlice<'_>]) -> io::Result<()> {
        panic!("the base is written");
    }

    fn sync(&mut self) -> io::Result<()> {
        panic!("the base is synced");
    }
}

/// A fresh diff.
fn fresh() -> Vec<u8> {
    static FRESH: OnceLock<Vec<u8>> = OnceLock::new();
    let make = || {
        let file = tempfile::NamedTempFile::new().unwrap();
        let writable = file.reopen().unwrap();
        create_diff(writable, DISK, "base").unwrap();
        let mut bytes = Vec::new();
        file.reopen().unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    };
    FRESH.get_or_init(make).clone()
}

/// A diff with changed bytes, perhaps cut: each change is an offset, a length and bytes.
pub fn qcow2_open(data: &[u8]) {
    let mut input = Input(data);
    let mut image = fresh();
    if let Some([cut @ 0..0x10, low, high]) = input.take() {
        let length = usize::from(u16::from_le_bytes([low, high])) << (cut % 8);
        image.truncate(length);
    }
    while let Some([low, middle, high, length]) = input.take() {
        let at = u32::from_le_bytes([low, middle, high, 0]) as usize;
        for (offset, byte) in input.bytes(usize::from(length % 32) + 1).iter().enumerate() {
            if let Some(target) = image.get_mut(at + offset) {
                *target = *byte;
            }
        }
    }
    let file = MemoryFile(Arc::new(Mutex::new(image)));
    let Ok(mut disk) = Diff::open(file.clone(), Base) else {
        return;
    };
    // What can be read stays so, and what is written is found again.
    let size = disk.size();
    let mut before = vec![0; 4096.min(size as usize)];
    let at = size - before.len() as u64;
    let read = |disk: &mut Diff<MemoryFile, Base>, at, bytes: &mut [u8]| {
        disk.read(at, &[VolatileSlice::from(bytes)])
    };
    read(&mut disk, at, &mut before).unwrap();
    let mut sector = [0x5a; 512];
    let written = disk.write(0, &[VolatileSlice::from(&mut sector[..])]);
    if written.is_err() || disk.flush().is_err() {
        return;
    }
    drop(disk);
    let mut disk = Diff::open(file, Base).unwrap();
    let mut found = [0; 512];
    read(&mut disk, 0, &mut found).unwrap();
    assert_eq!(found, sector);
    let mut after = vec![0; before.len()];
    read(&mut disk, at, &mut after).unwrap();
    assert!(at < 512 || after == before, "another sector changed");
}

/// A package file.
pub fn package(data: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fuzz.cspkg");
    std::fs::File::create(&path)
        .unwrap()
        .write_all(data)
        .unwrap();
    // An error is as good as a package that is valid.
    let _ = validate(&path, None, &Progress::default());
}

/// The public key with which the corpus of [`agent_package`] is signed.
const AGENT_KEY: &str = "untrusted comment: of the corpus\n\
                         RWRH/auj78DO7ktaiC+KXeH3ETP0plRzEzUW/kNF2/P9rHXLvjACnAM1\n";

/// A signature, and after a zero byte the guest-agent package that it is of.
pub fn agent_package(data: &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let signature = String::from_utf8_lossy(parts.next().unwrap_or_default());
    let package = parts.next().unwrap_or_default();
    // Text of an attacker is no key that panics.
    let _ = TrustedKeys::parse(&[&*signature]);
    let keys = TrustedKeys::parse(&[AGENT_KEY]).unwrap();
    let length = package.len() as u64;
    let parsed = parse(&package[..package.len().min(START)], length);
    if let Ok(checked) = check(&mut &*package, length, &signature, &keys) {
        let (head, at) = parsed.unwrap();
        assert_eq!((&checked.head, checked.program_at), (&head, at as u64));
        assert_eq!(at as u64 + head.size, length);
    }
}

/// A definition, and after a zero byte its configuration.
pub fn xml(data: &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let mut text = || {
        parts
            .next()
            .map(|part| String::from_utf8_lossy(part).into_owned())
    };
    let Some(Ok(definition)) =
        text().map(|text| definition::parse(Path::new("d"), text, &Sizes::default()))
    else {
        return;
    };
    if let Some(text) = text() {
        let _ = configuration::parse(Path::new("c"), &text, &definition);
    }
}
