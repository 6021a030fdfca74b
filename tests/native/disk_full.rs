//! A disk that is full while a package or a report is written.

use std::fs;

use anyhow::{Result, ensure};
use e2e::mounts::Mounts;
use e2e::service::Service;
use e2e::{Place, text};
use sha2::{Digest, Sha256};

/// Bytes that do not compress.
fn noise(size: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size + 32);
    let mut block = Sha256::digest(b"noise");
    while bytes.len() < size {
        bytes.extend_from_slice(&block);
        block = Sha256::digest(block);
    }
    bytes.truncate(size);
    bytes
}

#[test]
fn a_package_that_does_not_fit_is_refused_by_name_and_leaves_the_old_one_whole() -> Result<()> {
    let place = Place::new()?;
    let service =
        Service::script("#!/bin/sh\nexec sleep 100000\n").write(&place.file("service"))?;
    let small = place.file("small");
    let disk = Mounts::small(&small, "1m")?;
    let package = small.join("a.cspkg");
    let pack = || {
        disk.command(&place, true)
            .arg("pack")
            .arg(&service)
            .arg("-o")
            .arg(&package)
            .output()
    };
    let first = pack()?;
    ensure!(first.status.success(), "{}", text(&first));
    let before = e2e::files(&disk.seen(&small))?;
    let old = fs::read(disk.seen(&package))?;

    fs::write(service.join("Role/noise"), noise(2 << 20))?;
    let second = pack()?;
    let said = text(&second);
    ensure!(second.status.code() == Some(6), "{said}");
    for wanted in ["error[HA-0204]", "a.cspkg", "No space left", "  hint "] {
        ensure!(said.contains(wanted), "`{wanted}` is not in: {said}");
    }
    ensure!(
        e2e::files(&disk.seen(&small))? == before,
        "something was left"
    );
    ensure!(
        fs::read(disk.seen(&package))? == old,
        "the old package changed"
    );
    Ok(())
}

#[test]
fn a_report_that_cannot_be_written_does_not_hide_why_the_test_failed() -> Result<()> {
    let place = Place::new()?;
    let service =
        Service::script("#!/bin/sh\nexec sleep 100000\n").write(&place.file("service"))?;
    fs::remove_file(service.join("Role/entry"))?;
    let small = place.file("small");
    let disk = Mounts::small(&small, "16k")?;
    fs::write(disk.seen(&small).join("filler"), noise(16 << 10))?;
    let output = disk
        .command(&place, true)
        .arg("test")
        .arg(&service)
        .arg("--report")
        .arg(format!("json={}", small.join("new/report.json").display()))
        .output()?;
    let said = text(&output);
    ensure!(output.status.code() == Some(3), "{said}");
    for wanted in ["entry", "cannot write", "report.json", "No space left"] {
        ensure!(said.contains(wanted), "`{wanted}` is not in: {said}");
    }
    Ok(())
}
