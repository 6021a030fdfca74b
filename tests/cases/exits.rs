//! Each way in which a guest or a role ends is reported, and followed by a restart.

use anyhow::{Result, ensure};
use e2e::Sandbox;
use e2e::run::Run;
use e2e::service::Service;

#[test]
fn reboot_panic_and_power_off_are_reported_and_restarted() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    let mut run = Run::start(&sandbox, &service, &[])?;
    run.ready()?;
    for (key, reason) in [("b", "reboot"), ("c", "panic")] {
        // The guest ends before the command can return.
        let _ = run.exec(&["sh", "-c", &format!("echo {key} > /proc/sysrq-trigger")])?;
        let exited = run.event("guest-exited", |_| true)?;
        ensure!(exited["reason"] == reason, "sysrq {key}: {exited}");
        run.event("restarting", |event| event["because"].is_string())?;
        run.ready()?;
    }
    let _ = run.exec(&["sh", "-c", "echo o > /proc/sysrq-trigger"])?;
    let exited = run.event("guest-exited", |_| true)?;
    ensure!(exited["reason"] == "power-off", "{exited}");
    run.stop()?;
    sandbox.assert_nothing_left()
}

#[test]
fn a_role_that_exits_at_once_is_recycled_and_reported() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::script("#!/bin/sh\necho last words >&2\nexit 7\n")
        .write(&sandbox.file("service"))?;
    let output = sandbox.output(&["test", &service.to_string_lossy(), "--timeout", "300"])?;
    let text = e2e::text(&output);
    ensure!(output.status.code() == Some(9), "{text}");
    ensure!(text.contains("last words") && text.contains('7'), "{text}");
    // The role is Ready while its process runs, which is too short to count.
    let output = sandbox.output(&["run", &service.to_string_lossy(), "--until", "ready"])?;
    let text = e2e::text(&output);
    ensure!(output.status.code() == Some(9), "{text}");
    sandbox.assert_nothing_left()
}

#[test]
fn a_role_that_cannot_be_started_fails_at_once() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::script("#!/no/such/program\n").write(&sandbox.file("service"))?;
    let output = sandbox.output(&["test", &service.to_string_lossy(), "--timeout", "3000"])?;
    let text = e2e::text(&output);
    ensure!(output.status.code() == Some(9), "{text}");
    ensure!(text.contains("cannot be started"), "{text}");
    sandbox.assert_nothing_left()
}

#[test]
fn a_start_that_fails_for_a_while_is_tried_again() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    let mut run = Run::start(&sandbox, &service, &[])?;
    run.ready()?;
    // The bootstrapper cannot bind the role's notify socket where a directory is.
    let socket = "/run/host-agent/role-notify";
    run.shell(&format!(
        "rm {socket}; mkdir {socket}; echo 1 > /sys/fs/cgroup/stack/role/cgroup.kill"
    ))?;
    let retried = |event: &serde_json::Value| {
        event["state"] == "recycling" && event["detail"].to_string().contains("next attempt in 2 s")
    };
    run.event("role", retried)?;
    run.shell(&format!("rmdir {socket}"))?;
    run.ready()?;
    run.stop()?;
    sandbox.assert_nothing_left()
}
