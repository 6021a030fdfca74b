//! A guest without heartbeats is restarted with its disks.

use anyhow::{Context, Result, ensure};
use e2e::Sandbox;
use e2e::run::{INSTANCE, Run};
use e2e::service::Service;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn a_frozen_guest_is_restarted_at_the_limit_with_its_data() -> Result<()> {
    let sandbox = Sandbox::new()?;
    sandbox.vmm_is_killed();
    let service = Service::idle().write(&sandbox.file("service"))?;
    let mut run = Run::start(&sandbox, &service, &["--heartbeat-limit", "20"])?;
    run.ready()?;
    let data = run.shell("for d in /mnt/resource/Resources/directory/*; do echo $d; done")?;
    run.shell(&format!("echo kept > {}/mark && sync", data.trim()))?;
    run.shell("echo kept > /root-mark && sync")?;
    let frozen = sandbox.output(&["freeze", INSTANCE])?;
    ensure!(frozen.status.success(), "{}", e2e::text(&frozen));
    let verdict = run.event("verdict", |event| event["verdict"]["kind"] == "silent")?;
    let silence = verdict["verdict"]["silence_ms"].as_u64().unwrap_or(0);
    ensure!((20_000..21_000).contains(&silence), "{verdict}");
    // The host killed the guest, and the timeline says so.
    let ended = run.event("guest-exited", |_| true)?;
    let because = ended["because"].as_str().unwrap_or_default();
    ensure!(
        ended["reason"] == "killed" && because.starts_with("no heartbeat for 20."),
        "{ended}"
    );
    run.event("restarting", |event| event["generation"] == 2)?;
    run.ready()?;
    ensure!(run.shell(&format!("cat {}/mark /root-mark", data.trim()))? == "kept\nkept\n");
    run.stop()?;
    sandbox.assert_nothing_left()
}

#[test]
fn a_stopped_vmm_process_is_reported_as_hung_and_replaced() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    // The pings find it: the heartbeat limit is ten minutes.
    let mut command = sandbox.command();
    command
        .args(["run", "--format", "jsonl"])
        .arg(service)
        .env("HOST_AGENT_TIMEOUT_SCALE", "2");
    let mut run = Run::from_command(&sandbox, command)?;
    let started = run.event("guest-starting", |_| true)?;
    let pid = started["pid"].as_i64().context("a process id")?;
    run.ready()?;
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGSTOP)?;
    run.event("verdict", |event| event["verdict"]["kind"] == "vmm-hung")?;
    let ended = run.event("guest-exited", |_| true)?;
    ensure!(
        ended["reason"] == "killed" && ended["because"] == "VMM process does not answer",
        "{ended}"
    );
    run.event("restarting", |event| event["generation"] == 2)?;
    run.ready()?;
    run.stop()?;
    sandbox.assert_nothing_left()
}
