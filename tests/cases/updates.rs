//! Guest agents are replaced while their guests and roles run on, and bad ones are given up.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use e2e::agents::{Signer, pack, pin_key};
use e2e::run::{INSTANCE, Run, eventually};
use e2e::service::{Service, free_port};
use e2e::{Sandbox, images, program};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Prints the process ids of the bootstrapper and of every process of the role, and the boot.
const STACK: &str = "cd /sys/fs/cgroup/stack; cat bootstrapper/cgroup.procs role/cgroup.procs; \
                     cat /proc/sys/kernel/random/boot_id";
/// Bytes added to a program, so that its download takes long enough to be interrupted.
const PADDING: usize = 48 << 20;

fn serve(sandbox: &Sandbox) -> Result<Run<'_>> {
    let mut command = sandbox.command();
    command.args(["serve", "--format", "jsonl"]);
    let mut run = Run::from_command(sandbox, command)?;
    run.line_with("serving ")?;
    Ok(run)
}

/// Runs `host-agent` with `--json`; its exit code and its answer or error.
fn answer(sandbox: &Sandbox, arguments: &[&str]) -> Result<(i32, Value)> {
    let mut all = arguments.to_vec();
    all.push("--json");
    let output = sandbox.output(&all)?;
    let code = output.status.code().context("an exit code")?;
    let text = if code == 0 {
        output.stdout
    } else {
        output.stderr
    };
    let text = String::from_utf8(text)?;
    // Progress may come before an error.
    let json = text.lines().last().unwrap_or_default();
    let json = if code == 0 { &text } else { json };
    let json = serde_json::from_str(json).with_context(|| format!("{arguments:?}: {text}"))?;
    Ok((code, json))
}

fn publish(sandbox: &Sandbox, package: &Path, more: &[&str]) -> Result<(i32, Value)> {
    let package = package.to_str().context("a path in UTF-8")?;
    let mut arguments = vec!["agent", "publish", package];
    arguments.extend(more);
    answer(sandbox, &arguments)
}

fn publish_well(sandbox: &Sandbox, package: &Path, more: &[&str]) -> Result<()> {
    let (code, published) = publish(sandbox, package, more)?;
    ensure!(
        code == 0 && published["agent"]["offered"] == true,
        "{published}"
    );
    Ok(())
}

fn apply(sandbox: &Sandbox, name: &str, package: &Path, more: &[&str]) -> Result<()> {
    let package = package.to_str().context("a path in UTF-8")?;
    let mut arguments = vec!["service", "apply", name, "--package", package, "--wait"];
    arguments.extend(more);
    let (code, applied) = answer(sandbox, &arguments)?;
    ensure!(code == 0, "{applied}");
    Ok(())
}

fn echo(port: u16) -> Result<bool> {
    let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else {
        return Ok(false);
    };
    stream.set_read_timeout(Some(e2e::limit(5)))?;
    stream.write_all(b"hello")?;
    let mut answer = [0; 5];
    Ok(stream.read_exact(&mut answer).is_ok() && answer == *b"hello")
}

/// Runs a shell line in the guest of service `name`.
fn shell(sandbox: &Sandbox, target: &str, line: &str) -> Result<String> {
    let output = sandbox.output(&["exec", target, "--", "sh", "-c", line])?;
    ensure!(output.status.success(), "{}", e2e::text(&output));
    Ok(String::from_utf8(output.stdout)?)
}

/// Waits for a step of version `version`.
fn step(daemon: &mut Run<'_>, version: &str, step: &str) -> Result<Value> {
    daemon.event("agent-update", |event| {
        event["version"] == version && event["step"] == step
    })
}

/// Waits until exec and the endpoint work, and fails unless role, bootstrapper and guest are
/// those of `before`.
fn check_role(daemon: &Run<'_>, port: u16, before: &str) -> Result<()> {
    eventually("exec works", || Ok(daemon.shell("true").is_ok()))?;
    eventually("the endpoint works", || echo(port))?;
    let after = daemon.shell(STACK)?;
    ensure!(before == after, "{before}became\n{after}");
    Ok(())
}

