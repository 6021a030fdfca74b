//! Verifies diff disks with QEMU, and those of a test's guests at its end.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use host_agent::vmm::disk::{Backing, open};
use vm_memory::VolatileSlice;

use crate::text;

/// Bytes per read.
const BLOCK: usize = 1 << 20;
/// Interval between two searches for new disks: shorter than any deployment.
const INTERVAL: Duration = Duration::from_millis(100);
/// Magic number of qcow2, which `create_diff` writes last.
const MAGIC: &[u8] = b"QFI\xfb";

/// How the last program that wrote to a disk ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriterEnd {
    /// It exited.
    Clean,
    /// It was killed, maybe during a write: the disk may have leaked clusters.
    Killed,
}

/// Runs a program that reads disk images; its standard output.
pub fn tool(name: &str, arguments: &[&OsStr]) -> Result<String> {
    let output = Command::new(name)
        .args(arguments)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()
        .with_context(|| format!("{name} is a test dependency"))?;
    ensure!(output.status.success(), "{name}: {}", text(&output));
    Ok(String::from_utf8(output.stdout)?)
}

/// Fails if QEMU finds corruption in `diff`, or leaked clusters after a clean end.
/// The base is not opened.
pub fn check(diff: &Path, writer: WriterEnd) -> Result<()> {
    let image = serde_json::json!({
        "driver": "qcow2",
        "file": {"driver": "file", "filename": diff},
        "backing": null,
    });
    let output = Command::new("qemu-img")
        .args(["check", "--output=json"])
        .arg(format!("json:{image}"))
        .output()
        .context("qemu-img is a test dependency")?;
    // 3: leaked clusters, no corruption (qemu-img(1)).
    ensure!(
        matches!(output.status.code(), Some(0 | 3)),
        "qemu-img check: {}",
        text(&output)
    );
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(
        report["check-errors"] == 0
            && report["corruptions"].is_null()
            && (report["leaks"].is_null() || writer == WriterEnd::Killed),
        "{report}"
    );
    Ok(())
}

/// Fails unless QEMU reads the contents of the raw file `reference` from `diff` and its base.
pub fn compare(diff: &Path, reference: &Path) -> Result<()> {
    let mut arguments: Vec<&OsStr> = ["compare", "-f", "qcow2", "-F", "raw"]
        .map(OsStr::new)
        .into();
    arguments.extend([diff.as_os_str(), reference.as_os_str()]);
    let compared = tool("qemu-img", &arguments)?;
    ensure!(compared.contains("Images are identical"), "{compared}");
    Ok(())
}

/// Checks `diff`, and compares what QEMU reads from it with what the product reads,
/// which is then in the raw file `reference`. No program may write to `diff` meanwhile.
pub fn verify(diff: &Path, reference: &Path, writer: WriterEnd) -> Result<()> {
    check(diff, writer).context("after the guest")?;
    copy_to_raw(diff, reference)?;
    compare(diff, reference)
}

/// Hard-links every diff disk that appears below a directory, so that it still
/// exists after its command has removed the deployment.
#[derive(Debug)]
pub(crate) struct DiskWatch {
    /// Dropping it ends the thread.
    open: Option<Sender<()>>,
    thread: Option<JoinHandle<Vec<PathBuf>>>,
    killed: AtomicBool,
}

impl DiskWatch {
    /// Links the disks of `deployments` into `dir` until they are verified.
    pub(crate) fn start(deployments: PathBuf, dir: PathBuf) -> Self {
        let (open, closed) = channel::<()>();
        let thread = thread::spawn(move || {
            let mut seen = BTreeSet::new();
            let mut links = Vec::new();
            loop {
                let last = closed.recv_timeout(INTERVAL) != Err(RecvTimeoutError::Timeout);
                for diff in disks(&deployments) {
                    let link = dir.join(format!("diff-{}.qcow2", links.len()));
                    if !seen.contains(&diff) && fs::hard_link(&diff, &link).is_ok() {
                        links.push(link);
                        seen.insert(diff);
                    }
                }
                if last {
                    return links;
                }
            }
        });
        Self {
            open: Some(open),
            thread: Some(thread),
            killed: AtomicBool::new(false),
        }
    }

    /// Accepts leaked clusters, because a program that writes to a disk is killed.
    pub(crate) fn writer_is_killed(&self) {
        self.killed.store(true, Ordering::Relaxed);
    }

    /// Verifies every disk. No program may write to them any more.
    pub(crate) fn verify(&mut self) -> Result<()> {
        let writer = if self.killed.load(Ordering::Relaxed) {
            WriterEnd::Killed
        } else {
            WriterEnd::Clean
        };
        self.open = None;
        let thread = self.thread.take().context("the disks are verified once")?;
        let links = thread.join().map_err(|_| anyhow!("the watch panicked"))?;
        for diff in links {
            let reference = diff.with_extension("raw");
            verify(&diff, &reference, writer)?;
            fs::remove_file(&reference)?;
        }
        Ok(())
    }
}

