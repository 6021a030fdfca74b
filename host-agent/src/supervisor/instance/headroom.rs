//! Space that the disks of a guest have for themselves, so that a guest which fills the file
//! system pauses alone: the others go on within theirs.
//!
//! A diff disk only grows at its end. `fallocate(2)` with `FALLOC_FL_KEEP_SIZE` keeps blocks
//! for it there, which no other file gets. A resource disk is written anywhere; it is
//! reserved as a whole, or not at all. Where blocks cannot be kept, a guest only pauses
//! earlier.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::sys::statvfs::fstatvfs;
use nix::unistd::{Whence, lseek};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::space::available;
use crate::supervisor::guest;

/// Bytes kept at the end of a diff disk.
const HEADROOM: u64 = 64 << 20;
/// A diff disk keeps at most this part of the free space, so that guests fit into a small
/// file system as before.
const DIFF_PART: u64 = 16;
/// A resource disk is reserved if it takes at most this part of the free space.
const RESOURCE_PART: u64 = 8;
/// How often the headroom is kept up.
const EVERY: Duration = Duration::from_secs(10);

/// Keeps up the space of a guest that runs.
#[derive(Debug, Default)]
pub(super) struct Headroom {
    last: Option<Instant>,
    /// One at a time, so that a file system that hangs takes one thread.
    task: Option<JoinHandle<()>>,
}

impl Headroom {
    /// Reserves space for the disks in `dir` if that is due.
    pub(super) fn extend(&mut self, dir: &Path) {
        let now = Instant::now();
        let due = self.last.is_none_or(|last| now - last >= EVERY);
        if due && self.task.as_ref().is_none_or(JoinHandle::is_finished) {
            self.last = Some(now);
            let dir = dir.to_owned();
            self.task = Some(tokio::task::spawn_blocking(move || reserve(&dir)));
        }
    }
}

fn reserve(dir: &Path) {
    let _ = open(&guest::diff_path(dir)).and_then(|file| keep_ahead(&file));
    let _ = open(&guest::resource_path(dir)).and_then(|file| reserve_whole(&file));
}

/// Gives back what the disks in `dir` have not used: a directory that is kept takes no more
/// space than its data. Blocking.
pub(super) fn release(dir: &Path) {
    let diff = open(&guest::diff_path(dir));
    // A truncation to the same length frees blocks after the end.
    let _ = diff.and_then(|file| file.set_len(file.metadata()?.len()));
    let _ = open(&guest::resource_path(dir)).and_then(|file| free_holes(&file));
}

fn open(path: &Path) -> io::Result<File> {
    // On tmpfs it would take memory, within the limit of the VMM process.
    if statfs(path)?.filesystem_type() == TMPFS_MAGIC {
        return Err(io::ErrorKind::Unsupported.into());
    }
    OpenOptions::new().read(true).write(true).open(path)
}

/// Keeps blocks after the end of `file`. Those that it has already cost nothing.
fn keep_ahead(file: &File) -> io::Result<()> {
    let want = HEADROOM.min(free(file)? / DIFF_PART);
    allocate(file, file.metadata()?.len(), want)
}

fn reserve_whole(file: &File) -> io::Result<()> {
    let metadata = file.metadata()?;
    let length = metadata.len();
    if metadata.blocks() * 512 >= length || length > free(file)? / RESOURCE_PART {
        return Ok(());
    }
    allocate(file, 0, length)
}

/// Frees blocks that were reserved and not written, which `lseek(2)` reports as holes.
fn free_holes(file: &File) -> io::Result<()> {
    let end = file.metadata()?.len().cast_signed();
    let mut at = 0;
    while at < end {
        let hole = lseek(file, at, Whence::SeekHole)?;
        let data = match lseek(file, hole, Whence::SeekData) {
            Err(Errno::ENXIO) => end,
            other => other?,
        };
        if data > hole {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(file, flags, hole, data - hole)?;
        }
        at = data.max(hole + 1);
    }
    Ok(())
}

fn allocate(file: &File, at: u64, length: u64) -> io::Result<()> {
    let signed = |value: u64| i64::try_from(value).map_err(io::Error::other);
    if length == 0 {
        return Ok(());
    }
    let flags = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(file, flags, signed(at)?, signed(length)?)?)
}

