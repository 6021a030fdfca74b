//! Reads a log from its start while it grows and rotates. Blocking.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::queued_writer::previous;

/// A position in a log.
#[derive(Debug)]
pub struct LogTail {
    path: PathBuf,
    /// The file being read, if it exists yet.
    part: Option<File>,
}

impl LogTail {
    /// The start of the log at `path`, which need not exist yet.
    pub fn open(path: &Path) -> Self {
        let part = File::open(previous(path)).or_else(|_| File::open(path));
        Self {
            path: path.to_owned(),
            part: part.ok(),
        }
    }

    /// The next bytes, at most `most`; none at the current end of the log.
    pub fn read(&mut self, most: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; most];
        let mut count = self.read_part(&mut bytes)?;
        if count == 0 {
            let rotated = self.rotated()?;
            // A rotated file gets no more bytes: this read returns those that came
            // after the read above.
            count = self.read_part(&mut bytes)?;
            if count == 0 && rotated {
                self.part = File::open(&self.path).ok();
                count = self.read_part(&mut bytes)?;
            }
        }
        bytes.truncate(count);
        Ok(bytes)
    }

    fn read_part(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.part.as_mut().map_or(Ok(0), |part| part.read(bytes))
    }

    /// Whether another file is at the log's path. Rewinds a file that was truncated.
    fn rotated(&mut self) -> io::Result<bool> {
        let Ok(now) = fs::metadata(&self.path) else {
            return Ok(false);
        };
        let Some(part) = &mut self.part else {
            return Ok(true);
        };
        if part.metadata()?.ino() != now.ino() {
            return Ok(true);
        }
        if part.stream_position()? > now.len() {
            part.seek(SeekFrom::Start(0))?;
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn rest(tail: &mut LogTail) -> String {
        let mut all = Vec::new();
        loop {
            let bytes = tail.read(3).unwrap();
            if bytes.is_empty() {
                return String::from_utf8(all).unwrap();
            }
            all.extend(bytes);
        }
    }

    #[test]
    fn nothing_is_lost_when_a_log_rotates_between_two_reads() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("role.log");
        let mut tail = LogTail::open(&path);
        assert_eq!(rest(&mut tail), "");
        let mut log = File::create(&path).unwrap();
        log.write_all(b"first\n").unwrap();
        assert_eq!(rest(&mut tail), "first\n");
        log.write_all(b"before the turn\n").unwrap();
        fs::rename(&path, previous(&path)).unwrap();
        fs::write(&path, "after it\n").unwrap();
        assert_eq!(rest(&mut tail), "before the turn\nafter it\n");
        // A new reader gets both files.
        let all = rest(&mut LogTail::open(&path));
        assert_eq!(all, "first\nbefore the turn\nafter it\n");
        // The serial log is truncated when it rotates.
        fs::write(&path, "new\n").unwrap();
        assert_eq!(rest(&mut tail), "new\n");
    }
}
