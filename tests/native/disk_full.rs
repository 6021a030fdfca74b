//! The disk is full while a package or a report is written.

use std::fs;

use anyhow::{Result, ensure};
use e2e::mount_namespace::MountNamespace;
use e2e::service::Service;
use e2e::{Sandbox, text};
use sha2::{Digest, Sha256};

/// Pseudo-random bytes, which do not compress.
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
fn a_package_that_does_not_fit_leaves_the_old_one_unchanged() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    let small = sandbox.file("small");
    let disk = MountNamespace::with_tmpfs(&small, "1m")?;
    let package = small.join("a.cspkg");
    let pack = || {
        disk.command(&sandbox, true)
            .arg("pack")
            .arg(&service)
            .arg("-o")
            .arg(&package)
            .output()
    };
    let first = pack()?;
    ensure!(first.status.success(), "{}", text(&first));
    let before = e2e::files(&disk.outside(&small))?;
    let old = fs::read(disk.outside(&package))?;

    fs::write(service.join("Role/noise"), noise(2 << 20))?;
    let second = pack()?;
    let printed = text(&second);
    ensure!(second.status.code() == Some(6), "{printed}");
    for wanted in ["error[HA-0204]", "a.cspkg", "No space left", "  hint "] {
        ensure!(printed.contains(wanted), "`{wanted}` is not in: {printed}");
    }
    ensure!(
        e2e::files(&disk.outside(&small))? == before,
        "something was left"
    );
    ensure!(
        fs::read(disk.outside(&package))? == old,
        "the old package changed"
    );
    Ok(())
}

/// The signal of the limit would end the command without a message.
#[test]
fn a_limit_of_file_sizes_is_named_and_leaves_nothing() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    fs::write(service.join("Role/noise"), noise(2 << 20))?;
    let out = sandbox.file("out");
    fs::create_dir(&out)?;
    let mut command = std::process::Command::new("sh");
    sandbox.set_environment(&mut command);
    let output = command
        .args(["-c", "ulimit -f 1024; exec \"$@\"", "sh"])
        .arg(e2e::program())
        .arg("pack")
        .arg(&service)
        .arg("-o")
        .arg(out.join("a.cspkg"))
        .output()?;
    let printed = text(&output);
    ensure!(output.status.code() == Some(1), "{printed}");
    for wanted in ["error[HA-0103]", "noise", "File too large", "ulimit -f"] {
        ensure!(printed.contains(wanted), "`{wanted}` is not in: {printed}");
    }
    let left = fs::read_dir(&out)?.count();
    ensure!(left == 0, "{left} files are left");
    Ok(())
}

#[test]
fn an_unwritable_report_does_not_hide_the_failure() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    fs::remove_file(service.join("Role/entry"))?;
    let small = sandbox.file("small");
    let disk = MountNamespace::with_tmpfs(&small, "16k")?;
    fs::write(disk.outside(&small).join("filler"), noise(16 << 10))?;
    let output = disk
        .command(&sandbox, true)
        .arg("test")
        .arg(&service)
        .arg("--report")
        .arg(format!("json={}", small.join("new/report.json").display()))
        .output()?;
    let printed = text(&output);
    ensure!(output.status.code() == Some(3), "{printed}");
    for wanted in ["entry", "cannot write", "report.json", "No space left"] {
        ensure!(printed.contains(wanted), "`{wanted}` is not in: {printed}");
    }
    Ok(())
}