fn free(file: &File) -> io::Result<u64> {
    Ok(available(&fstatvfs(file)?))
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt as _;
    use std::process::Command;

    use tempfile::TempDir;
    use vm_memory::VolatileSlice;

    use super::super::tests::hanging::with_own_mounts;
    use super::*;
    use crate::vmm::disk::{self, Backing, Disk, create_diff, is_full};

    /// A directory where blocks can be kept, which tmpfs is not.
    fn directory() -> Option<TempDir> {
        let build = std::env::current_exe().unwrap();
        let dir = tempfile::tempdir_in(build.parent().unwrap()).unwrap();
        keeps_blocks(dir.path()).then_some(dir)
    }

    /// Whether the file system of `dir` can keep blocks for a file.
    pub(in super::super) fn keeps_blocks(dir: &Path) -> bool {
        let probe = tempfile::NamedTempFile::new_in(dir).unwrap();
        open(probe.path()).is_ok() && allocate(probe.as_file(), 0, 4096).is_ok()
    }

    fn bytes(file: &File) -> u64 {
        file.metadata().unwrap().blocks() * 512
    }

    #[test]
    fn a_diff_disk_has_blocks_ahead_of_its_end() {
        let Some(dir) = directory() else { return };
        let path = guest::diff_path(dir.path());
        fs::write(&path, vec![1; 1 << 20]).unwrap();
        let file = open(&path).unwrap();
        let want = HEADROOM.min(free(&file).unwrap() / DIFF_PART) / 2;
        reserve(dir.path());
        assert!(bytes(&file) > want);
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
        // The file grows into what is kept, and the rest can be given back.
        let before = bytes(&file);
        file.write_all_at(&[2; 4096], 1 << 20).unwrap();
        file.sync_all().unwrap();
        assert!(bytes(&file) <= before + 4096);
        release(dir.path());
        assert!(bytes(&file) < 2 << 20);
        assert_eq!(fs::read(&path).unwrap().len(), (1 << 20) + 4096);
    }

    #[test]
    fn a_resource_disk_is_reserved_only_where_there_is_plenty() {
        let Some(dir) = directory() else { return };
        let path = guest::resource_path(dir.path());
        let file = File::create(&path).unwrap();
        let plenty = free(&file).unwrap();
        for (size, reserved) in [(plenty / 64, true), (plenty / 2, false)] {
            file.set_len(0).unwrap();
            file.set_len(size).unwrap();
            file.write_all_at(b"data", 1 << 20).unwrap();
            reserve(dir.path());
            assert_eq!(bytes(&file) >= size / 2, reserved);
            release(dir.path());
            assert!(bytes(&file) < 1 << 20);
            let mut data = [0; 4];
            open(&path)
                .unwrap()
                .read_exact_at(&mut data, 1 << 20)
                .unwrap();
            assert_eq!(&data, b"data");
        }
    }

    /// Runs `test` in a new ext4 of this size, where this process may mount one.
    fn in_ext4(size: u64, test: impl FnOnce(&Path) + Send) {
        let dir = tempfile::tempdir().unwrap();
        let (image, place) = (dir.path().join("image"), dir.path().join("ext4"));
        File::create(&image).unwrap().set_len(size).unwrap();
        fs::create_dir(&place).unwrap();
        with_own_mounts("/dev/loop-control", || {
            for (program, arguments, paths) in [
                // Nothing is kept for root, as which this test runs.
                ("mkfs.ext4", &["-q", "-m", "0"][..], &[&image][..]),
                ("mount", &["-o", "loop"], &[&image, &place]),
            ] {
                let mut command = Command::new(program);
                command.args(arguments).args(paths);
                command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
                assert!(command.status().unwrap().success(), "{program}");
            }
            test(&place);
        });
    }

    /// A diff disk of a guest, over an empty base, and how many clusters were written to it.
    struct GuestDisk(Box<dyn Disk>, u64);

    impl GuestDisk {
        fn new(dir: &Path) -> Self {
            const SIZE: u64 = 1 << 30;
            let (path, base) = (guest::diff_path(dir), dir.join("base"));
            File::create(&base).unwrap().set_len(SIZE).unwrap();
            create_diff(File::create_new(&path).unwrap(), SIZE, "base").unwrap();
            let (diff, base) = (open(&path).unwrap(), File::open(base).unwrap());
            Self(disk::open(Backing::Diff { diff, base }).unwrap(), 0)
        }

        /// Writes to clusters that no write reached before, until `most` bytes are written or
        /// the file system is full; how many bytes were written.
        fn grow(&mut self, most: u64) -> u64 {
            let mut cluster = vec![7; 64 << 10];
            for written in (0..most).step_by(cluster.len()) {
                let at = self.1 * cluster.len() as u64;
                match self.0.write(at, &[VolatileSlice::from(&mut cluster[..])]) {
                    Ok(()) => self.1 += 1,
                    Err(error) if is_full(&error) => return written,
                    Err(error) => panic!("{error}"),
                }
            }
            most
        }
    }

    #[test]
    fn a_guest_that_fills_an_ext4_leaves_the_other_its_headroom() {
        in_ext4(1200 << 20, |ext4| {
            let dirs = ["one", "other"].map(|name| ext4.join(name));
            let [mut one, mut other] = dirs.each_ref().map(|dir| {
                fs::create_dir(dir).unwrap();
                GuestDisk::new(dir)
            });
            for dir in &dirs {
                reserve(dir);
            }
            // Other files take most of the rest.
            let ballast = File::create(ext4.join("ballast")).unwrap();
            let most = free(&ballast).unwrap() - (32 << 20);
            allocate(&ballast, 0, most).unwrap();

            let grown = one.grow(1 << 30);
            assert!(
                (HEADROOM..HEADROOM + (40 << 20)).contains(&grown),
                "{grown}"
            );
            // A full file system cannot extend it, and takes nothing away.
            reserve(&dirs[1]);
            // All but the disk's own tables.
            let kept = HEADROOM - (1 << 20);
            assert_eq!(other.grow(kept), kept);
            other.0.flush().unwrap();
            // Beyond it this guest waits too.
            let beyond = other.grow(1 << 30);
            assert!(beyond < 8 << 20, "{beyond}");
            // Its end gives the other one space again.
            drop(one);
            fs::remove_file(guest::diff_path(&dirs[0])).unwrap();
            assert_eq!(other.grow(kept), kept);
            other.0.flush().unwrap();
        });
    }

    #[test]
    fn a_small_ext4_is_shared_as_far_as_it_goes() {
        in_ext4(256 << 20, |ext4| {
            let _disk = GuestDisk::new(ext4);
            let file = File::open(guest::diff_path(ext4)).unwrap();
            let before = free(&file).unwrap();
            reserve(ext4);
            let kept = before - free(&file).unwrap();
            let most = before / DIFF_PART;
            assert!((most / 2..most + (1 << 20)).contains(&kept), "{kept}");
        });
    }
}
