//! Changes to a service: updates that no client notices, that survive the daemon, and that go
//! back; more and fewer instances; stop and start.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use e2e::Sandbox;
use e2e::run::Run;
use e2e::service::{Service, free_port};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Answers each client with its version, and is Ready when it listens.
const ANSWER: &str = r#"#!/usr/bin/perl
use strict; use IO::Socket::INET; use Socket;
my $l = IO::Socket::INET->new(LocalAddr => '127.0.0.1', LocalPort => $ENV{ECHO_PORT},
    Listen => 1024, ReuseAddr => 1) or die "listen: $!";
my $p = $ENV{NOTIFY_SOCKET}; $p =~ s/^@/\0/;
socket(my $s, AF_UNIX, SOCK_DGRAM, 0) or die "socket: $!";
defined send($s, "READY=1", 0, pack_sockaddr_un($p)) or die "notify: $!";
while (my $c = $l->accept) { sysread $c, my $b, 5; syswrite $c, "VERSION"; close $c }
"#;

fn version(dir: &Path, entry: &str, port: u16) -> Result<PathBuf> {
    let service = Service {
        port: Some(port),
        ..Service::script(entry)
    };
    let dir = service.write(dir)?;
    let definition = dir.join("ServiceDefinition.csdef");
    let text = fs::read_to_string(&definition)?;
    let on_start = r#"setReadyOnProcessStart="true""#;
    let on_notice = r#"setReadyOnProcessStart="false""#;
    fs::write(&definition, text.replace(on_start, on_notice))?;
    configure(&dir, r#"count="1""#, r#"count="2""#)?;
    Ok(dir)
}

fn configure(dir: &Path, from: &str, to: &str) -> Result<PathBuf> {
    let path = dir.join("ServiceConfiguration.cscfg");
    let text = fs::read_to_string(&path)?;
    ensure!(text.contains(from), "{text}");
    fs::write(&path, text.replace(from, to))?;
    Ok(path)
}

fn serve(sandbox: &Sandbox) -> Result<Run<'_>> {
    let mut command = sandbox.command();
    command.args(["serve", "--format", "jsonl"]);
    let mut run = Run::from_command(sandbox, command)?;
    run.line_with("serving ")?;
    Ok(run)
}

/// Runs `host-agent service` with `--json`; its exit code and its answer or error.
fn service(sandbox: &Sandbox, arguments: &[&str]) -> Result<(i32, Value)> {
    let mut all = vec!["service", "--json"];
    all.extend(arguments);
    let output = sandbox.output(&all)?;
    let code = output.status.code().context("an exit code")?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let text = match code {
        0 => String::from_utf8(output.stdout)?,
        _ => errors.lines().last().unwrap_or_default().to_owned(),
    };
    let json = serde_json::from_str(&text);
    Ok((
        code,
        json.with_context(|| format!("{arguments:?}: {code}: {text}"))?,
    ))
}

/// What one request is answered.
fn ask(port: u16) -> Result<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(e2e::limit(60)))?;
    stream.write_all(b"hello")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with('v'), "\"{answer}\" is no answer");
    Ok(answer)
}

/// A client that asks all the time.
struct Client {
    stop: Arc<AtomicBool>,
    /// Held while a request is under way.
    asking: Arc<Mutex<()>>,
    task: JoinHandle<Result<Vec<String>>>,
}

impl Client {
    fn start(port: u16) -> Self {
        let (stop, asking) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(())));
        let (stopped, turn) = (Arc::clone(&stop), Arc::clone(&asking));
        let task = thread::spawn(move || {
            let mut answers = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                {
                    let _asking = turn.lock().map_err(|_| anyhow!("poisoned"))?;
                    let number = answers.len();
                    answers.push(ask(port).with_context(|| format!("request {number}"))?);
                }
                thread::sleep(Duration::from_millis(20));
            }
            Ok(answers)
        });
        Self { stop, asking, task }
    }

    /// Every answer; an error if a request had none.
    fn stop(self) -> Result<Vec<String>> {
        self.stop.store(true, Ordering::Relaxed);
        self.task
            .join()
            .map_err(|_| anyhow!("the client panicked"))?
    }
}

fn history(sandbox: &Sandbox) -> Result<Vec<(String, String, u64)>> {
    let (_, history) = service(sandbox, &["history", "shop"])?;
    let operations = history["history"]["operations"].as_array();
    let row = |it: &Value| {
        let text = |key: &str| it[key].as_str().unwrap_or_default().to_owned();
        let generation = it["generation"].as_u64().unwrap_or_default();
        (text("kind"), text("state"), generation)
    };
    Ok(operations.context("operations")?.iter().map(row).collect())
}

