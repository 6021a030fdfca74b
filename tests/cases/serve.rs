//! `serve` keeps a service whatever ends: the daemon, a guest, or both.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use e2e::Sandbox;
use e2e::run::{Run, eventually};
use e2e::service::{Service, free_port};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

fn serve(sandbox: &Sandbox) -> Result<Run<'_>> {
    let mut command = sandbox.command();
    command.args(["serve", "--format", "jsonl"]);
    let mut run = Run::from_command(sandbox, command)?;
    run.line_with("serving ")?;
    Ok(run)
}

fn echo(port: u16) -> Result<bool> {
    let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else {
        return Ok(false);
    };
    stream.set_read_timeout(Some(e2e::limit(5)))?;
    stream.write_all(b"hello")?;
    let mut answer = [0; 5];
    // An instance that is not Ready yet closes the connection.
    Ok(stream.read_exact(&mut answer).is_ok() && answer == *b"hello")
}

/// Runs `host-agent service` with `--json`; its exit code and its answer or error.
fn service(sandbox: &Sandbox, arguments: &[&str]) -> Result<(i32, Value)> {
    let mut all = vec!["service", "--json"];
    all.extend(arguments);
    let output = sandbox.output(&all)?;
    let code = output.status.code().context("an exit code")?;
    let json = if code == 0 {
        output.stdout
    } else {
        let errors = String::from_utf8_lossy(&output.stderr);
        let last = errors.lines().last().unwrap_or_default();
        last.as_bytes().to_vec()
    };
    let json = serde_json::from_slice(&json);
    Ok((
        code,
        json.with_context(|| format!("{arguments:?} ended with {code}"))?,
    ))
}

fn apply(sandbox: &Sandbox, name: &str, package: &Path, more: &[&str]) -> Result<(i32, Value)> {
    let package = package.to_str().context("a path in UTF-8")?;
    let mut arguments = vec!["apply", name, "--package", package];
    arguments.extend(more);
    service(sandbox, &arguments)
}

/// The events that `host-agent events` prints, which ends.
fn events(sandbox: &Sandbox, arguments: &[&str]) -> Result<Vec<Value>> {
    let mut all = vec!["events", "--json"];
    all.extend(arguments);
    let output = sandbox.output(&all)?;
    ensure!(output.status.success(), "{}", e2e::text(&output));
    let text = String::from_utf8(output.stdout)?;
    let lines = text.lines().map(serde_json::from_str);
    Ok(lines.collect::<Result<_, _>>()?)
}

fn numbers(events: &[Value]) -> Vec<u64> {
    let numbers = events.iter().map(|event| event["number"].as_u64());
    numbers.map(Option::unwrap_or_default).collect()
}

