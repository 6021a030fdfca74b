//! Each way in which a guest ends is told apart.

use anyhow::{Result, ensure};
use e2e::Place;
use e2e::run::Run;
use e2e::service::Service;

#[test]
fn reboot_panic_and_power_off_are_distinct_and_each_is_followed_by_a_new_boot() -> Result<()> {
    let place = Place::new()?;
    let service =
        Service::script("#!/bin/sh\nexec sleep 100000\n").write(&place.file("service"))?;
    let mut run = Run::start(&place, &service, &[])?;
    run.ready()?;
    for (key, reason) in [("b", "reboot"), ("c", "panic")] {
        // The guest is gone before the command can answer.
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
    place.assert_nothing_left()
}

#[test]
fn a_role_that_exits_at_once_is_recycled_with_back_off_and_reported() -> Result<()> {
    let place = Place::new()?;
    let service = Service::script("#!/bin/sh\necho last words >&2\nexit 7\n")
        .write(&place.file("service"))?;
    let output = place.output(&["test", &service.to_string_lossy(), "--timeout", "300"])?;
    let text = e2e::text(&output);
    ensure!(output.status.code() == Some(9), "{text}");
    ensure!(text.contains("last words") && text.contains('7'), "{text}");
    // Its process ran, so it was Ready for a moment: nobody takes it for that.
    let output = place.output(&["run", &service.to_string_lossy(), "--until", "ready"])?;
    let text = e2e::text(&output);
    ensure!(output.status.code() == Some(9), "{text}");
    place.assert_nothing_left()
}
