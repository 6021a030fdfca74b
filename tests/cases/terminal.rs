//! `exec` with a terminal, as a person uses it, and with pipes.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use e2e::run::{INSTANCE, Run, eventually};
use e2e::service::Service;
use e2e::{Place, limit};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};
use nix::unistd::Pid;

/// A person at a terminal: types into it and sees what it shows.
struct Person {
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    terminal: OwnedFd,
    calm: Termios,
}

impl Person {
    fn sit_down(rows: u16, columns: u16) -> Result<Self> {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pair = openpty(Some(&size), None)?;
        let keyboard = File::from(pair.master);
        let mut eyes = keyboard.try_clone()?;
        let (sender, screen) = channel();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = eyes.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Ok(Self {
            keyboard,
            screen,
            calm: tcgetattr(&pair.slave)?,
            terminal: pair.slave,
        })
    }

    /// Starts the program with these arguments on the terminal.
    fn start(&self, place: &Place, arguments: &[&str]) -> Result<Child> {
        let plain = place.command();
        let mut command = Command::new("setsid");
        command
            .arg("--ctty")
            .arg(plain.get_program())
            .args(arguments);
        for (name, value) in plain.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        Ok(command
            .env("TERM", "xterm-lab")
            .stdin(Stdio::from(self.terminal.try_clone()?))
            .stdout(Stdio::from(self.terminal.try_clone()?))
            .stderr(Stdio::from(self.terminal.try_clone()?))
            .spawn()?)
    }

    fn types(&mut self, text: &str) -> Result<()> {
        Ok(self.keyboard.write_all(text.as_bytes())?)
    }

    /// Waits until the screen has shown this.
    fn sees(&self, wanted: &str) -> Result<()> {
        let deadline = Instant::now() + limit(10);
        let mut shown = String::new();
        while !shown.contains(wanted) {
            let rest = deadline.saturating_duration_since(Instant::now());
            let Ok(bytes) = self.screen.recv_timeout(rest) else {
                bail!("no {wanted:?} on the screen:\n{shown}");
            };
            shown.push_str(&String::from_utf8_lossy(&bytes));
        }
        Ok(())
    }

    fn is_raw(&self) -> Result<bool> {
        let modes = tcgetattr(&self.terminal)?.local_flags;
        Ok(!modes.intersects(LocalFlags::ECHO | LocalFlags::ICANON | LocalFlags::ISIG))
    }

    fn is_calm(&self) -> Result<bool> {
        Ok(tcgetattr(&self.terminal)? == self.calm)
    }
}

fn ends(mut child: Child) -> Result<ExitStatus> {
    let deadline = Instant::now() + limit(10);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() > deadline {
            child.kill()?;
            bail!("exec did not end");
        }
        thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn exec_on_a_terminal_is_a_terminal_in_the_guest_and_leaves_ours_as_it_was() -> Result<()> {
    let place = Place::new()?;
    let service =
        Service::script("#!/bin/sh\nexec sleep 100000\n").write(&place.file("service"))?;
    let mut run = Run::start(&place, &service, &[])?;
    run.ready()?;

    let mut person = Person::sit_down(33, 99)?;
    let child = person.start(&place, &["exec", INSTANCE, "--", "sh"])?;
    person.types("tty; stty size; echo \"$TERM\"\n")?;
    person.sees("/dev/pts/")?;
    person.sees("33 99")?;
    person.sees("xterm-lab")?;
    ensure!(person.is_raw()?);
    let resized = Command::new("stty")
        .args(["rows", "50", "cols", "132"])
        .stdin(Stdio::from(person.terminal.try_clone()?))
        .status()?;
    ensure!(resized.success());
    person.types("until stty size | grep '50 132'; do sleep 0.1; done\n")?;
    person.sees("\n50 132")?;
    person.types("echo be''gun; sleep 1000; echo n''ever\n")?;
    person.sees("begun")?;
    person.types("\x03")?;
    person.types("echo code $?\n")?;
    person.sees("code 130")?;
    person.types("exit 9\n")?;
    let status = ends(child)?;
    ensure!(status.code() == Some(9), "{status}");
    ensure!(person.is_calm()?, "the terminal was left raw");

    // Told to end by a signal: so is the command, and the terminal is restored.
    let child = person.start(&place, &["exec", "-it", INSTANCE, "--", "sleep", "1000"])?;
    eventually("the terminal is raw", || person.is_raw())?;
    eventually("the command runs", || {
        let found = run.exec(&["sh", "-c", "grep -l ^sleep /proc/[0-9]*/comm | wc -l"])?;
        Ok(String::from_utf8_lossy(&found.stdout).trim() == "2")
    })?;
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGTERM)?;
    let status = ends(child)?;
    ensure!(status.code() == Some(143), "{status}");
    ensure!(person.is_calm()?, "the terminal was left raw");
    run.stop()?;
    place.assert_nothing_left()
}

#[test]
fn exec_with_pipes_carries_input_and_output_at_once_and_signals_pass_input_that_waits() -> Result<()>
{
    let place = Place::new()?;
    let service =
        Service::script("#!/bin/sh\nexec sleep 100000\n").write(&place.file("service"))?;
    let mut run = Run::start(&place, &service, &[])?;
    run.ready()?;

    let data: Vec<u8> = (0..2_000_000_u32).map(|n| (n * 31 / 7) as u8).collect();
    let piped = |command: &[&str]| {
        place
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
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGINT)?;
    let status = ends(child)?;
    ensure!(status.code() == Some(130), "{status}");
    ensure!(
        writer
            .join()
            .map_err(|_| anyhow!("writer panicked"))?
            .is_err()
    );
    run.stop()?;
    place.assert_nothing_left()
}
