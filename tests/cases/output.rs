//! Readers of the timeline that are slow or gone hold up no supervision.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use e2e::run::{INSTANCE, eventually};
use e2e::service::Service;
use e2e::{Place, limit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn run(place: &Place, arguments: &[&str]) -> Result<Command> {
    let service =
        Service::script("#!/bin/sh\nexec sleep 100000\n").write(&place.file("service"))?;
    let mut command = place.command();
    command
        .args(["run", "--format", "jsonl"])
        .args(arguments)
        .arg(service)
        .stdin(Stdio::null());
    Ok(command)
}

fn ends(child: &mut Child) -> Result<std::process::ExitStatus> {
    let deadline = Instant::now() + limit(30);
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    child.kill()?;
    bail!("the command did not end");
}

/// Whether the instance is Ready in this generation, by the command's socket.
fn ready(place: &Place, generation: u64) -> Result<bool> {
    let output = place.output(&["ps", "--json"])?;
    let list: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let instance = &list["deployments"][0]["instances"][0];
    Ok(instance["state"] == "Ready" && instance["generation"] == generation)
}

#[test]
fn a_reader_that_pauses_stalls_no_restart_and_the_command_ends_without_it() -> Result<()> {
    let place = Place::new()?;
    place.vmm_is_killed();
    let (mut reader, mut writer) = io::pipe()?;
    // Full from the beginning: not one line can be written.
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096))?;
    writer.write_all(&[b'x'; 4096])?;
    let mut child = run(&place, &["--heartbeat-limit", "20"])?
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()?;
    eventually("the first boot is Ready", || ready(&place, 1))?;
    let frozen = place.output(&["freeze", INSTANCE])?;
    ensure!(frozen.status.success(), "{}", e2e::text(&frozen));
    eventually("the second boot is Ready", || ready(&place, 2))?;
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGTERM)?;
    let status = ends(&mut child)?;
    ensure!(status.code() == Some(0), "{status}");
    let mut text = String::new();
    reader.read_to_string(&mut text)?;
    ensure!(text.trim_start_matches('x').is_empty(), "{text}");
    place.assert_nothing_left()
}

#[test]
fn a_reader_that_went_away_ends_the_command_and_its_guest_without_a_word() -> Result<()> {
    let place = Place::new()?;
    let (reader, writer) = io::pipe()?;
    drop(reader);
    let mut child = run(&place, &[])?
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()?;
    let status = ends(&mut child)?;
    let mut errors = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        stderr.read_to_string(&mut errors)?;
    }
    ensure!(status.code() == Some(141), "{status}: {errors}");
    ensure!(
        !errors.contains("error") && !errors.contains("panic"),
        "{errors}"
    );
    place.assert_nothing_left()
}

#[test]
fn a_followed_log_ends_with_the_service_and_that_is_a_success() -> Result<()> {
    let place = Place::new()?;
    let service =
        Service::script("#!/bin/sh\necho up\nexec sleep 100000\n").write(&place.file("service"))?;
    let mut child = place
        .command()
        .arg("run")
        .arg(service)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    eventually("the service is Ready", || ready(&place, 1))?;
    let mut follower = place
        .command()
        .args(["logs", INSTANCE, "--follow"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let stdout = follower.stdout.take().context("stdout is piped")?;
    let mut first = String::new();
    // Kept to the end: a reader that goes away is another matter.
    let mut stdout = BufReader::new(stdout);
    stdout.read_line(&mut first)?;
    ensure!(first.contains("up"), "{first}");
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGTERM)?;
    let status = ends(&mut child)?;
    ensure!(status.code() == Some(0), "{status}");
    let status = ends(&mut follower)?;
    let mut errors = String::new();
    if let Some(mut stderr) = follower.stderr.take() {
        stderr.read_to_string(&mut errors)?;
    }
    ensure!(
        status.code() == Some(0) && errors.is_empty(),
        "{status}: {errors}"
    );
    place.assert_nothing_left()
}
