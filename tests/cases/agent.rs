//! The guest agent dies or hangs alone: the role does not notice.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::run::{INSTANCE, Run, eventually};
use e2e::service::{ECHO, Service};
use e2e::{Place, limit};

/// Kills the guest agent, and with it the connection of this command.
const KILL: &str = r#"for p in /proc/[0-9]*; do
    if [ "$(cat $p/comm)" = guest-agent ]; then kill -9 ${p#/proc/}; fi; done; sleep 1000"#;
/// Stops the guest agent when it has told of this command's end.
const HANG: &str = r#"for p in /proc/[0-9]*; do
    if [ "$(cat $p/comm)" = guest-agent ]; then
        setsid sh -c "sleep 5; kill -STOP ${p#/proc/}" </dev/null >/dev/null 2>&1 & fi; done"#;
/// Process ids of the bootstrapper and of every process of the role.
const STACK: &str = "cat /sys/fs/cgroup/stack/cgroup.procs /sys/fs/cgroup/stack/role/cgroup.procs";

/// Those ids when there are as many as the services here have: Ready is a role
/// whose process runs, and that may have more to start.
fn stack(run: &Run<'_>) -> Result<String> {
    eventually("bootstrapper and two processes run", || {
        Ok(run.shell(STACK)?.lines().count() == 3)
    })?;
    run.shell(STACK)
}

/// Another guest agent serves the endpoint and `exec`, and the role and its
/// bootstrapper are those of `before`.
fn another_goes_on(run: &mut Run<'_>, port: u16, before: &str) -> Result<()> {
    run.event("guest-agent", |event| event["error"].is_null())?;
    eventually("the endpoint works again", || {
        Ok(echoes(port).unwrap_or(false))
    })?;
    eventually("exec works again", || Ok(run.shell("true").is_ok()))?;
    let after = run.shell(STACK)?;
    ensure!(before == after, "{before}became\n{after}");
    Ok(())
}

fn echoes(port: u16) -> Result<bool> {
    echoes_within(port, limit(10))
}

fn echoes_within(port: u16, time: Duration) -> Result<bool> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(time))?;
    stream.write_all(b"ping")?;
    let mut back = [0; 4];
    Ok(stream.read_exact(&mut back).is_ok() && back == *b"ping")
}

#[test]
fn a_killed_guest_agent_is_started_again_and_finds_the_role_as_it_was() -> Result<()> {
    let place = Place::new()?;
    // The echo server, and beside it a line in the log every now and then.
    let ticking = "if (!fork) { for (my $n = 0;; $n++) { \
        syswrite STDOUT, \"tick $n\\n\"; select undef, undef, undef, 0.1 } }\n";
    let entry = ECHO.replacen("my $l", &format!("{ticking}my $l"), 1);
    let service = Service {
        entry,
        ..Service::echo()?
    };
    let port = service.port.context("the echo service has a port")?;
    let service = service.write(&place.file("service"))?;
    let mut run = Run::start(&place, &service, &[])?;
    run.ready()?;
    eventually("the echo server answers", || {
        Ok(echoes(port).unwrap_or(false))
    })?;
    let before = stack(&run)?;

    let killed = run.exec(&["sh", "-c", KILL])?;
    ensure!(killed.status.code() == Some(125), "{}", e2e::text(&killed));
    let death = run.event("guest-agent", |event| event["error"].is_string())?;
    ensure!(death.to_string().contains("SIGKILL"), "{death}");
    another_goes_on(&mut run, port, &before)?;
    // The command that killed it ended with it.
    let commands = run.shell("cat /sys/fs/cgroup/exec/cgroup.procs | wc -l")?;
    ensure!(commands.trim().parse::<u32>()? <= 3, "{commands}");

    let ps = place.output(&["ps", "--json"])?;
    let ps: serde_json::Value = serde_json::from_slice(&ps.stdout)?;
    let state = &ps["deployments"][0]["instances"][0]["state"];
    ensure!(state == "Ready", "{ps}");

    // Lines that the role wrote while nobody listened are there, but for what
    // the killed process had in its hands.
    let now: u64 = ticks(&place)?.last().copied().context("no ticks")?;
    eventually("the log goes on", || {
        Ok(ticks(&place)?.last().is_some_and(|last| *last > now))
    })?;
    let ticks = ticks(&place)?;
    let last = *ticks.last().context("no ticks")?;
    ensure!(ticks.is_sorted(), "{ticks:?}");
    ensure!(ticks.len() as u64 + 3 > last, "{ticks:?}");
    run.stop()?;
    place.assert_nothing_left()
}

#[test]
fn a_guest_agent_that_hangs_is_killed_after_a_minute_and_the_endpoint_works_again() -> Result<()> {
    let place = Place::new()?;
    let service = Service::echo()?;
    let port = service.port.context("the echo service has a port")?;
    let service = service.write(&place.file("service"))?;
    let mut run = Run::start(&place, &service, &[])?;
    run.ready()?;
    eventually("the echo server answers", || {
        Ok(echoes(port).unwrap_or(false))
    })?;
    let before = run.shell(STACK)?;
    run.shell(HANG)?;
    eventually("nobody serves the endpoint", || {
        Ok(!echoes_within(port, Duration::from_secs(2)).unwrap_or(false))
    })?;
    // A client that comes meanwhile waits, and is not left to wait for ever.
    let mut waiting = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    waiting.set_read_timeout(Some(Duration::from_secs(60) + limit(10)))?;
    let closed = waiting.read(&mut [0]);
    let ended = match &closed {
        Ok(bytes) => *bytes == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    };
    ensure!(ended, "{closed:?}");

    let death = run.event("guest-agent", |event| event["error"].is_string())?;
    ensure!(death.to_string().contains("said nothing"), "{death}");
    another_goes_on(&mut run, port, &before)?;
    run.stop()?;
    place.assert_nothing_left()
}

fn ticks(place: &Place) -> Result<Vec<u64>> {
    let logs = place.output(&["logs", INSTANCE, "--source", "role"])?;
    let log = String::from_utf8_lossy(&logs.stdout).into_owned();
    let ticks = log
        .lines()
        .filter_map(|line| line.split_once("tick ")?.1.trim().parse().ok());
    Ok(ticks.collect())
}

#[test]
fn a_killed_bootstrapper_takes_its_role_with_it_and_both_come_back() -> Result<()> {
    let place = Place::new()?;
    let service = Service::script("#!/bin/sh\nsetsid sleep 100000 & exec sleep 100000\n")
        .write(&place.file("service"))?;
    let mut run = Run::start(&place, &service, &[])?;
    run.ready()?;
    let before = stack(&run)?;
    run.shell("kill -9 $(cat /sys/fs/cgroup/stack/cgroup.procs)")?;
    run.event("role", |event| event["state"] == "recycling")?;
    run.ready()?;
    let after = stack(&run)?;
    ensure!(
        !before.lines().any(|pid| after.lines().any(|it| it == pid)),
        "{before}survived in\n{after}"
    );
    run.stop()?;
    place.assert_nothing_left()
}