#[test]
fn an_update_is_noticed_by_no_client_and_a_bad_one_goes_back() -> Result<()> {
    let sandbox = Sandbox::new()?;
    sandbox.vmm_is_killed();
    let port = free_port()?;
    let of = |name: &str, entry: &str| version(&sandbox.file(name), entry, port);
    let first = of("v1", &ANSWER.replace("VERSION", "v1"))?;
    let second = of("v2", &ANSWER.replace("VERSION", "v2"))?;
    let bad = of("v3", "#!/bin/sh\nexit 3\n")?;
    let path = |path: &Path| path.to_str().map(str::to_owned).context("UTF-8");
    let (first, second, bad) = (path(&first)?, path(&second)?, path(&bad)?);

    let daemon = serve(&sandbox)?;
    let (code, applied) = service(&sandbox, &["apply", "shop", "--package", &first, "--wait"])?;
    ensure!(code == 0 && applied["service"]["ready"] == 2, "{applied}");
    ensure!(ask(port)? == "v1");
    let (_, plan) = service(
        &sandbox,
        &["update", "shop", "--package", &second, "--dry-run"],
    )?;
    let role = &plan["plan"]["roles"][0];
    ensure!(
        role["change"] == "application" && role["domains"] == 2,
        "{plan}"
    );

    // The daemon dies between two requests, with an instance of the first domain down.
    let client = Client::start(port);
    let (code, begun) = service(&sandbox, &["update", "shop", "--package", &second])?;
    ensure!(
        code == 0 && begun["operation"]["state"] == "running",
        "{begun}"
    );
    let mut daemon = daemon;
    let first = |it: &Value| it["step"] == "domain-begun" && it["domain"] == 0;
    daemon.event("rollout", first)?;
    daemon.event("stopping", |it| it["instance"] == "Role_IN_0")?;
    {
        let _between = client.asking.lock().map_err(|_| anyhow!("poisoned"))?;
        daemon.signal(Signal::SIGKILL)?;
        daemon.wait()?;
    }
    let daemon = serve(&sandbox)?;
    let (code, updated) = service(
        &sandbox,
        &["update", "shop", "--package", &second, "--wait"],
    )?;
    ensure!(
        code == 0 && updated["operation"]["state"] == "succeeded",
        "{updated}"
    );
    ensure!(
        updated["operation"]["id"] == begun["operation"]["id"],
        "{updated}"
    );
    ensure!(ask(port)? == "v2");

    // A bad one goes back, and the version before never stopped answering.
    let arguments = ["update", "shop", "--package", &bad, "--wait"];
    let policy = ["--on-failure", "rollback", "--ready-limit", "60"];
    let (code, error) = service(&sandbox, &[&arguments[..], &policy[..]].concat())?;
    ensure!(code == 12 && error["code"] == "HA-0515", "{code}: {error}");
    ensure!(error.to_string().contains("Role_IN_0 is "), "{error}");
    let (_, shown) = service(&sandbox, &["show", "shop"])?;
    let state = &shown["service"];
    ensure!(state["ready"] == 2 && state["generation"] == 2, "{shown}");
    let answers = client.stop()?;
    let first_of_second = answers.iter().position(|it| it == "v2");
    ensure!(
        first_of_second.is_some() && answers[0] == "v1",
        "{answers:?}"
    );
    ensure!(answers.last().is_some_and(|it| it == "v2"));

    // Settings only: the same guests. One instance fewer. Halted, and back by hand.
    let pids = |shown: &Value| {
        shown["service"]["deployment"]["instances"]
            .as_array()
            .map(|all| {
                all.iter()
                    .map(|it| it["vmm_pid"].clone())
                    .collect::<Vec<_>>()
            })
    };
    let config = configure(Path::new(&second), "\"hello\"", "\"good day\"")?;
    let config = path(&config)?;
    let (code, updated) = service(&sandbox, &["update", "shop", "--config", &config, "--wait"])?;
    ensure!(code == 0 && updated["service"]["ready"] == 2, "{updated}");
    ensure!(pids(&updated) == pids(&shown), "{updated}");
    configure(Path::new(&second), r#"count="2""#, r#"count="1""#)?;
    let (code, updated) = service(&sandbox, &["update", "shop", "--config", &config, "--wait"])?;
    ensure!(code == 0 && updated["service"]["ready"] == 1, "{updated}");
    let instances = pids(&updated).context("instances")?;
    ensure!(instances.len() == 1, "{updated}");
    let (code, error) = service(&sandbox, &[&arguments[..], &policy[2..]].concat())?;
    ensure!(code == 13 && error["code"] == "HA-0516", "{code}: {error}");
    let (code, back) = service(&sandbox, &["rollback", "shop", "--wait"])?;
    ensure!(
        code == 0 && back["service"]["generation"] == 5,
        "{code}: {back}"
    );
    ensure!(ask(port)? == "v2");

    // Stopped, it stays stopped, and nobody listens; started, it has its disks.
    let (code, stopped) = service(&sandbox, &["stop", "shop", "--wait"])?;
    ensure!(code == 0, "{stopped}");
    drop(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).context("the port is free")?);
    daemon.signal(Signal::SIGTERM)?;
    daemon.wait()?;
    let daemon = serve(&sandbox)?;
    let (_, shown) = service(&sandbox, &["show", "shop"])?;
    ensure!(shown["service"]["expected"] == "stopped", "{shown}");
    ensure!(shown["service"]["deployment"].is_null(), "{shown}");
    let (code, started) = service(&sandbox, &["start", "shop", "--wait"])?;
    ensure!(code == 0, "{started}");
    ensure!(ask(port)? == "v2");

    let rows = history(&sandbox)?;
    let rows: Vec<_> = rows
        .iter()
        .map(|(a, b, c)| (a.as_str(), b.as_str(), *c))
        .collect();
    ensure!(
        rows == [
            ("start", "succeeded", 5),
            ("stop", "succeeded", 5),
            ("rollback", "succeeded", 5),
            ("update", "halted", 6),
            ("update", "succeeded", 5),
            ("update", "succeeded", 4),
            ("update", "rolled-back", 3),
            ("update", "succeeded", 2),
            ("apply", "succeeded", 1),
        ],
        "{rows:?}"
    );
    let (code, deleted) = service(&sandbox, &["delete", "shop", "--wait"])?;
    ensure!(code == 0, "{deleted}");
    daemon.stop()?;
    sandbox.assert_nothing_left()
}