/// The guest agent of the first instance, as `agent list` shows it.
fn runs(sandbox: &Sandbox) -> Result<Value> {
    let (code, list) = answer(sandbox, &["agent", "list"])?;
    ensure!(code == 0, "{list}");
    Ok(list["guests"][0]["agent"].clone())
}

/// What the host does not even offer.
fn check_refusals(sandbox: &Sandbox, signer: &Signer, good: &[u8]) -> Result<()> {
    let package = pack(sandbox, good, "9.0.0")?;
    let whole = fs::read(&package)?;
    let refused = |what: &str| -> Result<()> {
        let (code, error) = publish(sandbox, &package, &[])?;
        ensure!(code == 3 && error["code"] == "HA-0540", "{what}: {error}");
        ensure!(
            error["causes"].to_string().contains(what),
            "{what}: {error}"
        );
        Ok(())
    };
    let (code, error) = publish(sandbox, &package, &[])?;
    ensure!(code == 4 && error["code"] == "HA-0542", "{error}");
    Signer::new()?.sign(&package)?;
    refused("not trusted")?;
    signer.sign(&package)?;
    let mut changed = whole.clone();
    *changed.last_mut().context("a byte")? ^= 1;
    fs::write(&package, changed)?;
    refused("changed")?;
    fs::write(&package, &whole[..whole.len() - 1000])?;
    refused("torn")?;
    let mut other = whole;
    let machine = 18
        + other
            .iter()
            .position(|it| *it == 0x7f)
            .context("the program")?;
    other[machine] = 183;
    fs::write(&package, other)?;
    signer.sign(&package)?;
    refused("not an x86-64")?;
    let (_, list) = answer(sandbox, &["agent", "list"])?;
    ensure!(list["agents"] == serde_json::json!([]), "{list}");
    Ok(())
}

