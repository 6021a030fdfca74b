//! The audit log: a line of JSON before each mutation and one with its outcome, synced before
//! the client gets the answer.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};
use serde::{Deserialize, Serialize};

use crate::wall_clock::{now_ms, rfc3339};

/// Name of the log in the state directory.
const FILE: &str = "audit.jsonl";

/// Name of a file that only takes space, for what a full disk must not prevent.
const RESERVE: &str = "audit.reserve";

/// Bytes of the reserve: lines and database pages of some hundred deletions.
const RESERVE_BYTES: i64 = 1 << 20;

/// Bytes at the end of the log in which its last line begins: a line has at most a path of
/// some kilobytes.
const LAST_LINE: u64 = 64 * 1024;

/// A line of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditLine {
    /// Each line has the next number, from 1.
    pub sequence: u64,
    /// When, as RFC 3339.
    pub at: String,
    /// Id of the request, the same in both lines.
    pub request: String,
    /// Who asked: `uid:1000` or `token:NAME`.
    pub who: String,
    /// The HTTP method.
    pub method: String,
    /// The path, without its query.
    pub path: String,
    /// The HTTP status of the answer; none in the line before the mutation.
    pub status: Option<u16>,
}

/// What a line is about.
#[derive(Debug, Clone)]
pub struct Audited {
    /// Id of the request.
    pub request: String,
    /// Who asked.
    pub who: String,
    /// The HTTP method.
    pub method: String,
    /// The path.
    pub path: String,
}

/// An open audit log. All calls block.
#[derive(Debug)]
pub struct AuditLog {
    file: File,
    directory: PathBuf,
    sequence: u64,
    /// Length of the lines that are complete.
    length: u64,
}

impl AuditLog {
    /// Opens or creates the log in `directory`, which exists, and goes on after its last line.
    /// A line that was cut off by a crash is removed: its request was not answered.
    ///
    /// # Errors
    /// The file cannot be used.
    pub fn open(directory: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(directory.join(FILE))?;
        let (sequence, length) = end(&mut file)?;
        file.set_len(length)?;
        File::open(directory)?.sync_all()?;
        let this = Self {
            file,
            directory: directory.to_owned(),
            sequence,
            length,
        };
        this.keep_reserve();
        Ok(this)
    }

    /// Appends a line and syncs it. With `reserved`, a full disk gives up the reserve for it.
    ///
    /// # Errors
    /// The line is not on disk.
    pub fn append(
        &mut self,
        audited: &Audited,
        status: Option<u16>,
        reserved: bool,
    ) -> io::Result<()> {
        let line = AuditLine {
            sequence: self.sequence + 1,
            at: rfc3339(now_ms()),
            request: audited.request.clone(),
            who: audited.who.clone(),
            method: audited.method.clone(),
            path: audited.path.clone(),
            status,
        };
        let mut text = serde_json::to_string(&line)?;
        text.push('\n');
        let mut written = self.write(text.as_bytes());
        if reserved && written.as_ref().is_err_and(is_full) {
            fs::remove_file(self.directory.join(RESERVE))?;
            written = self.write(text.as_bytes());
        } else if written.is_ok() {
            self.keep_reserve();
        }
        written?;
        self.sequence += 1;
        self.length += text.len() as u64;
        Ok(())
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        let written = self.file.write_all(line);
        let written = written.and_then(|()| self.file.sync_data());
        if written.is_err() {
            // A part of a line would make the next one unreadable.
            self.file.set_len(self.length)?;
        }
        written
    }

    /// Makes the reserve if it is gone and there is space again. Without it a full disk
    /// refuses deletions too, which is no reason to refuse this request.
    fn keep_reserve(&self) {
        let path = self.directory.join(RESERVE);
        if path.exists() {
            return;
        }
        let made = File::create(&path).and_then(|file| {
            let flags = FallocateFlags::empty();
            Ok(fallocate(&file, flags, 0, RESERVE_BYTES)?)
        });
        if made.is_err() {
            let _ = fs::remove_file(&path);
        }
    }
}

/// Whether the disk is full.
fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// Number and end of the last complete line.
fn end(file: &mut File) -> io::Result<(u64, u64)> {
    let length = file.metadata()?.len();
    let start = length.saturating_sub(LAST_LINE);
    file.seek(SeekFrom::Start(start))?;
    let mut reader = BufReader::new(file.take(LAST_LINE));
    let (mut sequence, mut at, mut complete) = (0, start, start);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        at += line.len() as u64;
        if line.ends_with(b"\n") {
            if let Ok(line) = serde_json::from_slice::<AuditLine>(&line) {
                sequence = line.sequence;
            }
            complete = at;
        }
        line.clear();
    }
    if sequence == 0 && complete > 0 {
        let what = "its last lines are not those of an audit log";
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    Ok((sequence, complete))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn audited(path: &str) -> Audited {
        Audited {
            request: "r".into(),
            who: "uid:7".into(),
            method: "PUT".into(),
            path: path.into(),
        }
    }

    fn lines(directory: &Path) -> Vec<AuditLine> {
        let text = fs::read_to_string(directory.join(FILE)).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.collect()
    }

    #[test]
    fn numbers_go_on_after_a_crash_in_the_middle_of_a_line() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = AuditLog::open(directory.path()).unwrap();
        log.append(&audited("/a"), None, false).unwrap();
        log.append(&audited("/a"), Some(200), false).unwrap();
        drop(log);
        let path = directory.path().join(FILE);
        let mut file = OpenOptions::new().append(true).open(path).unwrap();
        file.write_all(b"{\"sequence\":3,\"at\"").unwrap();
        let mut log = AuditLog::open(directory.path()).unwrap();
        log.append(&audited("/b\n{\"sequence\":9}"), None, false)
            .unwrap();
        let found = lines(directory.path());
        let numbers: Vec<_> = found.iter().map(|line| line.sequence).collect();
        assert_eq!(numbers, [1, 2, 3]);
        assert_eq!(found[1].status, Some(200));
        assert_eq!(found[2].path, "/b\n{\"sequence\":9}");
    }

    #[test]
    fn a_file_that_is_no_audit_log_is_left_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE);
        fs::write(&path, "something else\n").unwrap();
        assert!(AuditLog::open(directory.path()).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"something else\n");
    }

    #[test]
    fn the_reserve_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let _log = AuditLog::open(directory.path()).unwrap();
        let reserve = fs::metadata(directory.path().join(RESERVE)).unwrap();
        assert_eq!(reserve.len(), 1 << 20);
    }
}
