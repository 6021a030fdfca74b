//! Each way to end a command, and what it leaves.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use e2e::run::{INSTANCE, Run, eventually};
use e2e::service::Service;
use e2e::{Place, limit, text};
use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Says when it would hear, then that it was asked to stop, and stops or does not.
const STUBBORN: &str =
    "#!/bin/sh\ntrap 'echo not yet' TERM\necho at work\nwhile :; do sleep 1 & wait; done\n";
const POLITE: &str = "#!/bin/sh\ntrap 'echo asked to stop; exit 0' TERM\necho at work\nwhile :; do sleep 1 & wait; done\n";

/// A role is Ready when its process runs, which may be before it would hear.
fn heard(place: &Place, line: &str) -> Result<()> {
    eventually(line, || {
        let log = place.output(&["logs", INSTANCE])?;
        Ok(text(&log).contains(line))
    })
}

#[test]
fn a_second_ctrl_c_kills_a_guest_whose_role_does_not_stop() -> Result<()> {
    let place = Place::new()?;
    place.vmm_is_killed();
    let service = Service::script(STUBBORN).write(&place.file("service"))?;
    let mut run = Run::start(&place, &service, &[])?;
    run.ready()?;
    heard(&place, "at work")?;
    run.interrupt()?;
    run.event("stopping", |_| true)?;
    // The role heard of it and is given its time.
    heard(&place, "not yet")?;
    let asked = Instant::now();
    run.interrupt()?;
    let (status, seen) = run.wait()?;
    let seen = seen.join("\n");
    ensure!(status.code() == Some(130), "{status}: {seen}");
    ensure!(asked.elapsed() < limit(2), "{:?}: {seen}", asked.elapsed());
    ensure!(seen.contains(r#""clean":false"#), "{seen}");
    place.assert_nothing_left()
}

/// Processes that the command started, with their command lines.
fn children(run: &Run<'_>) -> Result<Vec<(Pid, String)>> {
    let parent = format!("PPid:\t{}", run.pid());
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        // Those that end meanwhile are none of them.
        let read = |name| std::fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        if read("status").lines().any(|line| line == parent) {
            let pid = entry.file_name().to_string_lossy().parse()?;
            found.push((Pid::from_raw(pid), read("cmdline").replace('\0', " ")));
        }
    }
    Ok(found)
}

/// As the end of a systemd scope or a shutdown of the host does.
#[test]
fn a_signal_to_every_process_stops_the_role_before_its_guest() -> Result<()> {
    let place = Place::new()?;
    let service = Service::script(POLITE).write(&place.file("service"))?;
    let mut run = Run::start(&place, &service, &[])?;
    run.ready()?;
    heard(&place, "at work")?;
    // The command last: the worst order.
    let children = children(&run)?;
    ensure!(children.len() == 2, "{children:?}");
    for (pid, _) in children {
        kill(pid, Signal::SIGTERM)?;
    }
    run.signal(Signal::SIGTERM)?;
    let (status, seen) = run.wait()?;
    let seen = seen.join("\n");
    ensure!(status.code() == Some(0), "{status}: {seen}");
    ensure!(seen.contains(r#""clean":true"#), "{seen}");
    ensure!(!seen.contains(r#""event":"restarting""#), "{seen}");
    place.assert_nothing_left()
}

#[test]
fn a_killed_janitor_is_followed_by_another_that_cleans_up() -> Result<()> {
    let place = Place::new()?;
    let service = Service::script(POLITE).write(&place.file("service"))?;
    let mut run = Run::start(&place, &service, &[])?;
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
    eventually("nothing is left", || {
        Ok(place.assert_nothing_left().is_ok())
    })
}

/// The shell sends a hang-up to its jobs, and the kernel another.
#[test]
fn a_second_hang_up_leaves_a_role_its_time_to_stop() -> Result<()> {
    let place = Place::new()?;
    let role = POLITE.replace("stop; exit 0", "stop; sleep 5; exit 0");
    let service = Service::script(&role).write(&place.file("service"))?;
    let mut run = Run::start(&place, &service, &[])?;
    run.ready()?;
    heard(&place, "at work")?;
    run.signal(Signal::SIGHUP)?;
    run.event("stopping", |_| true)?;
    heard(&place, "asked to stop")?;
    run.signal(Signal::SIGHUP)?;
    let (status, seen) = run.wait()?;
    let seen = seen.join("\n");
    ensure!(status.code() == Some(0), "{status}: {seen}");
    ensure!(seen.contains(r#""clean":true"#), "{seen}");
    place.assert_nothing_left()
}

#[test]
fn a_role_that_does_not_stop_in_its_time_is_killed_and_that_is_no_clean_end() -> Result<()> {
    let place = Place::new()?;
    let service = Service::script(STUBBORN).write(&place.file("service"))?;
    let mut command = place.command();
    command
        .args(["run", "--format", "jsonl"])
        .arg(&service)
        .env("HOST_AGENT_TIMEOUT_SCALE", "1");
    let mut run = Run::of(&place, command)?;
    run.ready()?;
    heard(&place, "at work")?;
    run.interrupt()?;
    let stopped = run.event("role", |event| event["state"] == "stopped")?;
    ensure!(stopped.to_string().contains("killed"), "{stopped}");
    let (status, seen) = run.wait()?;
    let seen = seen.join("\n");
    ensure!(!status.success(), "{status}: {seen}");
    // The guest itself went down in good order.
    ensure!(seen.contains("HA-0403"), "{seen}");
    ensure!(seen.contains(r#""clean":false"#), "{seen}");
    place.assert_nothing_left()
}

#[test]
fn ctrl_c_before_the_guest_runs_leaves_nothing() -> Result<()> {
    let place = Place::new()?;
    let service = Service::script(POLITE).write(&place.file("service"))?;
    let mut run = Run::start(&place, &service, &[])?;
    run.event("image-verified", |_| true)?;
    run.interrupt()?;
    let (status, seen) = run.wait()?;
    ensure!(
        matches!(status.code(), Some(0 | 130)),
        "{status}: {}",
        seen.join("\n")
    );
    eventually("nothing is left", || {
        Ok(place.assert_nothing_left().is_ok())
    })
}

#[test]
fn a_terminal_that_closes_stops_the_service_cleanly() -> Result<()> {
    let place = Place::new()?;
    let service = Service::script(POLITE).write(&place.file("service"))?;
    // No other process may hold the terminal open.
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = posix_openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let slave = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_NOCTTY.bits())
        .open(ptsname_r(&master)?)?;
    let mut command = Command::new("setsid");
    // The session's leader gets SIGHUP when its terminal goes.
    command
        .args(["--ctty", "--wait"])
        .arg(e2e::program())
        .args(["run", "--keep"])
        .arg(&service)
        .stdin(Stdio::from(slave.try_clone()?))
        .stdout(Stdio::from(slave.try_clone()?))
        .stderr(Stdio::from(slave));
    place.surround(&mut command);
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
    let deadline = Instant::now() + limit(30);
    let mut in_time = |condition: &dyn Fn() -> bool, what: &str| {
        while !condition() && child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                let _ = child.kill();
                bail!("the command {what}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    };
    in_time(&|| reader.is_finished(), "is not Ready")?;
    let (seen, master) = reader.join().expect("the reader does not panic");
    ensure!(seen.contains("Ready. Ctrl-C"), "{seen}");
    heard(&place, "at work")?;
    drop(master);
    in_time(&|| false, "does not end with its terminal")?;
    // The role was asked, and the guest powered off by itself.
    let logs = place.output(&["logs", INSTANCE])?;
    ensure!(text(&logs).contains("asked to stop"), "{}", text(&logs));
    std::fs::remove_dir_all(place.data().join("deployments"))?;
    place.assert_nothing_left()
}

#[test]
fn until_ready_ends_at_ready_or_at_the_timeout_with_the_state_it_was_in() -> Result<()> {
    let place = Place::new()?;
    let service = Service::script(POLITE).write(&place.file("service"))?;
    let service = service.to_string_lossy();
    let output = place.output(&["run", &service, "--until", "ready", "--keep"])?;
    let said = text(&output);
    ensure!(output.status.code() == Some(0), "{said}");
    // Kept, and the command says where.
    let kept = place.data().join("deployments");
    let kept: Vec<_> = std::fs::read_dir(&kept)?.flatten().collect();
    ensure!(kept.len() == 1, "{kept:?}");
    ensure!(said.contains(&*kept[0].path().to_string_lossy()), "{said}");
    let instance = kept[0].path().join(INSTANCE);
    let log = std::fs::read_to_string(instance.join("role.log"))?;
    ensure!(log.contains("asked to stop"), "{log}");
    ensure!(instance.join("diff.qcow2").exists());

    // A role that never says that it is ready.
    let definition = place.file("service/ServiceDefinition.csdef");
    let xml = std::fs::read_to_string(&definition)?;
    let waits = xml.replace(
        r#"setReadyOnProcessStart="true""#,
        r#"setReadyOnProcessStart="false""#,
    );
    ensure!(waits != xml);
    std::fs::write(&definition, waits)?;
    let seconds = limit(2).as_secs().to_string();
    let output = place
        .command()
        .args(["run", &service, "--until", "ready", "--timeout", &seconds])
        .env("HOST_AGENT_TIMEOUT_SCALE", "1")
        .output()?;
    let said = text(&output);
    ensure!(output.status.code() == Some(7), "{said}");
    for wanted in [
        "error[HA-0302]",
        "Role_IN_0 is Starting",
        "--timeout",
        "  last ",
    ] {
        ensure!(said.contains(wanted), "`{wanted}` is not in: {said}");
    }
    // The kept deployment is still there, and only that.
    let after: Vec<_> = std::fs::read_dir(place.data().join("deployments"))?
        .flatten()
        .collect();
    ensure!(after.len() == 1, "{after:?}");
    std::fs::remove_dir_all(place.data().join("deployments"))?;
    place.assert_nothing_left()
}
