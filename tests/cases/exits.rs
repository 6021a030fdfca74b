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
