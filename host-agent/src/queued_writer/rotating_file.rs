//! A log file of bounded size, and the older part of the log in a second file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Size in bytes at which a log that is opened by its path rotates.
const MAX_LOG: u64 = 10 << 20;

/// An append-only log of at most two files. A line that is written by one call
/// is in one of them, whole.
#[derive(Debug)]
pub struct RotatingFile {
    file: File,
    size: u64,
    max_size: u64,
    /// The file ends with part of a line, whose rest could not be written.
    torn: bool,
    older: Older,
}

/// Where the older part goes.
#[derive(Debug)]
enum Older {
    /// The file at this path is renamed to [`previous`] of the path, so that
    /// who reads it goes on reading it.
    Renamed(PathBuf),
    /// The file is copied, since only descriptors are known.
    Copied(File),
}

impl RotatingFile {
    /// Opens the log at `path`, which may have content, or creates it.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Self {
            size: file.metadata()?.len(),
            file,
            max_size: MAX_LOG,
            torn: false,
            older: Older::Renamed(path.to_owned()),
        })
    }

    /// Appends to `current`, which may have content.
    pub fn from_files(mut current: File, previous: File, max_size: u64) -> io::Result<Self> {
        Ok(Self {
            size: current.seek(SeekFrom::End(0))?,
            file: current,
            max_size: max_size.max(4096),
            torn: false,
            older: Older::Copied(previous),
        })
    }

    fn rotate(&mut self) -> io::Result<()> {
        match &mut self.older {
            Older::Renamed(path) => {
                match fs::rename(&path, previous(path)) {
                    // An earlier rotation ended here: no new file could be created.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    renamed => renamed?,
                }
                *self = Self::open(&path.clone())?;
            }
            Older::Copied(older) => {
                older.set_len(0)?;
                older.rewind()?;
                self.file.rewind()?;
                let copied = copy(&mut self.file, older);
                self.file.set_len(0)?;
                self.file.rewind()?;
                let lost = std::mem::take(&mut self.size);
                self.torn = false;
                if copied.is_err() {
                    // Keeping the older part would repeat the copy for each line.
                    older.set_len(0)?;
                    let notice = format!("[{lost} bytes lost by the host]\n");
                    self.append(notice.as_bytes())?;
                }
            }
        }
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.torn {
            self.file.write_all(b"\n")?;
            self.size += 1;
            self.torn = false;
        }
        let written = self.file.write_all(bytes);
        if written.is_ok() {
            self.size += bytes.len() as u64;
        } else if let Ok(end) = self.file.seek(SeekFrom::End(0)) {
            self.torn = end > self.size;
            self.size = end;
        }
        written
    }
}

impl Write for RotatingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let most = usize::try_from(self.max_size).unwrap_or(usize::MAX);
        let part = &bytes[..bytes.len().min(most)];
        // The size of a torn line's newline is included.
        if self.size > 0 && self.size + part.len() as u64 >= self.max_size {
            self.rotate()?;
        }
        self.append(part)?;
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Copies the rest of `from` by `read(2)` and `write(2)`, which the seccomp filter
/// of a VMM process's log thread allows, unlike the calls of [`io::copy`].
fn copy(from: &mut File, to: &mut File) -> io::Result<()> {
    let mut buffer = [0; 16 * 1024];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => to.write_all(&buffer[..count])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Path of the older part of the log at `path`.
pub fn previous(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};

    #[test]
    fn a_renamed_log_is_bounded_and_keeps_its_newest_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("role.log");
        let mut log = RotatingFile::open(&path).unwrap();
        let mut line = vec![b'x'; 1 << 20];
        line.push(b'\n');
        for _ in 0..40 {
            log.write_all(&line).unwrap();
        }
        log.write_all(b"last\n").unwrap();
        for part in [path.clone(), previous(&path)] {
            let text = fs::read(part).unwrap();
            assert!(text.len() as u64 <= MAX_LOG && text.ends_with(b"\n"));
        }
        assert!(fs::read(path).unwrap().ends_with(b"x\nlast\n"));
    }

    #[test]
    fn an_interrupted_rename_is_completed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("role.log");
        let mut log = RotatingFile::open(&path).unwrap();
        log.write_all(&vec![b'x'; MAX_LOG as usize - 10]).unwrap();
        fs::rename(&path, previous(&path)).unwrap();
        log.write_all(b"in the next file\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "in the next file\n");
        assert!(fs::metadata(previous(&path)).unwrap().len() > 1000);
    }

    /// Writes 5,000 lines to a log of two files of 8 KiB; what `current` holds.
    fn written_by_copy(previous: File) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial.log");
        fs::write(&path, "of an earlier boot\n").unwrap();
        let current = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let mut log = RotatingFile::from_files(current, previous, 8192).unwrap();
        for number in 0..5000 {
            writeln!(log, "line {number}").unwrap();
            assert!(fs::metadata(&path).unwrap().len() <= 8192);
        }
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn a_copied_log_is_bounded_and_keeps_its_newest_lines() {
        let mut previous = tempfile::tempfile().unwrap();
        let current = written_by_copy(previous.try_clone().unwrap());
        previous.rewind().unwrap();
        let older = io::read_to_string(&previous).unwrap();
        assert!(older.len() <= 8192 && current.ends_with("\nline 4999\n"));
        let all = older + &current;
        let first = all.lines().next().unwrap();
        let first: u32 = first.strip_prefix("line ").unwrap().parse().unwrap();
        let expected: String = (first..5000).map(|n| format!("line {n}\n")).collect();
        assert_eq!(all, expected);
    }

    #[test]
    fn a_part_that_cannot_be_copied_is_reported_as_lost() {
        let previous = memfd_create("previous", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        fcntl(&previous, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).unwrap();
        let current = written_by_copy(previous.into());
        assert!(current.contains("bytes lost by the host]\nline "));
        assert!(current.ends_with("\nline 4999\n"));
    }

    #[test]
    fn a_line_begins_on_its_own_after_a_torn_one() {
        let file = File::from(memfd_create("log", MFdFlags::MFD_ALLOW_SEALING).unwrap());
        let older = || tempfile::tempfile().unwrap();
        let mut log = RotatingFile::from_files(file.try_clone().unwrap(), older(), 8192).unwrap();
        // As a write that the file system cuts short.
        log.file.write_all(b"to").unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
        log.write_all(b"torn\n").unwrap_err();
        assert!(log.torn);

        let mut file = older();
        let mut log = RotatingFile {
            file: file.try_clone().unwrap(),
            ..log
        };
        log.write_all(b"next\n").unwrap();
        file.rewind().unwrap();
        assert_eq!(io::read_to_string(file).unwrap(), "\nnext\n");
    }
}
