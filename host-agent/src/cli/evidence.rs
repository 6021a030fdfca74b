//! Logs of instances after a failure: their last lines, and copies that outlive
//! the deployment.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::printable::printable;

/// How much of the end of a file is searched for lines.
const TAIL_BYTES: u64 = 64 * 1024;
/// Longest line shown, in characters.
const MAX_LINE: usize = 400;
/// Failed tests whose logs are kept.
const KEPT: usize = 10;

/// The last `count` lines of a log, without control characters. Empty if the
/// log cannot be read: it only adds to another error.
pub fn tail(path: &Path, count: usize) -> Vec<String> {
    read_end(path).map_or_else(|_| Vec::new(), |bytes| last_lines(&bytes, count))
}

fn read_end(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn last_lines(bytes: &[u8], count: usize) -> Vec<String> {
    let text = String::from_utf8_lossy(bytes);
    let clean = |line: &str| {
        let start: String = line.trim_end().chars().take(MAX_LINE).collect();
        printable(&start.replace('\t', " "))
    };
    let mut lines: Vec<_> = text
        .split('\n')
        .map(clean)
        .filter(|line| !line.is_empty())
        .collect();
    lines.split_off(lines.len().saturating_sub(count))
}

/// Copies the logs of the instance in `from` into `to`; returns the copies.
pub fn copy_logs(from: &Path, to: &Path) -> io::Result<Vec<PathBuf>> {
    fs::create_dir_all(to)?;
    let mut copies = Vec::new();
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let name = entry.file_name();
        // role.log, serial.log.1, …; disks stay.
        if !name.to_string_lossy().contains(".log") {
            continue;
        }
        let copy = to.join(&name);
        fs::copy(entry.path(), &copy)?;
        copies.push(copy);
    }
    copies.sort();
    Ok(copies)
}

/// Where the logs of a failed test go without `--artifacts`: a directory under
/// the data directory, which keeps the newest few.
pub fn failed_dir(data_dir: &Path, deployment: &str) -> PathBuf {
    let parent = data_dir.join("failed");
    // If old ones cannot be removed, the new one is kept all the same.
    let _ = prune(&parent, KEPT - 1);
    parent.join(deployment.get(..8).unwrap_or(deployment))
}

/// Removes all but the newest `keep` directories in `parent`.
fn prune(parent: &Path, keep: usize) -> io::Result<()> {
    let mut all: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        all.push((entry.metadata()?.modified()?, entry.path()));
    }
    all.sort();
    for (_, path) in &all[..all.len().saturating_sub(keep)] {
        fs::remove_dir_all(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_lines_are_whole_and_without_control_characters() {
        let bytes = b"one\r\n\ntwo\x1b[31m\n\xff three\nfour\n";
        assert_eq!(
            last_lines(bytes, 3),
            ["two\u{fffd}[31m", "\u{fffd} three", "four"]
        );
        assert_eq!(last_lines(bytes, 99).len(), 4);
        assert!(last_lines(b"", 3).is_empty());
        assert_eq!(last_lines(&[b'x'; 9000], 3)[0].len(), MAX_LINE);
        assert!(tail(Path::new("/no/such/log"), 3).is_empty());
    }

    #[test]
    fn logs_are_copied_and_disks_are_not() {
        let root = tempfile::tempdir().unwrap();
        let from = root.path().join("A_IN_0");
        fs::create_dir(&from).unwrap();
        for name in ["role.log", "serial.log", "serial.log.1", "diff.qcow2"] {
            fs::write(from.join(name), name).unwrap();
        }
        let to = root.path().join("out/A_IN_0");
        let names = |paths: Vec<PathBuf>| -> Vec<String> {
            let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
            paths.iter().map(name).collect()
        };
        let copies = copy_logs(&from, &to).unwrap();
        assert_eq!(names(copies), ["role.log", "serial.log", "serial.log.1"]);
    }

    #[test]
    fn the_logs_of_the_newest_failed_tests_are_kept() {
        let root = tempfile::tempdir().unwrap();
        for number in 0..25 {
            let id = format!("{number:032}");
            let directory = failed_dir(root.path(), &id[24..]);
            fs::create_dir_all(&directory).unwrap();
        }
        let left = fs::read_dir(root.path().join("failed")).unwrap().count();
        assert_eq!(left, KEPT);
    }
}
