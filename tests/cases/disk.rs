//! Data that a guest flushed survives; the base image never changes.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use e2e::Sandbox;
use e2e::disks::{WriterEnd, check, compare, tool, verify};
use e2e::run::{Run, eventually};
use e2e::service::Service;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest, Sha256};

/// SHA-256 as sha256sum prints it.
fn digest(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut file = fs::File::open(path)?;
    let mut block = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut block)?;
        if count == 0 {
            break;
        }
        hash.update(&block[..count]);
    }
    Ok(hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// Fails unless the file /flushed in the file system `raw` has this digest.
fn flushed_is(sum: &str, raw: &Path, sandbox: &Sandbox) -> Result<()> {
    let copy = sandbox.file("flushed");
    let dump = format!("dump /flushed {}", copy.display());
    tool("debugfs", &["-R".as_ref(), dump.as_ref(), raw.as_ref()])?;
    ensure!(sum.starts_with(&digest(&copy)?), "/flushed on the host");
    Ok(())
}

/// Whether the process has ended with all its threads; it may be a zombie.
fn ended(pid: i64) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    let state = stat.rsplit(") ").next().unwrap_or_default();
    state.is_empty() || (state.starts_with('Z') && threads <= 1)
}

#[test]
fn flushed_data_survives_a_vmm_killed_during_writes() -> Result<()> {
    let sandbox = Sandbox::new()?;
    sandbox.vmm_is_killed();
    let base = e2e::images().join("minimal/base.ext4");
    let before = digest(&base)?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    let mut run = Run::start(&sandbox, &service, &["--keep"])?;
    let started = run.event("guest-starting", |_| true)?;
    run.ready()?;
    run.shell("dd if=/dev/urandom of=/flushed bs=64k count=64 conv=fsync 2>/dev/null")?;
    let sum = run.shell("sha256sum </flushed")?;
    run.shell("(while :; do dd if=/dev/urandom of=/unflushed bs=64k count=200; sync; done) >/dev/null 2>&1 </dev/null & echo")?;
    run.shell("until [ -s /unflushed ]; do :; done")?;
    let pid = started["pid"].as_i64().context("pid of the VMM")?;
    // The stopped command cannot start the guest again, which would write to the disk
    // before it is verified.
    run.signal(Signal::SIGSTOP)?;
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
    eventually("the VMM ends", || Ok(ended(pid)))?;
    let diff = run.instance_dir()?.join("diff.qcow2");
    let reference = sandbox.file("reference.raw");
    verify(&diff, &reference, WriterEnd::Killed)?;
    // The journal is replayed and the file system needs no other repair. Exit code 1:
    // errors were corrected.
    let replay = "e2fsck -fp \"$0\" || [ $? -eq 1 ]";
    tool("sh", &["-c".as_ref(), replay.as_ref(), reference.as_ref()])?;
    flushed_is(&sum, &reference, &sandbox)?;
    fs::remove_file(&reference)?;
    run.signal(Signal::SIGCONT)?;
    let started = run.event("guest-starting", |event| event["generation"] == 2)?;
    run.ready()?;
    ensure!(run.shell("sha256sum </flushed")? == sum);

    // Fill the disk; then hash it as the guest reads it, with the file system frozen.
    let free = run.shell(
        "rm -f /unflushed; dd if=/dev/urandom of=/fill bs=1M 2>/dev/null; sync; \
         stat -f -c %f /",
    )?;
    // ext4 reserves up to 4,096 clusters (kernel, fs/ext4/super.c, ext4_set_resv_clusters).
    let free: u64 = free.trim().parse()?;
    ensure!(free <= 4096, "{free} blocks are free");
    let seen = run
        .shell("sync; fsfreeze -f / && echo 3 >/proc/sys/vm/drop_caches && sha256sum </dev/vda")?;
    let seen = seen.split(' ').next().unwrap_or_default().to_owned();
    let pid = started["pid"].as_i64().context("pid of the VMM")?;
    run.signal(Signal::SIGKILL)?;
    drop(run);
    eventually("the VMM ends with its supervisor", || {
        Ok(!Path::new(&format!("/proc/{pid}")).exists())
    })?;

    // QEMU reads the same bytes from the chain of diff and base.
    check(&diff, WriterEnd::Killed)?;
    let mut arguments: Vec<&OsStr> = ["convert", "-f", "qcow2", "-O", "raw"]
        .map(OsStr::new)
        .into();
    arguments.extend([diff.as_os_str(), reference.as_os_str()]);
    tool("qemu-img", &arguments)?;
    ensure!(digest(&reference)? == seen, "the guest reads another disk");
    compare(&diff, &reference)?;
    tool("e2fsck", &["-fn".as_ref(), reference.as_ref()])?;
    flushed_is(&sum, &reference, &sandbox)?;
    ensure!(digest(&base)? == before, "the base image changed");
    Ok(())
}
