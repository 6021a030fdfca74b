//! A log file of bounded size: the newest part and the one before it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Size at which a log turns over, in bytes.
pub const MAX_LOG: u64 = 10 << 20;

/// An append-only log of at most twice [`MAX_LOG`] bytes.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: File,
    size: u64,
    dropped: u64,
}

impl LogFile {
    /// Opens or makes the log at `path`; what it holds stays.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let size = file.metadata()?.len();
        Ok(Self {
            path: path.to_owned(),
            file,
            size,
            dropped: 0,
        })
    }

    /// Appends one line. A line that cannot be written (a full disk) is
    /// counted, and the count is written when there is room again.
    pub fn line(&mut self, text: &str) {
        let mut line = String::with_capacity(text.len() + 64);
        if self.dropped > 0 {
            line.push_str(&format!("[{} lines lost by the host]\n", self.dropped));
        }
        line.extend(text.chars().map(|c| if c == '\n' { ' ' } else { c }));
        line.push('\n');
        match self.append(line.as_bytes()) {
            Ok(()) => self.dropped = 0,
            Err(_) => self.dropped += 1,
        }
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.size + bytes.len() as u64 > MAX_LOG {
            fs::rename(&self.path, previous(&self.path))?;
            *self = Self {
                dropped: self.dropped,
                ..Self::open(&self.path)?
            };
        }
        self.file.write_all(bytes)?;
        self.size += bytes.len() as u64;
        Ok(())
    }
}

/// Where the older part of the log at `path` is.
pub fn previous(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_turns_over_and_stays_bounded_and_a_line_stays_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("role.log");
        let mut log = LogFile::open(&path).unwrap();
        log.line("first\nforged");
        assert_eq!(fs::read_to_string(&path).unwrap(), "first forged\n");
        let long = "x".repeat(1 << 20);
        for _ in 0..40 {
            log.line(&long);
        }
        for part in [path.clone(), previous(&path)] {
            let size = fs::metadata(part).unwrap().len();
            assert!(size > 0 && size <= MAX_LOG);
        }
    }
}
