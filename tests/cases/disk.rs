//! What a guest wrote and flushed survives; what it shares never changes.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use e2e::Place;
use e2e::run::Run;
use e2e::service::Service;
use sha2::{Digest, Sha256};

fn qemu_img_check(diff: &Path) -> Result<()> {
    let output = Command::new("qemu-img")
        .args(["check", "--output=json"])
        .arg(diff)
        .output()
        .context("qemu-img is a test dependency")?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(
        report["check-errors"] == 0 && report["corruptions"].is_null(),
        "{report}"
    );
    Ok(())
}

fn digest(path: &Path) -> Result<Vec<u8>> {
    Ok(Sha256::digest(std::fs::read(path)?).to_vec())
}

#[test]
fn flushed_data_survives_a_kill_of_the_vmm_in_mid_write_and_the_base_never_changes() -> Result<()> {
    let place = Place::new()?;
    let base = e2e::images().join("minimal/base.ext4");
    let before = digest(&base)?;
    let service =
        Service::script("#!/bin/sh\nexec sleep 100000\n").write(&place.file("service"))?;
    let mut run = Run::start(&place, &service, &["--keep"])?;
    let started = run.event("guest-starting", |_| true)?;
    run.ready()?;
    run.shell("dd if=/dev/urandom of=/flushed bs=64k count=64 conv=fsync 2>/dev/null")?;
    let sum = run.shell("sha256sum /flushed")?;
    run.shell("(while :; do dd if=/dev/urandom of=/unflushed bs=64k count=200; sync; done) >/dev/null 2>&1 </dev/null & echo")?;
    run.shell("until [ -s /unflushed ]; do :; done")?;
    let pid = started["pid"].as_i64().context("pid of the VMM")?;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(pid)?),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    run.event("restarting", |event| event["generation"] == 2)?;
    run.ready()?;
    ensure!(run.shell("sha256sum /flushed")? == sum);
    let diff = run.instance_dir()?.join("diff.qcow2");
    run.stop()?;
    qemu_img_check(&diff)?;
    ensure!(digest(&base)? == before, "the base image changed");
    Ok(())
}
