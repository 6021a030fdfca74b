//! Tests of disks on real files: locks, file types, content.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::Path;

use vm_memory::VolatileSlice;

use super::*;

fn open_rw(path: &Path) -> File {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
}

fn raw(file: File, read_only: bool) -> Result<Box<dyn Disk>, DiskError> {
    open(Backing::Raw { file, read_only })
}

#[test]
fn a_disk_has_one_writer_or_many_readers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, [0; 4096]).unwrap();
    let writer = raw(open_rw(&path), false).unwrap();
    for read_only in [false, true] {
        let error = raw(open_rw(&path), read_only).map(|_| ()).unwrap_err();
        let in_use = LockError::InUse;
        assert!(
            matches!(&error, DiskError::Lock { source, .. } if source.to_string() == in_use.to_string()),
            "{error:?}"
        );
    }
    drop(writer);
    let first = raw(File::open(&path).unwrap(), true).unwrap();
    let second = raw(File::open(&path).unwrap(), true).unwrap();
    assert!(raw(open_rw(&path), false).is_err());
    drop((first, second));
    assert!(raw(open_rw(&path), false).is_ok());
}

#[test]
fn the_lock_lasts_until_the_last_descriptor_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, [0; 4096]).unwrap();
    let file = open_rw(&path);
    let copy = file.try_clone().unwrap();
    drop(raw(file, false).unwrap());
    assert!(raw(open_rw(&path), false).is_err());
    drop(copy);
    assert!(raw(open_rw(&path), false).is_ok());
}

#[test]
fn only_regular_files_are_accepted() {
    let (socket, _other) = UnixStream::pair().unwrap();
    let files = [
        File::open("/dev/null").unwrap(),
        File::open("/").unwrap(),
        File::from(std::os::fd::OwnedFd::from(socket)),
    ];
    for file in files {
        let error = raw(file, true).map(|_| ()).unwrap_err();
        let not_regular = matches!(
            &error,
            DiskError::Lock {
                source: LockError::NotRegular,
                ..
            }
        );
        assert!(not_regular, "{error:?}");
    }
}

#[test]
fn a_writable_base_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    fs::write(&base, [0; 4096]).unwrap();
    let diff = open_rw(&dir.path().join("diff"));
    create_diff(diff.try_clone().unwrap(), 4096, "base").unwrap();
    let backing = Backing::Diff {
        diff,
        base: open_rw(&base),
    };
    let error = open(backing).map(|_| ()).unwrap_err();
    assert!(matches!(error, DiskError::WritableBase), "{error:?}");
}

#[test]
fn sizes_that_are_no_multiple_of_512_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for bytes in [0, 1, 511, 513] {
        let path = dir.path().join(bytes.to_string());
        fs::write(&path, vec![0; bytes]).unwrap();
        let error = raw(open_rw(&path), false).map(|_| ()).unwrap_err();
        assert!(matches!(error, DiskError::Size { .. }), "{error:?}");
        let diff = open_rw(&dir.path().join(format!("diff-{bytes}")));
        assert!(create_diff(diff, bytes as u64, "base").is_err());
    }
}

#[test]
fn a_qcow2_header_written_by_a_guest_is_data() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("raw");
    fs::write(&path, [7; 8192]).unwrap();
    let trap = open_rw(&dir.path().join("trap"));
    create_diff(trap, 1 << 30, "/etc/passwd").unwrap();
    let mut header = fs::read(dir.path().join("trap")).unwrap();
    header.truncate(4096);

    let mut disk = raw(open_rw(&path), false).unwrap();
    let bytes = VolatileSlice::from(&mut header[..]);
    disk.write(0, &[bytes]).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let mut disk = raw(open_rw(&path), false).unwrap();
    assert_eq!(disk.size(), 8192);
    let mut found = [0; 8192];
    disk.read(0, &[VolatileSlice::from(&mut found[..])])
        .unwrap();
    assert_eq!(found[..4096], header);
    assert_eq!(found[4096..], [7; 4096]);
}

#[test]
fn transfers_take_many_buffers_and_stay_in_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("raw");
    let len = 512 * 1024;
    let file = open_rw(&path);
    file.set_len(len as u64).unwrap();
    let mut disk = raw(file, false).unwrap();
    let mut bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
    let expected = bytes.clone();
    disk.write(0, &[VolatileSlice::from(&mut bytes[..])])
        .unwrap();
    let mut found = vec![0; len];
    let mut rest = &mut found[..];
    // Many buffers, some of them empty, need more than one system call.
    let mut parts = Vec::new();
    let mut sizes = [0, 512, 1, 511].into_iter().cycle();
    while !rest.is_empty() {
        let (part, next) = rest.split_at_mut(sizes.next().unwrap());
        parts.push(VolatileSlice::from(part));
        rest = next;
    }
    assert!(parts.len() > 1000);
    disk.read(0, &parts).unwrap();
    assert!(found == expected);
    let mut two = [0; 1024];
    let two = [VolatileSlice::from(&mut two[..])];
    for offset in [len as u64 - 512, len as u64, u64::MAX - 512] {
        assert!(disk.read(offset, &two).is_err());
        assert!(disk.write(offset, &two).is_err());
    }
    assert_eq!(fs::metadata(&path).unwrap().len(), len as u64);
}
