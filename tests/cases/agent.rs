//! The guest agent dies or hangs while the role keeps running.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::run::{INSTANCE, Run, eventually};
use e2e::service::{ECHO, Service};
use e2e::{Sandbox, limit};
use vmbus::channel::{EXEC_PORT, TUNNEL_PORT};

/// Kills the guest agent, and with it the connection of this command.
const KILL: &str = r#"for p in /proc/[0-9]*; do
    if [ "$(cat $p/comm)" = guest-agent ]; then kill -9 ${p#/proc/}; fi; done; sleep 1000"#;
/// Stops the guest agent after it has reported the end of this command.
const HANG: &str = r#"for p in /proc/[0-9]*; do
    if [ "$(cat $p/comm)" = guest-agent ]; then
        setsid sh -c "sleep 5; kill -STOP ${p#/proc/}" </dev/null >/dev/null 2>&1 & fi; done"#;
/// Tries to take the ports in `@ARGV` as soon as no agent listens on them, as the role's user
/// without its system call filter, in a control group that no agent ends. Prints each new
/// outcome for a port, until a file asks for the number of tries.
const THIEF: &str = r#"mkdir /sys/fs/cgroup/thief && echo 0 >/sys/fs/cgroup/thief/cgroup.procs &&
    exec setsid setpriv --reuid 60000 --regid 60000 --clear-groups perl -e '
        $| = 1; my ($n, %seen);
        until (-e "/run/enough") {
            for my $port (@ARGV) {
                socket my $s, 40, 1, 0 or die "no vsock: $!";
                my $end = bind($s, pack "SSLLx4", 40, 0, $port, 0xffffffff) && listen($s, 1)
                    ? "taken" : "error " . ($! + 0);
                print "$port: $end\n" unless $seen{"$port $end"}++;
                sleep 1000 if $end eq "taken" && $port < 1e6;
            }
            $n++; select undef, undef, undef, 0.01;
        }
        print "tries: $n\n"' "#;
/// Prints the process ids of the bootstrapper and of every process of the role.
const STACK: &str = "cd /sys/fs/cgroup/stack; cat bootstrapper/cgroup.procs role/cgroup.procs";

/// The process ids of bootstrapper and role, once the role has both its processes:
/// at Ready it may have only the first.
fn stack(run: &Run<'_>) -> Result<String> {
    eventually("bootstrapper and two processes run", || {
        Ok(run.shell(STACK)?.lines().count() == 3)
    })?;
    run.shell(STACK)
}

/// Starts `service` and waits until its echo server answers.
fn start_echo<'a>(sandbox: &'a Sandbox, service: &Service, port: u16) -> Result<Run<'a>> {
    let service = service.write(&sandbox.file("service"))?;
    let mut run = Run::start(sandbox, &service, &[])?;
    run.ready()?;
    wait_for_echo("the echo server answers", port)?;
    Ok(run)
}

fn wait_for_echo(what: &str, port: u16) -> Result<()> {
    eventually(what, || Ok(echoes_within(port, limit(10)).unwrap_or(false)))
}

fn echoes_within(port: u16, time: Duration) -> Result<bool> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(time))?;
    stream.write_all(b"ping")?;
    let mut back = [0; 4];
    Ok(stream.read_exact(&mut back).is_ok() && back == *b"ping")
}

/// Waits until a new guest agent serves the endpoint and `exec`, and fails unless role
/// and bootstrapper are still the processes `before`.
fn check_replaced(run: &mut Run<'_>, port: u16, before: &str) -> Result<()> {
    run.event("guest-agent", |event| event["error"].is_null())?;
    wait_for_echo("the endpoint works again", port)?;
    eventually("exec works again", || Ok(run.shell("true").is_ok()))?;
    let after = run.shell(STACK)?;
    ensure!(before == after, "{before}became\n{after}");
    Ok(())
}

