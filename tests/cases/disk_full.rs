//! A host that runs out of disk space: guests pause, and no data is lost.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::disks::{WriterEnd, verify};
use e2e::mount_namespace::MountNamespace;
use e2e::run::{INSTANCE, Run};
use e2e::service::Service;
use e2e::{Sandbox, limit, text};
use nix::sys::statvfs::statvfs;

/// A data directory on a file system of this size, with the images linked in.
fn small_data(sandbox: &Sandbox, size: &str) -> Result<MountNamespace> {
    let data = sandbox.data();
    let images = e2e::images().canonicalize()?;
    MountNamespace::new(&format!(
        "mount -t tmpfs -o size={size} small '{data}'\nln -s '{images}' '{data}/images'",
        data = data.display(),
        images = images.display(),
    ))
}

/// What the command left in the data directory, except the images.
fn left(disk: &MountNamespace, sandbox: &Sandbox) -> Vec<std::ffi::OsString> {
    let mut left = Vec::new();
    for dir in ["deployments", "failed", "content"] {
        if let Ok(entries) = fs::read_dir(disk.outside(&sandbox.data()).join(dir)) {
            left.extend(entries.flatten().map(|entry| entry.file_name()));
        }
    }
    // The lock of the content stays.
    left.retain(|name| name != "lock");
    left
}

#[test]
fn a_data_disk_that_is_too_small_is_refused_before_start() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    // Random data, which squashfs does not compress.
    let noise = fs::File::create(service.join("Role/noise"))?;
    io::copy(
        &mut fs::File::open("/dev/urandom")?.take(90 << 20),
        &mut &noise,
    )?;
    for (size, wanted) in [
        ("32m", "not enough free disk space"),
        ("80m", "application disk of role Role in "),
    ] {
        let disk = small_data(&sandbox, size)?;
        for on_no_kvm in ["fail", "skip"] {
            let output = disk
                .command(&sandbox, true)
                .arg("test")
                .arg(&service)
                .args(["--on-no-kvm", on_no_kvm])
                .output()?;
            let printed = text(&output);
            ensure!(output.status.code() == Some(6), "{size}: {printed}");
            for wanted in ["error[HA-0204]", wanted, "HOST_AGENT_DATA_DIR"] {
                ensure!(printed.contains(wanted), "`{wanted}` is not in: {printed}");
            }
            let left = left(&disk, &sandbox);
            ensure!(left.is_empty(), "{size}: {left:?} was left");
        }
    }
    sandbox.assert_nothing_left()
}

/// Fills the file system of the data directory except for `left` bytes; the file to
/// remove to free the space again.
fn fill(disk: &MountNamespace, sandbox: &Sandbox, left: u64) -> Result<PathBuf> {
    let data = disk.outside(&sandbox.data());
    let ballast = data.join("ballast");
    let stat = statvfs(&data)?;
    let free = stat.blocks_available() * stat.fragment_size();
    let mut file = fs::File::create(&ballast)?;
    io::copy(
        &mut io::repeat(1).take(free.saturating_sub(left)),
        &mut file,
    )?;
    Ok(ballast)
}

/// Writes more than `fill` leaves to both disks of the guest at once.
const WRITE: &str = "for to in / /mnt/resource/; do
    (dd if=/run/noise of=$to/fill bs=64k conv=fsync && echo written to $to) &
done
wait";

/// Starts a shell line in the guest, which ends only after the guest resumes.
fn spawn_exec(sandbox: &Sandbox, line: &str) -> Result<Child> {
    Ok(sandbox
        .command()
        .args(["exec", INSTANCE, "--", "sh", "-c", line])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?)
}

/// A `run` of `service` with a data directory of 128 MiB.
fn run_with_small_data(
    service: &Path,
    sandbox: &Sandbox,
    arguments: &[&str],
) -> Result<(MountNamespace, Command)> {
    let disk = small_data(sandbox, "128m")?;
    let mut command = disk.command(sandbox, true);
    command
        .args(["run", "--format", "jsonl"])
        .args(arguments)
        .arg(service);
    Ok((disk, command))
}

