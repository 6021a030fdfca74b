//! `serve` killed at any system call that changes a file: what it acknowledged is kept, and
//! nothing of what it had begun is left.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use e2e::Sandbox;
use e2e::run::eventually;
use e2e::service::Service;
use serde_json::Value;

/// The system calls by which the daemon changes files.
const CHANGES: &str = "fsync,fdatasync,pwrite64,rename,renameat,renameat2,link,linkat,unlink,\
                       unlinkat,mkdir,mkdirat,fallocate,ftruncate";

/// A daemon that is killed when a thread of it makes its `number`th such call.
fn serve_until(sandbox: &Sandbox, number: u32) -> Result<Child> {
    let mut command = Command::new("strace");
    // -D: the daemon is our child, not strace. -b: its own children are not traced.
    command
        .args(["-D", "-f", "-b", "execve", "-qqq", "-o", "/dev/null"])
        .args(["-e", "signal=none", "-e"])
        .arg(format!("inject={CHANGES}:signal=SIGKILL:when={number}"))
        .arg(e2e::program())
        .arg("serve");
    sandbox.set_environment(&mut command);
    spawn(command).context("strace is a test dependency (strace)")
}

fn spawn(mut command: Command) -> Result<Child> {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null());
    Ok(quiet.stderr(Stdio::null()).spawn()?)
}

/// Whether the daemon answers; it has not answered if it ended.
fn answers(sandbox: &Sandbox, daemon: &mut Child) -> Result<bool> {
    let mut ended = false;
    let daemon = std::cell::RefCell::new(daemon);
    eventually("the daemon answers or ends", || {
        let ended = daemon.borrow_mut().try_wait()?.is_some();
        Ok(ended || sandbox.output(&["service", "list"])?.status.success())
    })?;
    ended |= daemon.into_inner().try_wait()?.is_some();
    Ok(!ended)
}

/// Whether `host-agent service` with these arguments succeeded.
fn service(sandbox: &Sandbox, arguments: &[&str]) -> Result<bool> {
    let mut all = vec!["service"];
    all.extend(arguments);
    Ok(sandbox.output(&all)?.status.success())
}

fn names(sandbox: &Sandbox) -> Result<Vec<String>> {
    let listed = sandbox.output(&["service", "list", "--json"])?;
    let listed: Value = serde_json::from_slice(&listed.stdout)?;
    let services = listed["services"].as_array().context("services")?;
    let names = services
        .iter()
        .map(|it| it["name"].as_str().map(Into::into));
    names.collect::<Option<_>>().context("names")
}

fn entries(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

#[test]
fn a_daemon_killed_at_any_change_keeps_what_it_acknowledged() -> Result<()> {
    let sandbox = Sandbox::new()?;
    sandbox.vmm_is_killed();
    let idle = Service::idle().write(&sandbox.file("idle"))?;
    let idle = idle.to_str().context("a path in UTF-8")?;
    let (echoes, _) = Service::echo()?;
    let echoes = echoes.write(&sandbox.file("echo"))?;
    let echoes = echoes.to_str().context("a path in UTF-8")?;
    // The echo service is created up to its endpoint, and removed again.
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = format!("{}:Echo", taken.local_addr()?.port());

    let (mut number, mut next, mut killed) = (1, 2, 0);
    loop {
        let mut daemon = serve_until(&sandbox, number)?;
        let mut kept = false;
        let mut deleted = false;
        if answers(&sandbox, &mut daemon)? {
            kept = service(&sandbox, &["apply", "kept", "--package", idle])?;
            let begun = ["apply", "gone", "--package", echoes, "-p", &port];
            if service(&sandbox, &begun)? {
                deleted = service(&sandbox, &["delete", "gone", "--wait", "--yes"])?;
            }
        }
        let survived = daemon.try_wait()?.is_none();
        killed += u32::from(!survived);
        daemon.kill()?;
        daemon.wait()?;

        let mut command = sandbox.command();
        command.arg("serve");
        let mut daemon = spawn(command)?;
        ensure!(answers(&sandbox, &mut daemon)?, "call {number}: it starts");
        let names = names(&sandbox)?;
        let has = |name: &str| names.iter().any(|found| found == name);
        ensure!(has("kept") || !kept, "call {number}: {names:?}");
        ensure!(
            !has("gone") || !deleted || !survived,
            "call {number}: {names:?}"
        );
        for name in &names {
            let ended = service(&sandbox, &["delete", name, "--wait", "--yes"])?;
            ensure!(ended, "call {number}: {name} is deleted");
        }
        daemon.kill()?;
        daemon.wait()?;
        eventually("nothing is left", || {
            Ok(sandbox.assert_nothing_left().is_ok()
                || entries(&sandbox.file("run/host-agent")) == ["serve.sock"])
        })?;
        let content = entries(&sandbox.data().join("content"));
        ensure!(
            content.iter().all(|name| name == "lock"),
            "call {number}: {content:?}"
        );
        if survived {
            break;
        }
        (number, next) = (next, number + next);
    }
    ensure!(killed >= 5, "only {killed} kills");
    Ok(())
}
