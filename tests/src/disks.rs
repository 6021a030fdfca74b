//! The diff disks of a test's guests, judged by another program at its end.

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

/// Bytes read at once.
const BLOCK: usize = 1 << 20;
/// How often new disks are looked for: sooner than a guest can write to one and
/// its command remove it.
const LOOK: Duration = Duration::from_millis(100);
/// The first bytes of a diff disk, written when it is complete.
const MAGIC: &[u8] = b"QFI\xfb";

/// How the last program that wrote to a disk ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// By itself.
    CleanEnd,
    /// Killed, perhaps in mid-write: clusters may be counted that hold nothing.
    Kill,
}

/// Runs a tool on disk images; what it printed.
pub fn tool(name: &str, arguments: &[&OsStr]) -> Result<String> {
    let output = Command::new(name)
        .args(arguments)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()
        .with_context(|| format!("{name} is a test dependency"))?;
    ensure!(output.status.success(), "{name}: {}", text(&output));
    Ok(String::from_utf8(output.stdout)?)
}

/// QEMU finds no damage in `diff`, wherever its base is, and no waste either
/// unless its writer was killed.
pub fn check(diff: &Path, after: After) -> Result<()> {
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
    // 3: leaks and nothing else (qemu-img(1)).
    ensure!(
        matches!(output.status.code(), Some(0 | 3)),
        "qemu-img check: {}",
        text(&output)
    );
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(
        report["check-errors"] == 0
            && report["corruptions"].is_null()
            && (report["leaks"].is_null() || after == After::Kill),
        "{report}"
    );
    Ok(())
}

/// QEMU reads from `diff` and its base what the raw file `reference` holds.
pub fn compare(diff: &Path, reference: &Path) -> Result<()> {
    let mut arguments: Vec<&OsStr> = ["compare", "-f", "qcow2", "-F", "raw"]
        .map(OsStr::new)
        .into();
    arguments.extend([diff.as_os_str(), reference.as_os_str()]);
    let compared = tool("qemu-img", &arguments)?;
    ensure!(compared.contains("Images are identical"), "{compared}");
    Ok(())
}

/// Has `diff` checked, and compared with what the product reads from it, which is
/// in the raw file `reference` then. Nothing may write to it meanwhile.
pub fn judge(diff: &Path, reference: &Path, after: After) -> Result<()> {
    check(diff, after).context("after the guest")?;
    read_out(diff, reference)?;
    compare(diff, reference)
}

/// Second names of diff disks, which keep them when a command removes its own.
/// They are given to every disk that appears below a directory, whoever made it.
#[derive(Debug)]
pub(crate) struct Kept {
    /// Closed, it ends the thread.
    open: Option<Sender<()>>,
    thread: Option<JoinHandle<Vec<PathBuf>>>,
    killed: AtomicBool,
}

impl Kept {
    /// Looks for disks of `deployments` until it is time to judge them, and gives
    /// them names in `dir`.
    pub(crate) fn watch(deployments: PathBuf, dir: PathBuf) -> Self {
        let (open, closed) = channel::<()>();
        let thread = thread::spawn(move || {
            let mut seen = BTreeSet::new();
            let mut kept = Vec::new();
            loop {
                let last = closed.recv_timeout(LOOK) != Err(RecvTimeoutError::Timeout);
                for diff in disks(&deployments) {
                    let name = dir.join(format!("diff-{}.qcow2", kept.len()));
                    if !seen.contains(&diff) && fs::hard_link(&diff, &name).is_ok() {
                        kept.push(name);
                        seen.insert(diff);
                    }
                }
                if last {
                    return kept;
                }
            }
        });
        Self {
            open: Some(open),
            thread: Some(thread),
            killed: AtomicBool::new(false),
        }
    }

    /// A program that writes to a disk may be killed.
    pub(crate) fn may_be_killed(&self) {
        self.killed.store(true, Ordering::Relaxed);
    }

    /// Judges every disk. Nothing may write to them any more.
    pub(crate) fn judge(&mut self) -> Result<()> {
        let after = if self.killed.load(Ordering::Relaxed) {
            After::Kill
        } else {
            After::CleanEnd
        };
        self.open = None;
        let thread = self.thread.take().context("judged once")?;
        let kept = thread.join().map_err(|_| anyhow!("the watch panicked"))?;
        for diff in kept {
            let reference = diff.with_extension("raw");
            judge(&diff, &reference, after)?;
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

/// Writes to `raw` all that the product's own reader finds in `diff`.
fn read_out(diff: &Path, raw: &Path) -> Result<()> {
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
        // Holes stay holes.
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

    /// A diff with 64 KiB of `fill` written and flushed, where an instance has it.
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
    fn a_disk_that_its_command_removed_is_judged_and_only_a_kill_excuses_leaks() -> Result<()> {
        for (damage, after, sound) in [
            (None, After::CleanEnd, true),
            (Some((0, 1)), After::CleanEnd, false),
            (Some((0, 1)), After::Kill, true),
            (Some((1, 0)), After::Kill, false),
        ] {
            let dir = tempfile::tempdir()?;
            let mut kept = Kept::watch(dir.path().join("deployments"), dir.path().to_owned());
            if after == After::Kill {
                kept.may_be_killed();
            }
            let diff = instance(dir.path(), 9)?;
            if let Some((from, to)) = damage {
                recount(&diff, from, to)?;
            }
            let name = dir.path().join("diff-0.qcow2");
            crate::run::eventually("it has a second name", || Ok(name.exists()))?;
            fs::remove_dir_all(dir.path().join("deployments"))?;
            let judged = kept.judge();
            ensure!(judged.is_ok() == sound, "{damage:?} {after:?}: {judged:?}");
        }
        Ok(())
    }

    /// Changes the count of the last cluster that is counted `from` times to `to`.
    fn recount(diff: &Path, from: u16, to: u16) -> Result<()> {
        let file = OpenOptions::new().read(true).write(true).open(diff)?;
        let clusters = file.metadata()?.len() >> 16;
        // Room for one more, which nobody counts.
        file.set_len((clusters + 1) << 16)?;
        let mut word = [0; 8];
        // Where the table of counts is (qcow2, byte 48), and its first block.
        file.read_exact_at(&mut word, 48)?;
        let table = u64::from_be_bytes(word);
        file.read_exact_at(&mut word, table)?;
        let counts = u64::from_be_bytes(word);
        for cluster in (0..=clusters).rev() {
            let mut count = [0; 2];
            file.read_exact_at(&mut count, counts + 2 * cluster)?;
            if u16::from_be_bytes(count) == from {
                file.write_all_at(&to.to_be_bytes(), counts + 2 * cluster)?;
                return Ok(());
            }
        }
        Err(anyhow!("no cluster is counted {from} times"))
    }
}