#[test]
fn a_guest_pauses_while_its_disk_is_full_and_then_resumes() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    let arguments = ["--keep", "--heartbeat-limit", "20"];
    let (disk, command) = run_with_small_data(&service, &sandbox, &arguments)?;
    let mut run = Run::from_command(&sandbox, command)?;
    run.ready()?;
    let ballast = fill(&disk, &sandbox, 6 << 20)?;
    let noise = "dd if=/dev/urandom of=/run/noise bs=64k count=256 && sha256sum </run/noise";
    let sum = run.shell(noise)?;
    let writing = spawn_exec(&sandbox, WRITE)?;
    let paused = run.event("no-space", |_| true)?;
    let file = paused["file"].as_str().unwrap_or_default().to_owned();
    let named = match paused["disk"].as_str() {
        Some("os") => "Role_IN_0/diff.qcow2",
        _ => "Role_IN_0/resource.raw",
    };
    ensure!(
        file.ends_with(named)
            && paused["mount"] == sandbox.data().to_string_lossy().as_ref()
            && paused["needed_bytes"].as_u64() > Some(0)
            && paused["free_bytes"].as_u64() < Some(6 << 20)
            && paused["quota"] == false,
        "{paused}"
    );
    run.event("out-of-rotation", |_| true)?;
    // `exec` fails and names the reason.
    let output = run.exec(&["true"])?;
    let printed = text(&output);
    ensure!(
        !output.status.success() && printed.contains("no space"),
        "{printed}"
    );
    let shown = sandbox.output(&["ps"])?;
    ensure!(text(&shown).contains("NoSpace"), "{}", text(&shown));
    // Longer than the heartbeat limit.
    sleep(Duration::from_secs(25));
    fs::remove_file(ballast)?;
    let back = run.event("space-back", |_| true)?;
    ensure!(back["paused_ms"].as_u64() > Some(25_000), "{back}");

    // No process in the guest saw an error, and the data is on both disks.
    let written = text(&writing.wait_with_output()?);
    for to in ["/", "/mnt/resource/"] {
        ensure!(written.contains(&format!("written to {to}\n")), "{written}");
    }
    let read = "sync; echo 3 >/proc/sys/vm/drop_caches; \
                sha256sum </fill; sha256sum </mnt/resource/fill; \
                dmesg | grep -ciE 'I/O error|remount|lockup|blocked for' || :";
    let found = run.shell(read)?;
    ensure!(found == format!("{sum}{sum}0\n"), "{sum}{found}");
    let kept = fs::read_dir(disk.outside(&sandbox.data()).join("deployments"))?;
    let kept = kept.flatten().next().context("the deployment")?.path();
    run.interrupt()?;
    let (status, seen) = run.wait()?;
    ensure!(status.code() == Some(0), "{status}: {seen}");
    for never in ["verdict", "restarting", "disk-failed"] {
        ensure!(!seen.contains(&format!("\"event\":\"{never}\"")), "{seen}");
    }
    let diff = kept.join("Role_IN_0/diff.qcow2");
    verify(&diff, &sandbox.file("reference"), WriterEnd::Clean)
}

#[test]
fn a_stop_does_not_wait_for_disk_space() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    let (disk, command) = run_with_small_data(&service, &sandbox, &[])?;
    let mut run = Run::from_command(&sandbox, command)?;
    run.ready()?;
    // A hard link keeps the disk when the command removes the deployment.
    let data = disk.outside(&sandbox.data());
    let deployment = fs::read_dir(data.join("deployments"))?;
    let deployment = deployment.flatten().next().context("the deployment")?;
    let diff = data.join("diff.qcow2");
    fs::hard_link(deployment.path().join(INSTANCE).join("diff.qcow2"), &diff)?;
    fill(&disk, &sandbox, 1 << 20)?;
    let write = "exec dd if=/dev/zero of=/mnt/resource/fill bs=1M count=20 conv=fsync";
    let writing = spawn_exec(&sandbox, write)?;
    run.event("no-space", |event| event["disk"] == "resource")?;
    let asked = Instant::now();
    run.interrupt()?;
    // From now on ENOSPC fails the guest's writes, so that the guest can shut down.
    let failed = run.event("disk-failed", |_| true)?;
    ensure!(
        failed["disk"] == "resource" && failed["full"] == true,
        "{failed}"
    );
    let (status, seen) = run.wait()?;
    writing.wait_with_output()?;
    ensure!(status.code() == Some(0), "{status}: {seen}");
    ensure!(seen.contains(r#""clean":true"#), "{seen}");
    ensure!(asked.elapsed() < limit(30), "{:?}: {seen}", asked.elapsed());
    ensure!(seen.matches("disk-failed").count() <= 2, "{seen}");
    fs::remove_file(disk.outside(&sandbox.data()).join("ballast"))?;
    let left = left(&disk, &sandbox);
    ensure!(left.is_empty(), "{left:?} was left");
    verify(&diff, &sandbox.file("reference"), WriterEnd::Clean)?;
    sandbox.assert_nothing_left()
}
