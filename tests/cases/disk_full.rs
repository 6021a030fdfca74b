//! A host that runs out of disk space: said once, clearly, and survived.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::disks::{After, judge};
use e2e::mounts::Mounts;
use e2e::run::{INSTANCE, Run};
use e2e::service::Service;
use e2e::{Place, limit, text};
use nix::sys::statvfs::statvfs;

/// A data directory on a file system of this size, with the images linked in.
fn small_data(place: &Place, size: &str) -> Result<Mounts> {
    let data = place.data();
    let images = e2e::images().canonicalize()?;
    Mounts::new(&format!(
        "mount -t tmpfs -o size={size} small '{data}'\nln -s '{images}' '{data}/images'",
        data = data.display(),
        images = images.display(),
    ))
}

/// What the command left in the data directory beside the images.
fn left(disk: &Mounts, place: &Place) -> Vec<std::ffi::OsString> {
    let mut left = Vec::new();
    for dir in ["deployments", "failed"] {
        if let Ok(entries) = fs::read_dir(disk.seen(&place.data()).join(dir)) {
            left.extend(entries.flatten().map(|entry| entry.file_name()));
        }
    }
    left
}

#[test]
fn a_disk_too_small_for_a_guest_or_its_files_is_refused_before_anything_runs() -> Result<()> {
    let place = Place::new()?;
    let service =
        Service::script("#!/bin/sh\nexec sleep 100000\n").write(&place.file("service"))?;
    // Random, for squashfs and tmpfs alike keep it as large as it is.
    let noise = fs::File::create(service.join("Role/noise"))?;
    io::copy(
        &mut fs::File::open("/dev/urandom")?.take(90 << 20),
        &mut &noise,
    )?;
    for (size, wanted) in [
        ("32m", "not enough free disk space"),
        ("80m", "app.squashfs"),
    ] {
        let disk = small_data(&place, size)?;
        for on_no_kvm in ["fail", "skip"] {
            let output = disk
                .command(&place, true)
                .arg("test")
                .arg(&service)
                .args(["--on-no-kvm", on_no_kvm])
                .output()?;
            let said = text(&output);
            ensure!(output.status.code() == Some(6), "{size}: {said}");
            for wanted in ["error[HA-0204]", wanted, "HOST_AGENT_DATA_DIR"] {
                ensure!(said.contains(wanted), "`{wanted}` is not in: {said}");
            }
            let left = left(&disk, &place);
            ensure!(left.is_empty(), "{size}: {left:?} was left");
        }
    }
    place.assert_nothing_left()
}

