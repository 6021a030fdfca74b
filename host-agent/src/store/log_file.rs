//! A log file of bounded size: the newest part and the one before it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};

use tokio::sync::oneshot;

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
            match fs::rename(&self.path, previous(&self.path)) {
                // Renamed before, but there was no room for a new one.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                renamed => renamed?,
            }
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

/// A log that is written by a thread of its own: a disk that stands still
/// holds up nobody who has something to log.
#[derive(Debug)]
pub struct LogWriter {
    entries: SyncSender<Entry>,
    queued: Arc<AtomicUsize>,
    dropped: AtomicU64,
}

/// What waits for a log's thread.
#[derive(Debug)]
enum Entry {
    Line(String),
    /// To be told when everything before it is written.
    Mark(oneshot::Sender<()>),
}

/// Lines that may wait for the disk.
const MOST_LINES: usize = 4096;
/// Bytes that may wait for the disk.
const MOST_BYTES: usize = 1 << 20;

impl LogWriter {
    /// Opens or makes the log at `path` and starts its thread, which ends when
    /// everything is written after the writer is dropped.
    ///
    /// # Errors
    /// The file cannot be opened, or no thread is to be had.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut file = LogFile::open(path)?;
        let (entries, waiting) = sync_channel(MOST_LINES);
        let queued = Arc::<AtomicUsize>::default();
        let taken = Arc::clone(&queued);
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || {
                for entry in waiting {
                    match entry {
                        Entry::Line(line) => {
                            file.line(&line);
                            taken.fetch_sub(line.len(), Ordering::Relaxed);
                        }
                        // Who asked may have given up.
                        Entry::Mark(mark) => drop(mark.send(())),
                    }
                }
            })?;
        Ok(Self {
            entries,
            queued,
            dropped: AtomicU64::new(0),
        })
    }

    /// Queues one line. One for which there is no room is counted, and the
    /// count is written when there is room again.
    pub fn line(&self, text: &str) {
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        let told = dropped == 0 || self.put(format!("[{dropped} lines lost by the host]"));
        let put = told && self.put(text.to_owned());
        let lost = u64::from(!put) + if told { 0 } else { dropped };
        self.dropped.fetch_add(lost, Ordering::Relaxed);
    }

    /// Waits until every line so far is written. With no room to ask, the disk
    /// stands still, and there is nothing to wait for.
    pub async fn written(&self) {
        let (mark, marked) = oneshot::channel();
        if self.entries.try_send(Entry::Mark(mark)).is_ok() {
            let _ = marked.await;
        }
    }

    fn put(&self, line: String) -> bool {
        let length = line.len();
        if self.queued.load(Ordering::Relaxed) + length > MOST_BYTES {
            return false;
        }
        self.queued.fetch_add(length, Ordering::Relaxed);
        let put = self.entries.try_send(Entry::Line(line)).is_ok();
        if !put {
            self.queued.fetch_sub(length, Ordering::Relaxed);
        }
        put
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

    #[test]
    fn a_full_disk_holds_up_nobody_and_the_loss_is_counted() {
        let mut log = LogFile::open(Path::new("/dev/full")).unwrap();
        for _ in 0..3 {
            log.line("lost");
        }
        assert_eq!(log.dropped, 3);
        // There is room again.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("role.log");
        log.file = File::create(&path).unwrap();
        log.line("kept");
        let text = fs::read_to_string(path).unwrap();
        assert_eq!(text, "[3 lines lost by the host]\nkept\n");
    }

    #[test]
    fn a_log_that_could_not_turn_over_completely_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("role.log");
        let mut log = LogFile::open(&path).unwrap();
        log.line(&"x".repeat(MAX_LOG as usize - 10));
        fs::rename(&path, previous(&path)).unwrap();
        log.line("this turns it over");
        assert_eq!(fs::read_to_string(&path).unwrap(), "this turns it over\n");
        assert!(fs::metadata(previous(&path)).unwrap().len() > 1000);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_was_written_before_can_be_read_after() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("role.log");
        let log = LogWriter::open(&path).unwrap();
        for round in 1..=50 {
            for line in 0..100 {
                log.line(&format!("{round} {line}"));
            }
            log.written().await;
            let text = fs::read_to_string(&path).unwrap();
            assert_eq!(text.lines().count(), round * 100);
        }
    }

    #[test]
    fn a_disk_that_stands_still_holds_up_nobody_and_the_loss_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("role.log");
        // A pipe that nobody reads yet.
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut reader = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let log = LogWriter::open(&path).unwrap();
        let line = "x".repeat(99);
        for _ in 0..MOST_LINES * 2 {
            log.line(&line);
        }
        // Now it is read, and sooner or later there is room again.
        let mut buffer = vec![0; 1 << 16];
        let mut seen = String::new();
        while !seen.contains("lines lost by the host]") {
            log.line("more");
            let count = std::io::Read::read(&mut reader, &mut buffer).unwrap();
            seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
            assert!(seen.len() < 100 * MOST_LINES * 3);
        }
    }
}
