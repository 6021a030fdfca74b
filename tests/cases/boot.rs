//! From a service directory to Ready, and a clean end.

use anyhow::{Result, ensure};
use e2e::run::{INSTANCE, Run};
use e2e::service::Service;
use e2e::{Place, text};

#[test]
fn the_test_verb_reports_ready_probe_and_clean_stop_and_leaves_nothing() -> Result<()> {
    let place = Place::new()?;
    let service = Service::echo()?.write(&place.file("service"))?;
    let json = place.file("report.json");
    let junit = place.file("report.xml");
    let output = place.output(&[
        "test",
        &service.to_string_lossy(),
        "--probe",
        "tcp://Echo",
        "--report",
        &format!("json={}", json.display()),
        "--report",
        &format!("junit={}", junit.display()),
    ])?;
    ensure!(output.status.code() == Some(0), "{}", text(&output));
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(json)?)?;
    ensure!(report["result"] == "ok", "{report}");
    let junit = std::fs::read_to_string(junit)?;
    ensure!(
        junit.contains("<testsuite") && !junit.contains("<failure"),
        "{junit}"
    );
    place.assert_nothing_left()
}

#[test]
fn exec_gives_the_guests_true_exit_code_and_logs_show_the_role() -> Result<()> {
    let place = Place::new()?;
    let service = Service::script("#!/bin/sh\necho role says $0; id -u; env; exec sleep 100000\n")
        .write(&place.file("service"))?;
    let mut run = Run::start(&place, &service, &[])?;
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
    let missing = place.output(&["exec", "Nobody_IN_0", "--", "true"])?;
    ensure!(missing.status.code() == Some(125), "{}", text(&missing));
    ensure!(text(&missing).contains("HA-0501"), "{}", text(&missing));

    let logs = place.output(&["logs", INSTANCE, "--source", "role"])?;
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
    place.assert_nothing_left()
}

#[test]
fn a_killed_command_leaves_no_guest_no_disk_and_no_socket_behind() -> Result<()> {
    let place = Place::new()?;
    let service =
        Service::script("#!/bin/sh\nexec sleep 100000\n").write(&place.file("service"))?;
    let mut run = Run::start(&place, &service, &[])?;
    run.ready()?;
    run.signal(nix::sys::signal::Signal::SIGKILL)?;
    drop(run);
    e2e::run::eventually("nothing is left", || {
        Ok(place.assert_nothing_left().is_ok())
    })
}
