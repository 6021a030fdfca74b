//! `exec` on a terminal and with pipes.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use e2e::Sandbox;
use e2e::run::{INSTANCE, Run, end, eventually};
use e2e::service::Service;
use e2e::terminal::Terminal;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn exec_gives_the_guest_a_terminal_and_restores_its_own() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    let mut run = Run::start(&sandbox, &service, &[])?;
    run.ready()?;

    let mut terminal = Terminal::open(33, 99)?;
    let mut child = terminal.start(&sandbox, &["exec", INSTANCE, "--", "sh"])?;
    terminal.write("tty; stty size; echo \"$TERM\"\n")?;
    terminal.wait_for("/dev/pts/")?;
    terminal.wait_for("33 99")?;
    terminal.wait_for("xterm-lab")?;
    ensure!(terminal.is_raw()?);
    let resized = Command::new("stty")
        .args(["rows", "50", "cols", "132"])
        .stdin(terminal.side()?)
        .status()?;
    ensure!(resized.success());
    terminal.write("until stty size | grep '50 132'; do sleep 0.1; done\n")?;
    terminal.wait_for("\n50 132")?;
    terminal.write("echo be''gun; sleep 1000; echo n''ever\n")?;
    terminal.wait_for("begun")?;
    terminal.write("\x03")?;
    terminal.write("echo code $?\n")?;
    terminal.wait_for("code 130")?;
    terminal.write("exit 9\n")?;
    let status = end(&mut child)?;
    ensure!(status.code() == Some(9), "{status}");
    ensure!(terminal.is_restored()?, "the terminal was left raw");

    // A signal to `exec` also ends the command, and the terminal is restored.
    let mut child = terminal.start(&sandbox, &["exec", "-it", INSTANCE, "--", "sleep", "1000"])?;
    eventually("the terminal is raw", || terminal.is_raw())?;
    eventually("the command runs", || {
        let found = run.exec(&["sh", "-c", "grep -l ^sleep /proc/[0-9]*/comm | wc -l"])?;
        Ok(String::from_utf8_lossy(&found.stdout).trim() == "2")
    })?;
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGTERM)?;
    let status = end(&mut child)?;
    ensure!(status.code() == Some(143), "{status}");
    ensure!(terminal.is_restored()?, "the terminal was left raw");
    run.stop()?;
    sandbox.assert_nothing_left()
}

#[test]
fn exec_with_pipes_forwards_data_and_signals() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    let mut run = Run::start(&sandbox, &service, &[])?;
    run.ready()?;

    let data: Vec<u8> = (0..2_000_000_u32).map(|n| (n * 31 / 7) as u8).collect();
    let piped = |command: &[&str]| {
        sandbox
            .command()
            .args(["exec", "-i", INSTANCE, "--"])
            .args(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
    };
    let mut child = piped(&["cat"])?;
    let mut input = child.stdin.take().context("stdin is piped")?;
    let given = data.clone();
    let writer = thread::spawn(move || input.write_all(&given));
    let output = child.wait_with_output()?;
    writer.join().map_err(|_| anyhow!("writer panicked"))??;
    ensure!(output.status.success(), "{}", output.status);
    ensure!(
        output.stdout == data,
        "{} bytes came back",
        output.stdout.len()
    );

    let mut child = piped(&["sh", "-c", "echo up; exec sleep 1000"])?;
    let mut input = child.stdin.take().context("stdin is piped")?;
    let writer = thread::spawn(move || input.write_all(&data));
    let mut up = [0; 3];
    child
        .stdout
        .as_mut()
        .context("stdout is piped")?
        .read_exact(&mut up)?;
    // The command does not read its input: the signal overtakes it.
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGINT)?;
    let status = end(&mut child)?;
    ensure!(status.code() == Some(130), "{status}");
    ensure!(
        writer
            .join()
            .map_err(|_| anyhow!("writer panicked"))?
            .is_err()
    );
    run.stop()?;
    sandbox.assert_nothing_left()
}
