//! `serve` on a machine that may not run guests: what it tells its service manager, and its
//! unit file.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use e2e::mount_namespace::MountNamespace;
use e2e::run::{end, eventually};
use e2e::service::Service;
use e2e::{Sandbox, limit, text};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn a_service_manager_learns_that_the_daemon_serves_lives_and_ends() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let path = sandbox.file("notify");
    let manager = UnixDatagram::bind(&path)?;
    manager.set_read_timeout(Some(limit(10)))?;
    let state = || -> Result<String> {
        let mut buffer = [0; 256];
        let length = manager.recv(&mut buffer).context("a report")?;
        Ok(String::from_utf8_lossy(&buffer[..length]).trim().to_owned())
    };
    let mut daemon = sandbox
        .command()
        .arg("serve")
        .env("NOTIFY_SOCKET", &path)
        .env("WATCHDOG_USEC", "100000")
        .env_remove("WATCHDOG_PID")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    ensure!(state()? == "READY=1");
    // The manager is told when requests are answered, not before.
    let listed = sandbox.output(&["service", "list"])?;
    ensure!(listed.status.success(), "{}", text(&listed));
    for _ in 0..3 {
        ensure!(state()? == "WATCHDOG=1");
    }
    let pid = Pid::from_raw(i32::try_from(daemon.id())?);
    kill(pid, Signal::SIGHUP)?;
    kill(pid, Signal::SIGTERM)?;
    while state()? != "STOPPING=1" {}
    let status = end(&mut daemon)?;
    ensure!(status.success(), "{status}");
    let left = sandbox.output(&["service", "list"])?;
    ensure!(left.status.code() == Some(10), "{}", text(&left));
    Ok(())
}

#[test]
fn a_daemon_without_kvm_serves_and_takes_no_service() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let namespace = MountNamespace::with_kvm(&sandbox, "true")?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    let service = service.to_string_lossy();
    let run = |arguments: &[&str]| -> Result<_> {
        let mut command = namespace.command(&sandbox, false);
        Ok(command.args(arguments).output()?)
    };
    let mut daemon = namespace
        .command(&sandbox, false)
        .arg("serve")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    eventually("the daemon serves", || {
        Ok(run(&["service", "list"])?.status.success())
    })?;
    let planned = run(&[
        "service",
        "apply",
        "shop",
        "--package",
        &service,
        "--dry-run",
    ])?;
    ensure!(planned.status.success(), "{}", text(&planned));
    let refused = run(&["service", "apply", "shop", "--package", &service])?;
    let printed = text(&refused);
    ensure!(refused.status.code() == Some(6), "{printed}");
    ensure!(
        printed.contains("HA-0203") && printed.contains("/dev/kvm"),
        "{printed}"
    );
    let listed = run(&["service", "list"])?;
    ensure!(text(&listed).contains("no services"), "{}", text(&listed));
    daemon.kill()?;
    daemon.wait()?;
    Ok(())
}

#[test]
fn systemd_accepts_the_unit_file() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let bin = sandbox.file("bin");
    fs::create_dir(&bin)?;
    std::os::unix::fs::symlink(e2e::program(), bin.join("host-agent"))?;
    let unit = include_str!("../../scripts/host-agent.service");
    let unit = unit.replace("@bindir@", &bin.to_string_lossy());
    let socket = include_str!("../../scripts/host-agent.socket");
    let paths = [("service", &*unit), ("socket", socket)].map(|(kind, text)| {
        let path = sandbox.file(&format!("host-agent.{kind}"));
        fs::write(&path, text).map(|()| path)
    });
    let [service, socket] = paths;
    let output = Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .args([service?, socket?])
        .output()
        .context("systemd-analyze is a test dependency (systemd)")?;
    let printed = text(&output);
    ensure!(output.status.success(), "{printed}");
    // It accepts unknown settings with a warning.
    ensure!(!printed.contains("host-agent."), "{printed}");
    Ok(())
}
