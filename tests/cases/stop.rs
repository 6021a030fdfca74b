//! Each way to end `run`, and what it leaves behind.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::run::{INSTANCE, Run, end, eventually};
use e2e::service::Service;
use e2e::signal_masks::{mask, mask_of};
use e2e::{Sandbox, limit, text};
use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Prints a line when it handles SIGTERM, and another on SIGTERM, but does not exit.
const STUBBORN: &str =
    "#!/bin/sh\ntrap 'echo not yet' TERM\necho at work\nwhile :; do sleep 1 & wait; done\n";
/// As `STUBBORN`, but exits on SIGTERM.
const POLITE: &str = "#!/bin/sh\ntrap 'echo asked to stop; exit 0' TERM\necho at work\nwhile :; do sleep 1 & wait; done\n";

/// Waits until the role has written this line: a Ready role may not have set its
/// signal handler yet.
fn wait_for_log(sandbox: &Sandbox, line: &str) -> Result<()> {
    eventually(line, || {
        let log = sandbox.output(&["logs", INSTANCE])?;
        Ok(text(&log).contains(line))
    })
}

#[test]
fn a_second_ctrl_c_kills_a_guest_whose_role_does_not_stop() -> Result<()> {
    let sandbox = Sandbox::new()?;
    sandbox.vmm_is_killed();
    let service = Service::script(STUBBORN).write(&sandbox.file("service"))?;
    let mut run = Run::start(&sandbox, &service, &[])?;
    run.ready()?;
    wait_for_log(&sandbox, "at work")?;
    run.interrupt()?;
    run.event("stopping", |_| true)?;
    let first = Instant::now();
    // The role has got SIGTERM and has time to stop.
    wait_for_log(&sandbox, "not yet")?;
    // Another signal within a second of the first is the same request.
    sleep(Duration::from_secs(1).saturating_sub(first.elapsed()));
    let asked = Instant::now();
    run.interrupt()?;
    let (status, seen) = run.wait()?;
    ensure!(status.code() == Some(130), "{status}: {seen}");
    ensure!(asked.elapsed() < limit(2), "{:?}: {seen}", asked.elapsed());
    ensure!(seen.contains(r#""clean":false"#), "{seen}");
    sandbox.assert_nothing_left()
}

/// Child processes of the command, with their command lines.
fn children(run: &Run<'_>) -> Result<Vec<(Pid, String)>> {
    let parent = format!("PPid:\t{}", run.pid());
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        // A process that ends meanwhile has no files to read.
        let read = |name| std::fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        if read("status").lines().any(|line| line == parent) {
            let pid = entry.file_name().to_string_lossy().parse()?;
            found.push((Pid::from_raw(pid), read("cmdline").replace('\0', " ")));
        }
    }
    Ok(found)
}

/// What the end of a systemd scope and a shutdown of the host do.
#[test]
fn a_signal_to_every_process_stops_the_role_before_its_guest() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::script(POLITE).write(&sandbox.file("service"))?;
    let mut run = Run::start(&sandbox, &service, &[])?;
    run.ready()?;
    wait_for_log(&sandbox, "at work")?;
    // The command gets the signal last, which is the worst order.
    let children = children(&run)?;
    ensure!(children.len() == 2, "{children:?}");
    for (pid, _) in children {
        kill(pid, Signal::SIGTERM)?;
    }
    run.signal(Signal::SIGTERM)?;
    let (status, seen) = run.wait()?;
    ensure!(status.code() == Some(0), "{status}: {seen}");
    ensure!(seen.contains(r#""clean":true"#), "{seen}");
    ensure!(!seen.contains(r#""event":"restarting""#), "{seen}");
    sandbox.assert_nothing_left()
}

/// GNU `timeout` passes a signal to the command and then to the process group, so that
/// the command gets it twice. The signal state of the parent process does not matter.
#[test]
fn the_two_signals_of_timeout_stop_the_service_cleanly() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::script(POLITE).write(&sandbox.file("service"))?;
    let mut command = Command::new("timeout");
    command
        .arg("10000")
        .args(["env", "--block-signal=TERM", "--ignore-signal=INT,CHLD"])
        .arg(e2e::program())
        .args(["run", "--format", "jsonl"])
        .arg(&service);
    sandbox.set_environment(&mut command);
    let mut run = Run::from_command(&sandbox, command)?;
    run.ready()?;
    wait_for_log(&sandbox, "at work")?;
    run.signal(Signal::SIGTERM)?;
    let (status, seen) = run.wait()?;
    ensure!(status.code() == Some(0), "{status}: {seen}");
    ensure!(seen.contains(r#""clean":true"#), "{seen}");
    sandbox.assert_nothing_left()
}

#[test]
fn a_killed_janitor_is_replaced_by_one_that_cleans_up() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::script(POLITE).write(&sandbox.file("service"))?;
    let mut run = Run::start(&sandbox, &service, &[])?;
    run.ready()?;
    let janitor = || -> Result<Option<Pid>> {
        let mut children = children(&run)?.into_iter();
        let found = children.find(|(_, line)| line.contains(" janitor "));
        Ok(found.map(|(pid, _)| pid))
    };
    let first = janitor()?.context("no janitor")?;
    kill(first, Signal::SIGKILL)?;
    eventually("another janitor runs", || {
        Ok(janitor()?.is_some_and(|pid| pid != first))
    })?;
    run.signal(Signal::SIGKILL)?;
    drop(run);
    sandbox.wait_until_nothing_is_left()
}

/// At a hang-up the shell sends SIGHUP to its jobs, and the kernel sends another.
#[test]
fn a_second_sighup_does_not_shorten_the_time_to_stop() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let role = POLITE.replace("stop; exit 0", "stop; sleep 5; exit 0");
    let service = Service::script(&role).write(&sandbox.file("service"))?;
    // The tests may run under nohup, which ignores the signal.
    let mut command = sandbox.command_by_env(&["--default-signal=HUP"]);
    command.args(["run", "--format", "jsonl"]).arg(&service);
    let mut run = Run::from_command(&sandbox, command)?;
    run.ready()?;
    wait_for_log(&sandbox, "at work")?;
    run.signal(Signal::SIGHUP)?;
    run.event("stopping", |_| true)?;
    wait_for_log(&sandbox, "asked to stop")?;
    run.signal(Signal::SIGHUP)?;
    let (status, seen) = run.wait()?;
    ensure!(status.code() == Some(0), "{status}: {seen}");
    ensure!(seen.contains(r#""clean":true"#), "{seen}");
    sandbox.assert_nothing_left()
}

#[test]
fn a_role_that_does_not_stop_in_time_is_killed_with_an_error() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::script(STUBBORN).write(&sandbox.file("service"))?;
    // As nohup does.
    let mut command = sandbox.command_by_env(&["--ignore-signal=HUP"]);
    command
        .args(["run", "--format", "jsonl"])
        .arg(&service)
        .env("HOST_AGENT_TIMEOUT_SCALE", "1");
    let mut run = Run::from_command(&sandbox, command)?;
    run.ready()?;
    wait_for_log(&sandbox, "at work")?;
    let ignored = mask(run.pid(), "SigIgn")?;
    ensure!(
        ignored == ignored | mask_of(&[Signal::SIGHUP]),
        "{ignored:x}"
    );
    run.interrupt()?;
    let stopped = run.event("role", |event| event["state"] == "stopped")?;
    ensure!(stopped.to_string().contains("killed"), "{stopped}");
    let (status, seen) = run.wait()?;
    ensure!(!status.success(), "{status}: {seen}");
    // The guest shut down, but the stop was not clean.
    ensure!(seen.contains("HA-0403"), "{seen}");
    ensure!(seen.contains(r#""clean":false"#), "{seen}");
    sandbox.assert_nothing_left()
}

#[test]
fn ctrl_c_before_the_guest_runs_leaves_nothing() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::script(POLITE).write(&sandbox.file("service"))?;
    let mut run = Run::start(&sandbox, &service, &[])?;
    run.event("image-verified", |_| true)?;
    run.interrupt()?;
    let (status, seen) = run.wait()?;
    ensure!(matches!(status.code(), Some(0 | 130)), "{status}: {}", seen);
    sandbox.wait_until_nothing_is_left()
}

#[test]
fn a_terminal_that_closes_stops_the_service_cleanly() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::script(POLITE).write(&sandbox.file("service"))?;
    // No other process may keep the terminal open.
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = posix_openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let slave = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_NOCTTY.bits())
        .open(ptsname_r(&master)?)?;
    let mut command = Command::new("env");
    // The session leader gets SIGHUP when its terminal closes. The tests may run under
    // nohup, which ignores the signal.
    command
        .args(["--default-signal=HUP", "setsid", "--ctty", "--wait"])
        .arg(e2e::program())
        .args(["run", "--keep"])
        .arg(&service)
        .stdin(Stdio::from(slave.try_clone()?))
        .stdout(Stdio::from(slave.try_clone()?))
        .stderr(Stdio::from(slave));
    sandbox.set_environment(&mut command);
    let mut child = command.spawn()?;
    drop(command);
    let reader = std::thread::spawn(move || {
        let mut seen = Vec::new();
        let mut piece = [0; 4096];
        while !String::from_utf8_lossy(&seen).contains("Ready. Ctrl-C") {
            match (&master).read(&mut piece) {
                Ok(0) | Err(_) => break,
                Ok(count) => seen.extend_from_slice(&piece[..count]),
            }
        }
        (String::from_utf8_lossy(&seen).into_owned(), master)
    });
    if eventually("the service is Ready", || Ok(reader.is_finished())).is_err() {
        // Closes the terminal, which ends the reader.
        child.kill()?;
    }
    let (seen, master) = reader.join().expect("the reader does not panic");
    ensure!(seen.contains("Ready. Ctrl-C"), "{seen}");
    wait_for_log(&sandbox, "at work")?;
    drop(master);
    end(&mut child)?;
    // The role got SIGTERM.
    let logs = sandbox.output(&["logs", INSTANCE])?;
    ensure!(text(&logs).contains("asked to stop"), "{}", text(&logs));
    std::fs::remove_dir_all(sandbox.data().join("deployments"))?;
    sandbox.assert_nothing_left()
}

#[test]
fn until_ready_ends_at_ready_or_reports_the_state_at_timeout() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::script(POLITE).write(&sandbox.file("service"))?;
    let service = service.to_string_lossy();
    let output = sandbox.output(&["run", &service, "--until", "ready", "--keep"])?;
    let printed = text(&output);
    ensure!(output.status.code() == Some(0), "{printed}");
    // The command prints the directory of the kept deployment.
    let kept = sandbox.data().join("deployments");
    let kept: Vec<_> = std::fs::read_dir(&kept)?.flatten().collect();
    ensure!(kept.len() == 1, "{kept:?}");
    ensure!(
        printed.contains(&*kept[0].path().to_string_lossy()),
        "{printed}"
    );
    let instance = kept[0].path().join(INSTANCE);
    let log = std::fs::read_to_string(instance.join("role.log"))?;
    ensure!(log.contains("asked to stop"), "{log}");
    ensure!(instance.join("diff.qcow2").exists());

    // A role that never reports that it is ready.
    let definition = sandbox.file("service/ServiceDefinition.csdef");
    let xml = std::fs::read_to_string(&definition)?;
    let waits = xml.replace(
        r#"setReadyOnProcessStart="true""#,
        r#"setReadyOnProcessStart="false""#,
    );
    ensure!(waits != xml);
    std::fs::write(&definition, waits)?;
    let seconds = limit(2).as_secs().to_string();
    let output = sandbox
        .command()
        .args(["run", &service, "--until", "ready", "--timeout", &seconds])
        .env("HOST_AGENT_TIMEOUT_SCALE", "1")
        .output()?;
    let printed = text(&output);
    ensure!(output.status.code() == Some(7), "{printed}");
    for wanted in [
        "error[HA-0302]",
        "Role_IN_0 is Starting",
        "--timeout",
        "  last ",
    ] {
        ensure!(printed.contains(wanted), "`{wanted}` is not in: {printed}");
    }
    // Only the kept deployment is left.
    let after: Vec<_> = std::fs::read_dir(sandbox.data().join("deployments"))?
        .flatten()
        .collect();
    ensure!(after.len() == 1, "{after:?}");
    std::fs::remove_dir_all(sandbox.data().join("deployments"))?;
    sandbox.assert_nothing_left()
}
