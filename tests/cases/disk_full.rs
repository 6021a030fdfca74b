//! A host that runs out of disk space: said once, clearly, and survived.

use std::fs;

use anyhow::{Result, ensure};
use e2e::mounts::Mounts;
use e2e::run::Run;
use e2e::service::Service;
use e2e::{Place, text};

/// A data directory on a file system of this size, with the images linked in.
fn small_data(place: &Place, size: &str) -> Result<Mounts> {
    let data = place.data();
    let images = e2e::images().canonicalize()?;
    Mounts::new(&format!(
        "mount -t tmpfs -o size={size} small {data}\nln -s {images} {data}/images",
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
    std::io::copy(
        &mut std::io::Read::take(fs::File::open("/dev/urandom")?, 90 << 20),
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

#[test]
fn a_disk_that_fills_under_a_guest_is_named_and_the_service_goes_on_until_it_is_stopped()
-> Result<()> {
    let place = Place::new()?;
    let service =
        Service::script("#!/bin/sh\nexec sleep 100000\n").write(&place.file("service"))?;
    let disk = small_data(&place, "128m")?;
    let mut command = disk.command(&place, true);
    command.args(["run", "--format", "jsonl"]).arg(&service);
    let mut run = Run::of(&place, command)?;
    run.ready()?;
    // The resource disk can be written again when there is room: the guest
    // sees an error, the others of its disks do not change.
    let fill = "dd if=/dev/urandom of=/mnt/resource/fill bs=1M count=200 conv=fsync";
    let output = run.exec(&["sh", "-c", fill])?;
    ensure!(!output.status.success(), "{}", text(&output));
    // Which of them depends on whether the journal or the file came first.
    let said = text(&output);
    ensure!(
        said.contains("Input/output error") || said.contains("Read-only file system"),
        "{said}"
    );
    let failed = run.event("disk-failed", |_| true)?;
    let named = failed["file"].as_str().unwrap_or_default().to_owned();
    ensure!(
        failed["disk"] == "resource"
            && named.ends_with("Role_IN_0/resource.raw")
            && failed["full"] == true,
        "{failed}"
    );
    // The guest answers, and what is in memory or on the disks can be read.
    ensure!(run.shell("sha256sum /bin/true >/dev/null && echo alive")? == "alive\n");
    run.interrupt()?;
    let (status, seen) = run.wait()?;
    let seen = seen.join("\n");
    ensure!(status.code() == Some(0), "{status}: {seen}");
    ensure!(seen.matches("disk-failed").count() <= 2, "{seen}");
    let left = left(&disk, &place);
    ensure!(left.is_empty(), "{left:?} was left");
    place.assert_nothing_left()
}