#[test]
fn a_killed_guest_agent_is_replaced_and_the_role_runs_on() -> Result<()> {
    let sandbox = Sandbox::new()?;
    // The echo server, and a second process that writes ten lines a second to the log.
    let ticking = "if (!fork) { for (my $n = 0;; $n++) { \
        syswrite STDOUT, \"tick $n\\n\"; select undef, undef, undef, 0.1 } }\n";
    let (mut service, port) = Service::echo()?;
    service.entry = ECHO.replacen("my $l", &format!("{ticking}my $l"), 1);
    let mut run = start_echo(&sandbox, &service, port)?;
    let before = stack(&run)?;
    // Nothing of the guest agent came over the bus.
    let program =
        run.shell("readlink $(grep -lx guest-agent /proc/[0-9]*/comm | sed s/comm/exe/)")?;
    ensure!(program == "/usr/lib/host-agent/guest-agent\n", "{program}");

    // A port without privileges shows that the thief can take one.
    let ports = format!("{TUNNEL_PORT} {EXEC_PORT} 1000000");
    run.shell(&format!("({THIEF} {ports}) </dev/null >/run/thief 2>&1 &"))?;
    eventually("the thief tries to take ports", || {
        Ok(run.shell("cat /run/thief")?.contains("1000000: taken"))
    })?;

    let killed = run.exec(&["sh", "-c", KILL])?;
    ensure!(killed.status.code() == Some(125), "{}", e2e::text(&killed));
    let death = run.event("guest-agent", |event| event["error"].is_string())?;
    ensure!(death.to_string().contains("SIGKILL"), "{death}");
    check_replaced(&mut run, port, &before)?;
    // No process without privileges took the port of an agent that restarted.
    run.shell("touch /run/enough")?;
    eventually("the thief has given up", || {
        Ok(run.shell("cat /run/thief")?.contains("tries: "))
    })?;
    let seen = run.shell("grep -v tries: /run/thief")?;
    let denied = [TUNNEL_PORT, EXEC_PORT].map(|port| format!("{port}: error {}\n", libc::EACCES));
    ensure!(seen == denied.concat() + "1000000: taken\n", "{seen}");
    // The command that killed the agent ended with it.
    let commands = run.shell("cat /sys/fs/cgroup/exec/cgroup.procs | wc -l")?;
    ensure!(commands.trim().parse::<u32>()? <= 3, "{commands}");

    let ps = sandbox.output(&["ps", "--json"])?;
    let ps: serde_json::Value = serde_json::from_slice(&ps.stdout)?;
    let state = &ps["deployments"][0]["instances"][0]["state"];
    ensure!(state == "Ready", "{ps}");

    // The log also has the lines that the role wrote while no agent ran, except up to
    // three that the killed process had read and not yet sent.
    let now: u64 = ticks(&sandbox)?.last().copied().context("no ticks")?;
    eventually("the log grows again", || {
        Ok(ticks(&sandbox)?.last().is_some_and(|last| *last > now))
    })?;
    let ticks = ticks(&sandbox)?;
    let last = *ticks.last().context("no ticks")?;
    ensure!(ticks.is_sorted(), "{ticks:?}");
    ensure!(ticks.len() as u64 + 3 > last, "{ticks:?}");
    run.stop()?;
    sandbox.assert_nothing_left()
}

#[test]
fn a_hung_guest_agent_is_killed_and_replaced_after_a_minute() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (service, port) = Service::echo()?;
    let mut run = start_echo(&sandbox, &service, port)?;
    let before = run.shell(STACK)?;
    run.shell(HANG)?;
    eventually("the endpoint does not answer", || {
        Ok(!echoes_within(port, Duration::from_secs(2)).unwrap_or(false))
    })?;
    // The connection of a client that comes now is closed, not left open for ever.
    let mut waiting = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    waiting.set_read_timeout(Some(Duration::from_secs(60) + limit(10)))?;
    let closed = waiting.read(&mut [0]);
    let ended = match &closed {
        Ok(bytes) => *bytes == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    };
    ensure!(ended, "{closed:?}");

    let death = run.event("guest-agent", |event| event["error"].is_string())?;
    ensure!(death.to_string().contains("no report"), "{death}");
    check_replaced(&mut run, port, &before)?;
    run.stop()?;
    sandbox.assert_nothing_left()
}

/// The numbers of the ticks in the role's log.
fn ticks(sandbox: &Sandbox) -> Result<Vec<u64>> {
    let logs = sandbox.output(&["logs", INSTANCE, "--source", "role"])?;
    let log = String::from_utf8_lossy(&logs.stdout).into_owned();
    let ticks = log
        .lines()
        .filter_map(|line| line.split_once("tick ")?.1.trim().parse().ok());
    Ok(ticks.collect())
}

#[test]
fn a_killed_bootstrapper_and_its_role_are_restarted() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::script("#!/bin/sh\nsetsid sleep 100000 & exec sleep 100000\n")
        .write(&sandbox.file("service"))?;
    let mut run = Run::start(&sandbox, &service, &[])?;
    run.ready()?;
    let before = stack(&run)?;
    run.shell("kill -9 $(cat /sys/fs/cgroup/stack/bootstrapper/cgroup.procs)")?;
    run.event("role", |event| event["state"] == "recycling")?;
    run.ready()?;
    let after = stack(&run)?;
    ensure!(
        !before.lines().any(|pid| after.lines().any(|it| it == pid)),
        "{before}survived in\n{after}"
    );
    run.stop()?;
    sandbox.assert_nothing_left()
}
