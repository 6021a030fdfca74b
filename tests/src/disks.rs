//! The diff disks of a test's guests, judged by another program at its end.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use host_agent::vmm::disk::{Backing, open};
use vm_memory::VolatileSlice;

use crate::text;

/// Bytes read at once.
const BLOCK: usize = 1 << 20;

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

/// QEMU finds neither damage nor waste in `diff`, wherever its base is.
pub fn check(diff: &Path) -> Result<()> {
    let image = serde_json::json!({
        "driver": "qcow2",
        "file": {"driver": "file", "filename": diff},
        "backing": null,
    });
    let image = format!("json:{image}");
    let report = tool(
        "qemu-img",
        &["check".as_ref(), "--output=json".as_ref(), image.as_ref()],
    )?;
    let report: serde_json::Value = serde_json::from_str(&report)?;
    ensure!(
        report["check-errors"] == 0 && report["corruptions"].is_null() && report["leaks"].is_null(),
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

/// Second names of diff disks, which keep them when a command removes its own.
#[derive(Debug, Default)]
pub(crate) struct Kept(Mutex<Vec<PathBuf>>);

impl Kept {
    /// Keeps `diff` under a name of its own in `dir`, if it is there.
    pub(crate) fn keep(&self, diff: &Path, dir: &Path) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let name = dir.join(format!("diff-{}.qcow2", kept.len()));
        // In a file system that only the test sees there is no second name.
        if fs::hard_link(diff, &name).is_ok() {
            kept.push(name);
        }
    }

    /// Has every disk checked and compared with what the product reads from it.
    /// Nothing may write to them any more.
    pub(crate) fn judge(&self) -> Result<usize> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for diff in kept.iter() {
            check(diff).context("after the guest")?;
            let reference = diff.with_extension("raw");
            read_out(diff, &reference)?;
            compare(diff, &reference)?;
            fs::remove_file(&reference)?;
        }
        Ok(kept.len())
    }
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
