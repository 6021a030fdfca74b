//! `exec` on a terminal and with pipes.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use e2e::run::{INSTANCE, Run, end, eventually};
use e2e::service::Service;
use e2e::{Sandbox, limit};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};
use nix::unistd::Pid;

/// A pseudo-terminal.
struct Terminal {
    master: File,
    /// What the master side reads.
    output: Receiver<Vec<u8>>,
    slave: OwnedFd,
    /// The modes before a command changes them.
    modes: Termios,
}

impl Terminal {
    fn open(rows: u16, columns: u16) -> Result<Self> {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pair = openpty(Some(&size), None)?;
        let master = File::from(pair.master);
        let mut reader = master.try_clone()?;
        let (sender, output) = channel();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Ok(Self {
            master,
            output,
            modes: tcgetattr(&pair.slave)?,
            slave: pair.slave,
        })
    }

    /// Starts the program with these arguments on the terminal.
    fn start(&self, sandbox: &Sandbox, arguments: &[&str]) -> Result<Child> {
        let plain = sandbox.command();
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
            .stdin(Stdio::from(self.slave.try_clone()?))
            .stdout(Stdio::from(self.slave.try_clone()?))
            .stderr(Stdio::from(self.slave.try_clone()?))
            .spawn()?)
    }

    fn write(&mut self, text: &str) -> Result<()> {
        Ok(self.master.write_all(text.as_bytes())?)
    }

    /// Waits until the output since the last call contains this.
    fn wait_for(&self, wanted: &str) -> Result<()> {
        let deadline = Instant::now() + limit(10);
        let mut shown = String::new();
        while !shown.contains(wanted) {
            let rest = deadline.saturating_duration_since(Instant::now());
            let Ok(bytes) = self.output.recv_timeout(rest) else {
                bail!("no {wanted:?} on the terminal:\n{shown}");
            };
            shown.push_str(&String::from_utf8_lossy(&bytes));
        }
        Ok(())
    }

    fn is_raw(&self) -> Result<bool> {
        let modes = tcgetattr(&self.slave)?.local_flags;
        Ok(!modes.intersects(LocalFlags::ECHO | LocalFlags::ICANON | LocalFlags::ISIG))
    }

    fn is_restored(&self) -> Result<bool> {
        Ok(tcgetattr(&self.slave)? == self.modes)
    }
}

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
        .stdin(Stdio::from(terminal.slave.try_clone()?))
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
