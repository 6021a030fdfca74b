//! A queue whose thread writes to files and pipes that stall, fail and recover.

use std::fs;
use std::io::{BufRead as _, BufReader, PipeReader, Read as _};
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

/// Longest time that a test waits.
const PATIENCE: Duration = Duration::from_secs(60);

fn piped() -> (PipeReader, QueuedWriter) {
    let (reader, writer) = io::pipe().unwrap();
    (reader, QueuedWriter::start("test", writer).unwrap())
}

/// A file that takes nothing while `full`.
#[derive(Clone, Default)]
struct Disk {
    full: Arc<AtomicBool>,
    content: Arc<Mutex<Vec<u8>>>,
}

impl Write for Disk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.full.load(Ordering::Acquire) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.content.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test(flavor = "current_thread")]
async fn written_waits_for_every_line_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("role.log");
    let log = QueuedWriter::open_log(&path).unwrap();
    log.line("first\nforged");
    for round in 1..=50 {
        for line in 0..100 {
            log.line(&format!("{round} {line}"));
        }
        log.written().await;
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("first forged\n1 0\n"));
        assert_eq!(text.lines().count(), 1 + round * 100);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_full_disk_loses_lines_which_are_counted_later() {
    let disk = Disk::default();
    let log = QueuedWriter::start("test", disk.clone()).unwrap();
    disk.full.store(true, Ordering::Release);
    for _ in 0..3 {
        log.line("lost");
        log.written().await;
    }
    disk.full.store(false, Ordering::Release);
    log.line("kept");
    assert_eq!(log.finish(PATIENCE), 0);
    assert_eq!(log.dropped(), 3);
    let text = String::from_utf8(disk.content.lock().unwrap().clone()).unwrap();
    assert_eq!(text, "[3 lines lost by the host]\nkept\n");
}

#[test]
fn a_stalled_reader_blocks_no_caller_and_learns_of_each_gap() {
    let (reader, stream) = piped();
    let line = |number: usize| format!("{number} {}\n", "x".repeat(1000));
    let push = |text: &str| stream.push(text.as_bytes(), |count| format!("gap {count}\n"));
    let sent = 4000;
    for number in 0..sent {
        push(&line(number)).unwrap();
    }
    assert!(stream.0.lock().size <= MAX_QUEUE);
    let mut lines = BufReader::new(reader).lines();
    let (mut next, mut gaps) = (0, 0);
    // The pipe may have taken lines while others were pushed: several gaps.
    loop {
        let text = lines.next().unwrap().unwrap();
        if text == "last" {
            break;
        }
        if let Some(missed) = text.strip_prefix("gap ") {
            next += missed.parse::<usize>().unwrap();
            gaps += 1;
            continue;
        }
        assert!(text.starts_with(&format!("{next} ")), "{text:.20}");
        next += 1;
        if next == 500 {
            push("last\n").unwrap();
        }
    }
    assert_eq!(next, sent);
    assert!(gaps > 0);
    assert_eq!(stream.finish(PATIENCE), 0);
}

#[test]
fn finish_returns_the_lines_that_a_stalled_reader_did_not_take() {
    let (mut reader, log) = piped();
    let sent = 100_000;
    for number in 0..sent {
        log.line(&format!("line {number:09}"));
    }
    let left = log.finish(Duration::from_millis(1));
    assert!(left > 1000 && left >= log.dropped());
    // The thread ends after it has written what is queued.
    let dropped = log.dropped();
    drop(log);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    let written = text
        .lines()
        .filter(|line| line.starts_with("line "))
        .count();
    assert_eq!(written as u64 + dropped, sent);
}

#[test]
fn a_reader_that_closes_is_an_error_of_a_later_line() {
    let (reader, stream) = piped();
    drop(reader);
    stream.push(b"lost\n", |_| String::new()).unwrap();
    assert_eq!(stream.finish(PATIENCE), 0);
    let error = stream.push(b"more\n", |_| String::new()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
}

#[test]
fn an_unfinished_line_is_written_before_its_end_comes() {
    let (mut reader, log) = piped();
    for byte in b"login: " {
        log.append(&[*byte]);
    }
    let mut prompt = [0; 7];
    reader.read_exact(&mut prompt).unwrap();
    assert_eq!(&prompt, b"login: ");
    log.append(b"ro");
    log.append(b"ot\nnext\n");
    drop(log);
    assert_eq!(io::read_to_string(reader).unwrap(), "root\nnext\n");
}

#[test]
fn a_line_whose_end_is_dropped_is_ended_by_the_count() {
    let mut queue = Queue::default();
    let mut push = |part: &str| {
        let report = |count| format!("gap {count}\n");
        queue.push(part.as_bytes(), part.ends_with('\n'), report);
        queue.size
    };
    push("beginning ");
    let long = "x".repeat(MAX_QUEUE);
    for part in [&long, "end\n", &long, "\n", "kept\n"] {
        push(part);
    }
    let texts = queue.entries.iter().map(|entry| entry.bytes.as_slice());
    assert_eq!(
        texts.collect::<Vec<_>>().concat(),
        b"beginning \ngap 2\nkept\n"
    );
    assert_eq!((queue.unreported, queue.dropped), (0, 2));
}

#[test]
fn short_lines_count_with_the_memory_that_they_take() {
    let mut queue = Queue::default();
    for _ in 0..MAX_QUEUE {
        queue.push(b"\n", true, |_| String::new());
    }
    assert!(queue.entries.len() <= MAX_QUEUE / LINE_OVERHEAD);
    // A line that arrives byte by byte takes no entry for each byte.
    let mut queue = Queue::default();
    for _ in 0..MAX_QUEUE / 2 {
        queue.push(b"x", false, |_| String::new());
    }
    assert_eq!(queue.unreported, 0);
}