#[test]
fn bad_guest_agents_are_given_up_while_guest_and_role_run_on() -> Result<()> {
    let sandbox = Sandbox::new()?;
    sandbox.vmm_is_killed();
    let [signer, stranger] = [Signer::new()?, Signer::new()?];
    signer.trust(&sandbox, "test")?;
    pin_key(&sandbox, "pinned", &stranger.key()?)?;
    let good = fs::read(images().join("minimal/guest-agent"))?;
    let bad = fs::read(program().with_file_name("bad-agent"))?;
    let (echoes, _) = Service::echo()?;
    let port = free_port()?;
    let package = echoes.write(&sandbox.file("service"))?;
    let mut daemon = serve(&sandbox)?;
    apply(&sandbox, "shop", &package, &["-p", &format!("{port}:Echo")])?;
    eventually("the endpoint works", || echo(port))?;
    let before = daemon.shell(STACK)?;
    ensure!(runs(&sandbox)?["package"].is_null(), "{}", runs(&sandbox)?);
    check_refusals(&sandbox, &signer, &good)?;

    for (version, way) in [("0.2.0", "crash"), ("0.2.1", "hang"), ("0.2.2", "silent")] {
        let program = [&bad[..], b"\n", way.as_bytes()].concat();
        let package = pack(&sandbox, &program, version)?;
        signer.sign(&package)?;
        publish_well(&sandbox, &package, &[])?;
        step(&mut daemon, version, "installed")?;
        let seen = daemon.seen().len();
        let back = step(&mut daemon, version, "went-back")?;
        let starts = daemon.seen()[seen..].iter().filter(|line| {
            let event: Value = serde_json::from_str(line).unwrap_or_default();
            event["event"] == "guest-agent" && event["error"].is_null()
        });
        let most = if way == "crash" { 3 } else { 1 };
        let starts = starts.count();
        ensure!(starts <= most, "{way}: {starts} starts");
        let detail = back["detail"].as_str().context("a reason")?;
        let reason = if way == "crash" {
            "exited with code 1"
        } else {
            "for a minute"
        };
        ensure!(detail.contains(reason), "{way}: {detail}");
        check_role(&daemon, port, &before)?;
        let runs = runs(&sandbox)?;
        ensure!(runs["package"].is_null(), "{runs}");
    }
    let (_, shown) = answer(&sandbox, &["agent", "show", "0.2.0"])?;
    ensure!(
        shown["agent"]["failures"][0]["instance"] == INSTANCE,
        "{shown}"
    );

    // The daemon dies while a package is on its way: what has arrived is not installed, and
    // the next daemon offers it again.
    let large = [&good[..], &vec![0; PADDING]].concat();
    let large = pack(&sandbox, &large, "0.3.0")?;
    signer.sign(&large)?;
    publish_well(&sandbox, &large, &[])?;
    let partial = "cat /var/lib/host-agent/agents/.partial-* | wc -c";
    eventually("a part has arrived", || {
        let arrived: usize = daemon.shell(partial)?.trim().parse()?;
        Ok((1..PADDING / 2).contains(&arrived))
    })?;
    daemon.signal(Signal::SIGKILL)?;
    let (_, seen) = daemon.wait()?;
    ensure!(!seen.contains(r#""version":"0.3.0""#), "{seen}");
    let mut daemon = serve(&sandbox)?;
    step(&mut daemon, "0.3.0", "installed")?;
    check_role(&daemon, port, &before)?;
    let running = runs(&sandbox)?;
    ensure!(
        running["version"] == "0.3.0" && running["watched"] == true,
        "{running}"
    );

    // An image with keys takes no package of others, though this host offers it.
    let pinned = Service {
        image: "pinned".into(),
        ..Service::idle()
    };
    let pinned = pinned.write(&sandbox.file("pinned"))?;
    apply(&sandbox, "pinned", &pinned, &[])?;
    let refused = step(&mut daemon, "0.3.0", "refused")?;
    let detail = refused["detail"].to_string();
    ensure!(detail.contains("not trusted"), "{refused}");
    let deployment = refused["deployment"].as_str().context("a deployment")?;
    let target = format!("{deployment}/{INSTANCE}");
    shell(&sandbox, &target, "true")?;
    let (code, deleted) = answer(&sandbox, &["service", "delete", "pinned", "--wait"])?;
    ensure!(code == 0, "{deleted}");

    // The guest reboots without warning. It knows what is bad, and what was installed.
    let _ = daemon.exec(&["sh", "-c", "echo b >/proc/sysrq-trigger"])?;
    daemon.event("restarting", |event| event["generation"] == 2)?;
    daemon.ready()?;
    eventually("the guest says what it runs", || {
        Ok(runs(&sandbox)?["version"] == "0.3.0")
    })?;
    let failed = runs(&sandbox)?["failed"].clone();
    let failed: Vec<_> = failed.as_array().context("a list")?.iter().collect();
    let versions: Vec<_> = failed.iter().map(|it| &it["version"]).collect();
    ensure!(versions == ["0.2.0", "0.2.1", "0.2.2"], "{versions:?}");
    let crash = sandbox.file("guest-agent-0.2.0.agent");
    let (code, error) = publish(&sandbox, &crash, &[])?;
    ensure!(code == 5 && error["code"] == "HA-0541", "{error}");
    publish_well(&sandbox, &crash, &["--allow-downgrade"])?;
    // The same program as that of the image: a downgrade that is named.
    let before = daemon.shell(STACK)?;
    let older = pack(&sandbox, &good, "0.2.9")?;
    signer.sign(&older)?;
    publish_well(&sandbox, &older, &["--allow-downgrade"])?;
    step(&mut daemon, "0.2.9", "installed")?;
    let seen = daemon.seen().iter();
    let mut updates = seen.filter(|line| line.contains("agent-update"));
    ensure!(
        updates.all(|line| !line.contains("0.2.0")),
        "0.2.0 was taken again"
    );
    check_role(&daemon, port, &before)?;
    let (_, withdrawn) = answer(&sandbox, &["agent", "withdraw", "0.2.9"])?;
    ensure!(withdrawn["agent"]["withdrawn"] == true, "{withdrawn}");

    let (code, deleted) = answer(&sandbox, &["service", "delete", "shop", "--wait"])?;
    ensure!(code == 0, "{deleted}");
    daemon.stop()?;
    sandbox.assert_nothing_left()
}