/// Checks the events of the whole test: those that are stored, and those that a client has
/// followed over every end of the daemon.
fn check_events(sandbox: &Sandbox, mut follower: Run<'_>) -> Result<()> {
    let stored = events(sandbox, &["--after", "0"])?;
    let place = |kind: &str| {
        let wanted = |it: &Value| it["event"]["event"] == kind && it["event"]["generation"] == 1;
        let place = stored.iter().position(wanted);
        place.with_context(|| format!("no {kind} in {stored:?}"))
    };
    ensure!(place("guest-starting")? < place("guest-adopted")?);
    let all: Vec<u64> = (1..=stored.len() as u64).collect();
    ensure!(numbers(&stored) == all, "{:?}", numbers(&stored));
    let starting = &stored[place("guest-starting")?];
    ensure!(
        starting["service"] == "shop" && starting["instance"] == "Role_IN_0",
        "{starting}"
    );
    let after = place("guest-adopted")?.to_string();
    let rest = events(sandbox, &["--after", &after])?;
    ensure!(rest[0]["event"]["event"] == "guest-adopted", "{rest:?}");
    ensure!(rest.len() == stored.len() - place("guest-adopted")?);

    // The service is deleted, and its events are there.
    let filter = ["--service", "shop", "--instance", "Role_IN_0"];
    let of_shop = events(sandbox, &filter)?;
    ensure!(
        of_shop.iter().any(|it| it["event"]["event"] == "stopped"),
        "{of_shop:?}"
    );
    let printed = sandbox.output(&["events", "--service", "shop"])?;
    let printed = e2e::text(&printed);
    ensure!(
        printed.contains("  shop/Role_IN_0  guest starting, generation 1 (process "),
        "{printed}"
    );
    let last = format!(r#""number":{},"#, stored.len());
    follower.line_with(&last)?;
    follower.signal(Signal::SIGINT)?;
    let (status, seen) = follower.wait()?;
    ensure!(status.success(), "{status}: {seen}");
    let lines = seen.lines().filter(|line| line.starts_with('{'));
    let followed: Vec<Value> = lines.map(serde_json::from_str).collect::<Result<_, _>>()?;
    ensure!(followed == stored, "{seen}");
    let notices = seen.matches("waiting for the next one").count();
    ensure!(notices == 3, "a notice for each end of the daemon: {seen}");
    Ok(())
}

#[test]
fn a_service_survives_whatever_is_killed() -> Result<()> {
    let sandbox = Sandbox::new()?;
    sandbox.vmm_is_killed();
    let (echoes, _) = Service::echo()?;
    let port = free_port()?;
    let ports = format!("{port}:Echo");
    let package = echoes.write(&sandbox.file("service"))?;
    let (code, error) = service(&sandbox, &["list"])?;
    ensure!(code == 10 && error["code"] == "HA-0508", "{error}");

    // What was accepted is durable: the daemon dies at once, the next one goes on.
    let daemon = serve(&sandbox)?;
    let (code, begun) = apply(&sandbox, "shop", &package, &["-p", &ports])?;
    ensure!(
        code == 0 && begun["operation"]["state"] == "running",
        "{begun}"
    );
    daemon.signal(Signal::SIGKILL)?;
    daemon.wait()?;
    let mut daemon = serve(&sandbox)?;
    let (code, applied) = apply(&sandbox, "shop", &package, &["-p", &ports, "--wait"])?;
    ensure!(code == 0, "{applied}");
    ensure!(applied["operation"]["state"] == "succeeded", "{applied}");
    ensure!(
        applied["operation"]["id"] == begun["operation"]["id"],
        "{applied}"
    );
    ensure!(applied["service"]["ready"] == 1, "{applied}");
    eventually("the endpoint leads to the guest", || echo(port))?;
    let mut follow = sandbox.command();
    follow.args(["events", "-f", "--json"]);
    let mut follower = Run::from_command(&sandbox, follow)?;
    follower.line_with("guest-starting")?;
    let started = daemon.event("guest-starting", |_| true)?;
    let vmm = started["pid"].as_i64().context("a process id")?;
    daemon.shell("echo kept > /run/mark")?;

    // One daemon for a store; another service is not disturbed by one that cannot start.
    let rival = sandbox.output(&["serve"])?;
    ensure!(rival.status.code() == Some(5), "{}", e2e::text(&rival));
    let (code, error) = apply(&sandbox, "rival", &package, &["-p", &ports, "--wait"])?;
    ensure!(code == 9 && error["code"] == "HA-0404", "{error}");
    ensure!(error.to_string().contains("in use"), "{error}");
    let (code, deleted) = service(&sandbox, &["delete", "rival", "--wait"])?;
    ensure!(code == 0, "{deleted}");
    let other = Service::idle().write(&sandbox.file("other"))?;
    let (code, error) = apply(&sandbox, "shop", &other, &[])?;
    ensure!(code == 5 && error["code"] == "HA-0507", "{error}");

    // What does not fit is refused before anything starts.
    let many = Service::idle().write(&sandbox.file("many"))?;
    let configuration = many.join("ServiceConfiguration.cscfg");
    let text = fs::read_to_string(&configuration)?;
    fs::write(
        &configuration,
        text.replace(r#"count="1""#, r#"count="200""#),
    )?;
    let (code, error) = apply(&sandbox, "many", &many, &["--dry-run"])?;
    ensure!(code == 6 && error["code"] == "HA-0204", "{error}");
    ensure!(
        error.to_string().contains("of 200 instances fit"),
        "{error}"
    );

    // The same guest in the same boot, after SIGKILL and after SIGTERM. A client that
    // connects while no daemon runs is answered by the guest through the next one.
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        daemon.signal(signal)?;
        let (_, seen) = daemon.wait()?;
        ensure!(!seen.contains("guest-exited"), "{seen}");
        let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
            .context("connect while no daemon runs")?;
        client.write_all(b"hello")?;
        daemon = serve(&sandbox)?;
        client.set_read_timeout(Some(e2e::limit(30)))?;
        let mut answer = [0; 5];
        client.read_exact(&mut answer).context("the echo")?;
        ensure!(answer == *b"hello");
        let event = daemon.event("guest-adopted", |_| true)?;
        ensure!(event["generation"] == 1 && event["pid"] == vmm, "{event}");
        daemon.ready()?;
        eventually("the endpoint leads to the adopted guest", || echo(port))?;
        ensure!(daemon.shell("cat /run/mark")? == "kept\n");
    }

    // A guest that ended while no daemon ran is restarted, by its history.
    daemon.signal(Signal::SIGKILL)?;
    drop(daemon);
    kill(Pid::from_raw(i32::try_from(vmm)?), Signal::SIGKILL)?;
    let mut daemon = serve(&sandbox)?;
    let event = daemon.event("restarting", |_| true)?;
    ensure!(event["generation"] == 2, "{event}");
    daemon.ready()?;
    eventually("the endpoint leads to the new boot", || echo(port))?;

    let (code, deleted) = service(&sandbox, &["delete", "shop", "--wait"])?;
    ensure!(
        code == 0 && deleted["operation"]["state"] == "succeeded",
        "{deleted}"
    );
    let (_, listed) = service(&sandbox, &["list"])?;
    ensure!(listed["services"] == serde_json::json!([]), "{listed}");
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).context("the port is free again")?;
    let (_, history) = service(&sandbox, &["history", "shop"])?;
    let kinds = history["history"]["operations"]
        .as_array()
        .context("operations")?;
    let kinds: Vec<_> = kinds.iter().map(|it| (&it["kind"], &it["state"])).collect();
    ensure!(
        kinds[0] == (&"delete".into(), &"succeeded".into())
            && kinds[1] == (&"apply".into(), &"succeeded".into()),
        "{history}"
    );
    check_events(&sandbox, follower)?;
    let seen = daemon.stop()?;
    ensure!(seen.contains(r#""clean":true"#), "{seen}");
    sandbox.assert_nothing_left()
}