/// The complete diff disks of all instances.
fn disks(deployments: &Path) -> Vec<PathBuf> {
    let below = |dir: PathBuf| {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.path())
    };
    below(deployments.to_owned())
        .flat_map(below)
        .map(|instance| instance.join("diff.qcow2"))
        .filter(|diff| {
            let mut magic = [0; MAGIC.len()];
            File::open(diff)
                .and_then(|file| file.read_exact_at(&mut magic, 0))
                .is_ok_and(|()| magic == MAGIC)
        })
        .collect()
}

/// Copies `diff` to the raw file `raw`, as the product reads it.
fn copy_to_raw(diff: &Path, raw: &Path) -> Result<()> {
    let info = tool(
        "qemu-img",
        &["info".as_ref(), "--output=json".as_ref(), diff.as_ref()],
    )?;
    let info: serde_json::Value = serde_json::from_str(&info)?;
    let base = info["full-backing-filename"].as_str();
    let mut disk = open(Backing::Diff {
        diff: OpenOptions::new().read(true).write(true).open(diff)?,
        base: File::open(base.context("a diff has a base")?)?,
    })?;
    let raw = File::create(raw)?;
    raw.set_len(disk.size())?;
    let mut block = vec![0; BLOCK];
    let mut at = 0;
    while at < disk.size() {
        let count = usize::try_from(disk.size() - at).map_or(BLOCK, |left| left.min(BLOCK));
        disk.read(at, &[VolatileSlice::from(&mut block[..count])])?;
        // Zeros stay holes.
        if block[..count].iter().any(|byte| *byte != 0) {
            raw.write_all_at(&block[..count], at)?;
        }
        at += count as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use host_agent::vmm::disk::create_diff;

    /// A diff disk in an instance's directory, with 64 KiB of `fill` written and flushed.
    fn instance(dir: &Path, fill: u8) -> Result<PathBuf> {
        let base = dir.join("base");
        fs::write(&base, vec![7; 1 << 20])?;
        let instance = dir.join("deployments/d/Role_IN_0");
        fs::create_dir_all(&instance)?;
        let diff = instance.join("diff.qcow2");
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let file = options.clone().create_new(true).open(&diff)?;
        create_diff(file, 1 << 20, &base.to_string_lossy())?;
        let mut disk = open(Backing::Diff {
            diff: options.open(&diff)?,
            base: File::open(&base)?,
        })?;
        let mut block = vec![fill; 1 << 16];
        disk.write(1 << 17, &[VolatileSlice::from(block.as_mut_slice())])?;
        disk.flush()?;
        Ok(diff)
    }

    #[test]
    fn removed_disks_are_verified_and_leaks_need_a_killed_writer() -> Result<()> {
        for (damage, writer, sound) in [
            (None, WriterEnd::Clean, true),
            (Some((0, 1)), WriterEnd::Clean, false),
            (Some((0, 1)), WriterEnd::Killed, true),
            (Some((1, 0)), WriterEnd::Killed, false),
        ] {
            let dir = tempfile::tempdir()?;
            let mut watch = DiskWatch::start(dir.path().join("deployments"), dir.path().to_owned());
            if writer == WriterEnd::Killed {
                watch.writer_is_killed();
            }
            let diff = instance(dir.path(), 9)?;
            if let Some((from, to)) = damage {
                change_refcount(&diff, from, to)?;
            }
            let link = dir.path().join("diff-0.qcow2");
            crate::run::eventually("the disk is linked", || Ok(link.exists()))?;
            fs::remove_dir_all(dir.path().join("deployments"))?;
            let found = watch.verify();
            ensure!(found.is_ok() == sound, "{damage:?} {writer:?}: {found:?}");
        }
        Ok(())
    }

    /// Sets the refcount of the last cluster whose refcount is `from` to `to`.
    fn change_refcount(diff: &Path, from: u16, to: u16) -> Result<()> {
        let file = OpenOptions::new().read(true).write(true).open(diff)?;
        let clusters = file.metadata()?.len() >> 16;
        // One more cluster, with refcount 0.
        file.set_len((clusters + 1) << 16)?;
        let mut word = [0; 8];
        // refcount_table_offset of the qcow2 header, then the first refcount block.
        file.read_exact_at(&mut word, 48)?;
        let table = u64::from_be_bytes(word);
        file.read_exact_at(&mut word, table)?;
        let block = u64::from_be_bytes(word);
        for cluster in (0..=clusters).rev() {
            let mut count = [0; 2];
            file.read_exact_at(&mut count, block + 2 * cluster)?;
            if u16::from_be_bytes(count) == from {
                file.write_all_at(&to.to_be_bytes(), block + 2 * cluster)?;
                return Ok(());
            }
        }
        Err(anyhow!("no cluster has refcount {from}"))
    }
}
