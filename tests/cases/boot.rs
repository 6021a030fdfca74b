//! A service from its directory to Ready, and its end.

use anyhow::{Context, Result, ensure};
use e2e::run::{INSTANCE, Run};
use e2e::service::Service;
use e2e::{Sandbox, text};

#[test]
fn test_reports_ready_probe_and_clean_stop() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (service, _) = Service::echo()?;
    let service = service.write(&sandbox.file("service"))?;
    let json = sandbox.file("report.json");
    let junit = sandbox.file("report.xml");
    let output = sandbox
        .command()
        .args(["test", "--probe", "tcp://Echo", "--report"])
        .arg(format!("json={}", json.display()))
        .arg("--report")
        .arg(format!("junit={}", junit.display()))
        .arg(&service)
        .env("HOST_AGENT_TIMEOUT_SCALE", "60")
        .output()?;
    ensure!(output.status.code() == Some(0), "{}", text(&output));
    // The second of being Ready is not scaled.
    let shown = String::from_utf8_lossy(&output.stderr);
    let at = |what| seconds(&shown, what).with_context(|| format!("no {what} in {shown}"));
    let steady = at("role Ready")?..at("stopping")?;
    ensure!(steady.end - steady.start < 30.0, "{steady:?}: {shown}");
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(json)?)?;
    ensure!(report["result"] == "ok", "{report}");
    let junit = std::fs::read_to_string(junit)?;
    ensure!(
        junit.contains("<testsuite") && !junit.contains("<failure"),
        "{junit}"
    );
    sandbox.assert_nothing_left()
}

/// Time of the first line of the timeline that ends with `what`.
fn seconds(timeline: &str, what: &str) -> Option<f64> {
    let line = timeline.lines().find(|line| line.ends_with(what))?;
    let (minutes, seconds) = line.get(1..)?.split_once(']')?.0.split_once(':')?;
    Some(minutes.parse::<f64>().ok()? * 60.0 + seconds.parse::<f64>().ok()?)
}

#[test]
fn exec_returns_the_exit_code_and_logs_show_the_role() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::script("#!/bin/sh\necho role says $0; id -u; env; exec sleep 100000\n")
        .write(&sandbox.file("service"))?;
    let mut run = Run::start(&sandbox, &service, &[])?;
    run.ready()?;
    for (line, code) in [
        ("exit 0", 0),
        ("exit 1", 1),
        ("exit 77", 77),
        ("kill -9 $$", 137),
    ] {
        let output = run.exec(&["sh", "-c", line])?;
        ensure!(
            output.status.code() == Some(code),
            "{line}: {}",
            text(&output)
        );
    }
    ensure!(run.exec(&["/no/such/program"])?.status.code() == Some(127));
    ensure!(run.exec(&["/etc/passwd"])?.status.code() == Some(126));
    ensure!(run.shell("echo out")? == "out\n");
    let release = run.release()?;
    ensure!(release.starts_with("13\n6.12."), "{release}");
    let missing = sandbox.output(&["exec", "Nobody_IN_0", "--", "true"])?;
    ensure!(missing.status.code() == Some(125), "{}", text(&missing));
    ensure!(text(&missing).contains("HA-0501"), "{}", text(&missing));

    let logs = sandbox.output(&["logs", INSTANCE, "--source", "role"])?;
    let log = String::from_utf8_lossy(&logs.stdout).into_owned();
    for wanted in [
        "role says",
        "RoleName=Role",
        "RoleInstanceID=Role_IN_0",
        "RoleRoot=/mnt/e",
        "DATA=/mnt/resource/Resources/directory/",
    ] {
        ensure!(
            log.contains(wanted),
            "{wanted} is not in the role's log:\n{log}"
        );
    }
    ensure!(!log.contains("out: 0\n"), "the role runs as root:\n{log}");
    run.stop()?;
    sandbox.assert_nothing_left()
}

#[test]
fn a_killed_command_leaves_no_guest_disk_or_socket() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    let mut run = Run::start(&sandbox, &service, &[])?;
    run.ready()?;
    run.signal(nix::sys::signal::Signal::SIGKILL)?;
    drop(run);
    sandbox.wait_until_nothing_is_left()
}
