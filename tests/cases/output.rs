//! A slow or closed reader of the timeline does not delay the supervisor.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use e2e::Sandbox;
use e2e::run::{INSTANCE, end, eventually};
use e2e::service::Service;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn run(sandbox: &Sandbox, arguments: &[&str]) -> Result<Command> {
    let service = Service::idle().write(&sandbox.file("service"))?;
    let mut command = sandbox.command();
    command
        .args(["run", "--format", "jsonl"])
        .args(arguments)
        .arg(service)
        .stdin(Stdio::null());
    Ok(command)
}

/// Whether the instance is Ready in this generation, as `ps` shows it.
fn ready(sandbox: &Sandbox, generation: u64) -> Result<bool> {
    let output = sandbox.output(&["ps", "--json"])?;
    let list: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let instance = &list["deployments"][0]["instances"][0];
    Ok(instance["state"] == "Ready" && instance["generation"] == generation)
}

#[test]
fn a_paused_reader_delays_neither_restart_nor_end() -> Result<()> {
    let sandbox = Sandbox::new()?;
    sandbox.vmm_is_killed();
    let (mut reader, mut writer) = io::pipe()?;
    // The pipe is full from the start: no line can be written.
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096))?;
    writer.write_all(&[b'x'; 4096])?;
    let mut child = run(&sandbox, &["--heartbeat-limit", "20"])?
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()?;
    eventually("the first boot is Ready", || ready(&sandbox, 1))?;
    let frozen = sandbox.output(&["freeze", INSTANCE])?;
    ensure!(frozen.status.success(), "{}", e2e::text(&frozen));
    eventually("the second boot is Ready", || ready(&sandbox, 2))?;
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGTERM)?;
    let status = end(&mut child)?;
    ensure!(status.code() == Some(0), "{status}");
    let mut text = String::new();
    reader.read_to_string(&mut text)?;
    ensure!(text.trim_start_matches('x').is_empty(), "{text}");
    sandbox.assert_nothing_left()
}

#[test]
fn a_closed_output_ends_the_command_without_an_error_message() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (reader, writer) = io::pipe()?;
    drop(reader);
    let mut child = run(&sandbox, &[])?
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()?;
    let status = end(&mut child)?;
    let mut errors = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        stderr.read_to_string(&mut errors)?;
    }
    ensure!(status.code() == Some(141), "{status}: {errors}");
    ensure!(
        !errors.contains("error") && !errors.contains("panic"),
        "{errors}"
    );
    sandbox.assert_nothing_left()
}

#[test]
fn following_a_log_succeeds_when_the_service_ends() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::script("#!/bin/sh\necho up\nexec sleep 100000\n")
        .write(&sandbox.file("service"))?;
    let mut child = sandbox
        .command()
        .arg("run")
        .arg(service)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    eventually("the service is Ready", || ready(&sandbox, 1))?;
    let mut follower = sandbox
        .command()
        .args(["logs", INSTANCE, "--follow"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let stdout = follower.stdout.take().context("stdout is piped")?;
    let mut first = String::new();
    // Stays open, so that the follower does not end because of a closed output.
    let mut stdout = BufReader::new(stdout);
    stdout.read_line(&mut first)?;
    ensure!(first.contains("up"), "{first}");
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGTERM)?;
    let status = end(&mut child)?;
    ensure!(status.code() == Some(0), "{status}");
    let status = end(&mut follower)?;
    let mut errors = String::new();
    if let Some(mut stderr) = follower.stderr.take() {
        stderr.read_to_string(&mut errors)?;
    }
    ensure!(
        status.code() == Some(0) && errors.is_empty(),
        "{status}: {errors}"
    );
    sandbox.assert_nothing_left()
}
