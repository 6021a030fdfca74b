//! The kernel enforces limits on a VMM process, and its cgroup is removed at the end.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use e2e::Sandbox;
use e2e::run::{Run, eventually};
use e2e::service::Service;
use nix::sys::signal::Signal;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

/// Error of these tests on a host without cgroup limits.
const NEEDED: &str = "run these tests where cgroups (version 2) with limits can be made, as root \
    or under systemd-run --scope -p Delegate=yes";
/// Memory of an `ExtraSmall` guest in MiB.
const GUEST_MIB: u64 = 768;

fn idle(sandbox: &Sandbox) -> Result<PathBuf> {
    Service::idle().write(&sandbox.file("service"))
}

fn vmm_pid(sandbox: &Sandbox) -> Result<u64> {
    let output = sandbox.output(&["ps", "--json"])?;
    let list: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    list["deployments"][0]["instances"][0]["vmm_pid"]
        .as_u64()
        .context("no VMM process")
}

/// The cgroup of a VMM process. Fails if it has none.
fn limited(run: &Run<'_>, pid: u64) -> Result<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let own = text.lines().find_map(|line| line.strip_prefix("0::/"));
    let own = own.filter(|path| path.contains("host-agent-"));
    let why = run.seen().iter().find(|line| line.contains("not enforced"));
    let why = why.map_or("the timeline gives no reason", String::as_str);
    let path = own.with_context(|| format!("{NEEDED}: {why}"))?;
    Ok(Path::new("/sys/fs/cgroup").join(path))
}

/// Bytes of the disks that a guest writes, if they are on a tmpfs, where the kernel
/// counts them as memory of the cgroup.
fn disks_in_memory(sandbox: &Sandbox) -> Result<u64> {
    let data = sandbox.data();
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
fn a_vmm_process_has_limits_and_leaves_no_cgroup() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = idle(&sandbox)?;
    let doctor = sandbox.output(&["doctor", "--json"])?;
    let doctor: serde_json::Value = serde_json::from_slice(&doctor.stdout)?;
    let layers = doctor["sandbox"].as_array().context("layers")?;
    let complete = layers.iter().all(|layer| layer["missing"].is_null());
    // Past the test harness, which hides the output of tests that pass.
    let _ = writeln!(std::io::stderr(), "complete sandbox: {complete}");
    let required: &[&str] = if complete {
        &["--require-sandbox"]
    } else {
        &[]
    };
    let mut run = Run::start(&sandbox, &service, required)?;
    run.ready()?;
    let pid = vmm_pid(&sandbox)?;
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
    // The largest file is a disk: of the image, or for resources.
    let most = limit("Max file size").context("a number")?;
    ensure!((256 << 20..64 << 30).contains(&most), "{limits}");
    // Session and terminal are the fields 6 and 7 (`proc_pid_stat(5)`).
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(") ").context("stat")?;
    let fields: Vec<_> = fields.split(' ').collect();
    ensure!(fields[3] == pid.to_string() && fields[4] == "0", "{stat}");
    let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?;
    ensure!(score.trim() == "500", "{score}");

    let group = limited(&run, pid)?;
    let read = |name: &str| fs::read_to_string(group.join(name));
    let memory: u64 = read("memory.max")?.trim().parse()?;
    let least = GUEST_MIB + (disks_in_memory(&sandbox)? >> 20);
    ensure!(
        (least..least + 256).contains(&(memory >> 20)),
        "memory.max is {memory}, not {least} to {} MiB",
        least + 256
    );
    ensure!(read("pids.max")?.trim() == "64");
    // KVM may have added a kernel thread (kvm-nx-lpage-recovery).
    let inside = read("cgroup.procs")?;
    ensure!(
        inside.lines().any(|line| line == pid.to_string()),
        "{inside}"
    );

    let of_deployment = group.parent().context("a guest's cgroup is in one")?;
    run.signal(Signal::SIGKILL)?;
    drop(run);
    eventually("no cgroup is left", || Ok(!of_deployment.exists()))?;
    sandbox.wait_until_nothing_is_left()
}

#[test]
fn a_vmm_process_over_its_memory_limit_is_restarted() -> Result<()> {
    let sandbox = Sandbox::new()?;
    sandbox.vmm_is_killed();
    let service = idle(&sandbox)?;
    let mut run = Run::start(&sandbox, &service, &[])?;
    run.ready()?;
    let group = limited(&run, vmm_pid(&sandbox)?)?;
    // Less than the process uses, and the kernel cannot reclaim enough of it.
    fs::write(group.join("memory.max"), "16M")?;
    let exited = run.event("guest-exited", |_| true)?;
    let detail = exited["detail"].as_str().unwrap_or_default();
    ensure!(detail.contains("out of memory at its limit"), "{exited}");
    run.event("restarting", |event| event["generation"] == 2)?;
    run.ready()?;
    run.stop()?;
    ensure!(!group.exists(), "{} is left", group.display());
    sandbox.assert_nothing_left()
}

/// What `systemd-run --scope -p Delegate=yes` sets up.
#[test]
fn a_command_in_a_delegated_cgroup_leaves_it_empty() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = idle(&sandbox)?;
    let top = Path::new("/sys/fs/cgroup");
    let delegated = top.join(format!("test-{}", std::process::id()));
    fs::write(top.join("cgroup.subtree_control"), "+memory +pids")
        .and_then(|()| fs::create_dir(&delegated))
        .context(NEEDED)?;
    let command = sandbox.command();
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
    let timeline = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        timeline.contains("guest starting") && !timeline.contains("not enforced"),
        "{timeline}"
    );
    eventually("the cgroup is empty again", || {
        // rmdir fails until then.
        Ok(fs::remove_dir(&delegated).is_ok())
    })?;
    sandbox.assert_nothing_left()
}
