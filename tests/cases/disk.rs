//! What a guest wrote and flushed survives; what it shares never changes.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use e2e::Place;
use e2e::disks::{After, check, compare, judge, tool};
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

/// The file /flushed in the file system `raw` has this digest.
fn flushed_is(sum: &str, raw: &Path, place: &Place) -> Result<()> {
    let copy = place.file("flushed");
    let dump = format!("dump /flushed {}", copy.display());
    tool("debugfs", &["-R".as_ref(), dump.as_ref(), raw.as_ref()])?;
    ensure!(sum.starts_with(&digest(&copy)?), "/flushed on the host");
    Ok(())
}

/// Whether the process has ended with all its threads, whoever waits for it.
fn ended(pid: i64) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    let state = stat.rsplit(") ").next().unwrap_or_default();
    state.is_empty() || (state.starts_with('Z') && threads <= 1)
}

#[test]
fn flushed_data_survives_a_kill_of_the_vmm_in_mid_write_and_the_base_never_changes() -> Result<()> {
    let place = Place::new()?;
    place.vmm_is_killed();
    let base = e2e::images().join("minimal/base.ext4");
    let before = digest(&base)?;
    let service =
        Service::script("#!/bin/sh\nexec sleep 100000\n").write(&place.file("service"))?;
    let mut run = Run::start(&place, &service, &["--keep"])?;
    let started = run.event("guest-starting", |_| true)?;
    run.ready()?;
    run.shell("dd if=/dev/urandom of=/flushed bs=64k count=64 conv=fsync 2>/dev/null")?;
    let sum = run.shell("sha256sum </flushed")?;
    run.shell("(while :; do dd if=/dev/urandom of=/unflushed bs=64k count=200; sync; done) >/dev/null 2>&1 </dev/null & echo")?;
    run.shell("until [ -s /unflushed ]; do :; done")?;
    let pid = started["pid"].as_i64().context("pid of the VMM")?;
    // What the kill left is judged before the next start of the guest, which the
    // command would be quick with, writes to it again.
    run.signal(Signal::SIGSTOP)?;
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
    eventually("the VMM ends", || Ok(ended(pid)))?;
    let diff = run.instance_dir()?.join("diff.qcow2");
    let reference = place.file("reference.raw");
    judge(&diff, &reference, After::Kill)?;
    // The journal is replayed, and nothing else needs mending. 1: something was done.
    let replay = "e2fsck -fp \"$0\" || [ $? -eq 1 ]";
    tool("sh", &["-c".as_ref(), replay.as_ref(), reference.as_ref()])?;
    flushed_is(&sum, &reference, &place)?;
    fs::remove_file(&reference)?;
    run.signal(Signal::SIGCONT)?;
    let started = run.event("guest-starting", |event| event["generation"] == 2)?;
    run.ready()?;
    ensure!(run.shell("sha256sum </flushed")? == sum);

    // Every block that is free, until none is; then the disk as the guest
    // reads it, byte by byte, while nothing can change.
    let free = run.shell(
        "rm -f /unflushed; dd if=/dev/urandom of=/fill bs=1M 2>/dev/null; sync; \
         stat -f -c %f /",
    )?;
    // ext4 keeps up to 4,096 for itself (kernel, fs/ext4/super.c, ext4_set_resv_clusters).
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

    // Read by other programs, the chain of diff and base holds just that.
    check(&diff, After::Kill)?;
    let mut arguments: Vec<&OsStr> = ["convert", "-f", "qcow2", "-O", "raw"]
        .map(OsStr::new)
        .into();
    arguments.extend([diff.as_os_str(), reference.as_os_str()]);
    tool("qemu-img", &arguments)?;
    ensure!(digest(&reference)? == seen, "the guest reads another disk");
    compare(&diff, &reference)?;
    tool("e2fsck", &["-fn".as_ref(), reference.as_ref()])?;
    flushed_is(&sum, &reference, &place)?;
    ensure!(digest(&base)? == before, "the base image changed");
    Ok(())
}
