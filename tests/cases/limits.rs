//! A guest's process has limits that the kernel enforces, and nothing of them
//! is left afterwards.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use e2e::Place;
use e2e::run::{Run, eventually};
use e2e::service::Service;
use nix::sys::signal::Signal;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

/// Said where the tests here cannot do their work.
const NEEDED: &str = "run these tests where cgroups (version 2) with limits can be made, as root \
    or under systemd-run --scope -p Delegate=yes";
/// Memory of an `ExtraSmall` guest in MiB.
const GUEST_MIB: u64 = 768;

fn idle(place: &Place) -> Result<PathBuf> {
    Service::script("#!/bin/sh\nexec sleep 100000\n").write(&place.file("service"))
}

fn vmm(place: &Place) -> Result<u64> {
    let output = place.output(&["ps", "--json"])?;
    let list: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    list["deployments"][0]["instances"][0]["vmm_pid"]
        .as_u64()
        .context("no VMM process")
}

/// The cgroup that a process was given. Without one there is nothing to test.
fn limited(run: &Run<'_>, pid: u64) -> Result<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let own = text.lines().find_map(|line| line.strip_prefix("0::/"));
    let own = own.filter(|path| path.contains("host-agent-"));
    let why = run.seen().iter().find(|line| line.contains("not enforced"));
    let why = why.map_or("and nothing is said of it", String::as_str);
    let path = own.with_context(|| format!("{NEEDED}: {why}"))?;
    Ok(Path::new("/sys/fs/cgroup").join(path))
}

/// Bytes of the disks that a guest writes, if they are on a tmpfs: there they
/// are a part of its memory.
fn disks_in_memory(place: &Place) -> Result<u64> {
    let data = place.data();
    if statfs(&data)?.filesystem_type() != TMPFS_MAGIC {
        return Ok(0);
    }
    let only = |path: PathBuf| -> Result<PathBuf> {
        let directories = fs::read_dir(path)?.flatten();
        let mut directories = directories.filter(|entry| entry.path().is_dir());
        Ok(directories.next().context("a directory")?.path())
    };
    let instance = only(only(data.join("deployments"))?)?;
    let base = data.join("images/minimal/base.ext4");
    Ok(fs::metadata(instance.join("resource.raw"))?.len() + fs::metadata(base)?.len())
}

#[test]
fn a_guests_process_has_its_limits_and_a_killed_command_leaves_no_cgroup() -> Result<()> {
    let place = Place::new()?;
    let service = idle(&place)?;
    let mut run = Run::start(&place, &service, &[])?;
    run.ready()?;
    let pid = vmm(&place)?;
    let limits = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
    };
    ensure!(limit("Max core file size") == Some(0), "{limits}");
    ensure!(
        limit("Max open files").is_some_and(|most| most <= 4096),
        "{limits}"
    );
    let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?;
    ensure!(score.trim() == "500", "{score}");

    let group = limited(&run, pid)?;
    let read = |name: &str| fs::read_to_string(group.join(name));
    let memory: u64 = read("memory.max")?.trim().parse()?;
    let least = GUEST_MIB + (disks_in_memory(&place)? >> 20);
    ensure!(
        (least..least + 256).contains(&(memory >> 20)),
        "{memory}, not {least} MiB and some"
    );
    ensure!(read("pids.max")?.trim() == "64");
    // KVM may have a thread of its own beside it.
    let inside = read("cgroup.procs")?;
    ensure!(
        inside.lines().any(|line| line == pid.to_string()),
        "{inside}"
    );

    let of_deployment = group.parent().context("a guest's cgroup is in one")?;
    run.signal(Signal::SIGKILL)?;
    drop(run);
    eventually("no cgroup is left", || Ok(!of_deployment.exists()))?;
    eventually("nothing is left", || {
        Ok(place.assert_nothing_left().is_ok())
    })
}

#[test]
fn a_process_that_outgrows_its_limit_ends_with_that_reason_and_is_started_again() -> Result<()> {
    let place = Place::new()?;
    place.vmm_is_killed();
    let service = idle(&place)?;
    let mut run = Run::start(&place, &service, &[])?;
    run.ready()?;
    let group = limited(&run, vmm(&place)?)?;
    // Less than it uses already: the kernel finds nothing to take back.
    fs::write(group.join("memory.max"), "16M")?;
    let exited = run.event("guest-exited", |_| true)?;
    let detail = exited["detail"].as_str().unwrap_or_default();
    ensure!(detail.contains("out of memory at its limit"), "{exited}");
    run.event("restarting", |event| event["generation"] == 2)?;
    run.ready()?;
    run.stop()?;
    ensure!(!group.exists(), "{} is left", group.display());
    place.assert_nothing_left()
}

/// As from `systemd-run --scope -p Delegate=yes`.
#[test]
fn a_command_alone_in_a_cgroup_makes_its_guests_there_and_leaves_it_empty() -> Result<()> {
    let place = Place::new()?;
    let service = idle(&place)?;
    let top = Path::new("/sys/fs/cgroup");
    let delegated = top.join(format!("test-{}", std::process::id()));
    fs::write(top.join("cgroup.subtree_control"), "+memory +pids")
        .and_then(|()| fs::create_dir(&delegated))
        .context(NEEDED)?;
    let command = place.command();
    let enter = "echo $$ >\"$0/cgroup.procs\" && exec \"$@\"";
    let output = std::process::Command::new("sh")
        .args(["-c", enter])
        .arg(&delegated)
        .arg(command.get_program())
        .args(["run", "--until", "ready"])
        .arg(service)
        .envs(
            command
                .get_envs()
                .filter_map(|(key, value)| Some((key, value?))),
        )
        .output()?;
    ensure!(output.status.success(), "{}", e2e::text(&output));
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        told.contains("guest starting") && !told.contains("not enforced"),
        "{told}"
    );
    eventually("the cgroup is empty again", || {
        // It cannot be removed before.
        Ok(fs::remove_dir(&delegated).is_ok())
    })?;
    place.assert_nothing_left()
}