/// Fills the file system with the data but for `left` bytes; removing the file
/// makes room.
fn fill(disk: &Mounts, place: &Place, left: u64) -> Result<PathBuf> {
    let data = disk.seen(&place.data());
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

/// A shell line in the guest, which takes as long as the guest stands still.
fn spawn_exec(place: &Place, line: &str) -> Result<Child> {
    Ok(place
        .command()
        .args(["exec", INSTANCE, "--", "sh", "-c", line])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?)
}

fn full(service: &Path, place: &Place, arguments: &[&str]) -> Result<(Mounts, Command)> {
    let disk = small_data(place, "128m")?;
    let mut command = disk.command(place, true);
    command
        .args(["run", "--format", "jsonl"])
        .args(arguments)
        .arg(service);
    Ok((disk, command))
}

#[test]
fn a_guest_whose_disk_is_full_stands_still_without_silence_and_goes_on_by_itself() -> Result<()> {
    let place = Place::new()?;
    let service =
        Service::script("#!/bin/sh\nexec sleep 100000\n").write(&place.file("service"))?;
    let arguments = ["--keep", "--heartbeat-limit", "20"];
    let (disk, command) = full(&service, &place, &arguments)?;
    let mut run = Run::of(&place, command)?;
    run.ready()?;
    let ballast = fill(&disk, &place, 6 << 20)?;
    let noise = "dd if=/dev/urandom of=/run/noise bs=64k count=256 && sha256sum </run/noise";
    let sum = run.shell(noise)?;
    let writing = spawn_exec(&place, WRITE)?;
    let paused = run.event("no-space", |_| true)?;
    let file = paused["file"].as_str().unwrap_or_default().to_owned();
    let named = match paused["disk"].as_str() {
        Some("os") => "Role_IN_0/diff.qcow2",
        _ => "Role_IN_0/resource.raw",
    };
    ensure!(
        file.ends_with(named)
            && paused["mount"] == place.data().to_string_lossy().as_ref()
            && paused["needed_bytes"].as_u64() > Some(0)
            && paused["free_bytes"].as_u64() < Some(6 << 20)
            && paused["quota"] == false,
        "{paused}"
    );
    run.event("out-of-rotation", |_| true)?;
    // It says why it cannot be looked into, and ends by itself only.
    let output = run.exec(&["true"])?;
    let said = text(&output);
    ensure!(
        !output.status.success() && said.contains("no space"),
        "{said}"
    );
    let shown = place.output(&["ps"])?;
    ensure!(text(&shown).contains("NoSpace"), "{}", text(&shown));
    // Longer than the guest may be silent.
    sleep(Duration::from_secs(25));
    fs::remove_file(ballast)?;
    let back = run.event("space-back", |_| true)?;
    ensure!(back["paused_ms"].as_u64() > Some(25_000), "{back}");

    // Nobody in the guest saw an error, and what it wrote is on its disks.
    let written = text(&writing.wait_with_output()?);
    for to in ["/", "/mnt/resource/"] {
        ensure!(written.contains(&format!("written to {to}\n")), "{written}");
    }
    let read = "sync; echo 3 >/proc/sys/vm/drop_caches; \
                sha256sum </fill; sha256sum </mnt/resource/fill; \
                dmesg | grep -ciE 'I/O error|remount|lockup|blocked for' || :";
    let found = run.shell(read)?;
    ensure!(found == format!("{sum}{sum}0\n"), "{sum}{found}");
    let kept = fs::read_dir(disk.seen(&place.data()).join("deployments"))?;
    let kept = kept.flatten().next().context("the deployment")?.path();
    run.interrupt()?;
    let (status, seen) = run.wait()?;
    let seen = seen.join("\n");
    ensure!(status.code() == Some(0), "{status}: {seen}");
    for never in ["verdict", "restarting", "disk-failed"] {
        ensure!(!seen.contains(&format!("\"event\":\"{never}\"")), "{seen}");
    }
    let diff = kept.join("Role_IN_0/diff.qcow2");
    judge(&diff, &place.file("reference"), After::CleanEnd)
}

#[test]
fn a_stop_does_not_wait_for_space() -> Result<()> {
    let place = Place::new()?;
    let service =
        Service::script("#!/bin/sh\nexec sleep 100000\n").write(&place.file("service"))?;
    let (disk, command) = full(&service, &place, &[])?;
    let mut run = Run::of(&place, command)?;
    run.ready()?;
    // A second name keeps the disk when the command removes its own.
    let data = disk.seen(&place.data());
    let deployment = fs::read_dir(data.join("deployments"))?;
    let deployment = deployment.flatten().next().context("the deployment")?;
    let diff = data.join("diff.qcow2");
    fs::hard_link(deployment.path().join(INSTANCE).join("diff.qcow2"), &diff)?;
    fill(&disk, &place, 1 << 20)?;
    let write = "exec dd if=/dev/zero of=/mnt/resource/fill bs=1M count=20 conv=fsync";
    let writing = spawn_exec(&place, write)?;
    run.event("no-space", |event| event["disk"] == "resource")?;
    let asked = Instant::now();
    run.interrupt()?;
    // Its writes fail from here on, so that the guest can end as always.
    let failed = run.event("disk-failed", |_| true)?;
    ensure!(
        failed["disk"] == "resource" && failed["full"] == true,
        "{failed}"
    );
    let (status, seen) = run.wait()?;
    writing.wait_with_output()?;
    let seen = seen.join("\n");
    ensure!(status.code() == Some(0), "{status}: {seen}");
    ensure!(seen.contains(r#""clean":true"#), "{seen}");
    ensure!(asked.elapsed() < limit(30), "{:?}: {seen}", asked.elapsed());
    ensure!(seen.matches("disk-failed").count() <= 2, "{seen}");
    fs::remove_file(disk.seen(&place.data()).join("ballast"))?;
    let left = left(&disk, &place);
    ensure!(left.is_empty(), "{left:?} was left");
    judge(&diff, &place.file("reference"), After::CleanEnd)?;
    place.assert_nothing_left()
}
