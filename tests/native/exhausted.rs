//! `serve` when descriptors, threads or its store are gone: a clear refusal, and the next
//! request works.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use e2e::run::eventually;
use e2e::{Sandbox, limit, text};
use nix::unistd::Pid;
use serde_json::Value;

/// A daemon with these limits, as options of prlimit(1).
struct Daemon {
    child: Child,
    socket: PathBuf,
}

impl Daemon {
    fn start(sandbox: &Sandbox, limits: &[&str]) -> Result<Self> {
        let mut command = Command::new("prlimit");
        command.args(limits).arg(e2e::program()).arg("serve");
        sandbox.set_environment(&mut command);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let socket = sandbox.file("run/host-agent/serve.sock");
        let this = Self { child, socket };
        eventually("the daemon serves", || Ok(this.answer("/healthz").is_ok()))?;
        Ok(this)
    }

    fn pid(&self) -> Result<Pid> {
        Ok(Pid::from_raw(i32::try_from(self.child.id())?))
    }

    /// The status line and the body of a GET.
    fn answer(&self, path: &str) -> Result<String> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(limit(10)))?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        Ok(answer)
    }

    fn count(&self, what: &str) -> Result<usize> {
        let path = PathBuf::from(format!("/proc/{}/{what}", self.pid()?));
        Ok(fs::read_dir(path)?.count())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_daemon_without_descriptors_recovers_when_clients_leave() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let daemon = Daemon::start(&sandbox, &["--nofile=64:64"])?;
    daemon.answer("/v1/services")?;
    let before = daemon.count("fd")?;
    // Each takes a descriptor; those above the limit wait in the queue of the socket.
    let clients = (0..100).map(|_| UnixStream::connect(&daemon.socket));
    let clients: Vec<_> = clients.collect::<std::io::Result<_>>()?;
    eventually("the descriptors are gone", || Ok(daemon.count("fd")? >= 63))?;
    drop(clients);
    daemon
        .answer("/v1/services")
        .context("after the clients left")?;
    let listed = sandbox.output(&["service", "list"])?;
    ensure!(listed.status.success(), "{}", text(&listed));
    eventually("no descriptor is leaked", || {
        Ok(daemon.count("fd")? <= before)
    })
}

/// The one event of this kind that is stored.
fn stored_event(sandbox: &Sandbox, kind: &str) -> Result<Value> {
    let output = sandbox.output(&["events", "--json"])?;
    let lines = String::from_utf8(output.stdout)?;
    let events = lines.lines().map(serde_json::from_str::<Value>);
    let events: Vec<_> = events.collect::<Result<_, _>>()?;
    let mut found = events.iter().filter(|it| it["event"]["event"] == kind);
    let event = found.next().with_context(|| format!("{kind} in {lines}"))?;
    ensure!(found.next().is_none(), "one {kind}: {lines}");
    Ok(event.clone())
}

#[test]
fn a_damaged_store_is_put_aside_and_said_loudly() -> Result<()> {
    let sandbox = Sandbox::new()?;
    drop(Daemon::start(&sandbox, &[])?);
    let path = sandbox.data().join("state/host-agent.db");
    for damage in [Vec::new(), vec![7; 9000]] {
        // The log of the killed daemon would repair a damaged file.
        for suffix in ["-wal", "-shm"] {
            let _ = fs::remove_file(sandbox.data().join(format!("state/host-agent.db{suffix}")));
        }
        fs::write(&path, damage)?;
        let daemon = Daemon::start(&sandbox, &[])?;
        eventually("the event is stored", || {
            Ok(stored_event(&sandbox, "store-restored").is_ok())
        })?;
        let event = stored_event(&sandbox, "store-restored")?;
        let aside = event["event"]["aside"].as_str().context("a path")?;
        ensure!(Path::new(aside).exists(), "{event}");
        drop(daemon);
    }
    Ok(())
}

#[test]
fn a_kept_deployment_of_no_service_is_reported_and_left() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let id = "0123456789abcdef0123456789abcdef";
    let directory = sandbox.data().join("deployments").join(id);
    fs::create_dir_all(&directory)?;
    fs::write(directory.join("durable"), "")?;
    let _daemon = Daemon::start(&sandbox, &[])?;
    eventually("the event is stored", || {
        Ok(stored_event(&sandbox, "unknown-deployment").is_ok())
    })?;
    ensure!(directory.exists());
    Ok(())
}
