//! A terminal for the program under test.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Instant;

use anyhow::{Result, bail};
use nix::pty::{Winsize, openpty};
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};

use crate::{Sandbox, limit};

/// A pseudo-terminal.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    /// What the master side reads.
    output: Receiver<Vec<u8>>,
    slave: OwnedFd,
    /// The modes before a command changes them.
    modes: Termios,
}

impl Terminal {
    /// Opens one of this size.
    pub fn open(rows: u16, columns: u16) -> Result<Self> {
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

    /// The side of the programs, as one of their streams.
    pub fn side(&self) -> Result<Stdio> {
        Ok(Stdio::from(self.slave.try_clone()?))
    }

    /// Starts the program with these arguments on the terminal.
    pub fn start(&self, sandbox: &Sandbox, arguments: &[&str]) -> Result<Child> {
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
            .stdin(self.side()?)
            .stdout(self.side()?)
            .stderr(self.side()?)
            .spawn()?)
    }

    /// Types this.
    pub fn write(&mut self, text: &str) -> Result<()> {
        Ok(self.master.write_all(text.as_bytes())?)
    }

    /// Waits until the output since the last call contains this; that output.
    pub fn wait_for(&self, wanted: &str) -> Result<String> {
        let deadline = Instant::now() + limit(10);
        let mut shown = String::new();
        while !shown.contains(wanted) {
            let rest = deadline.saturating_duration_since(Instant::now());
            let Ok(bytes) = self.output.recv_timeout(rest) else {
                bail!("no {wanted:?} on the terminal:\n{shown}");
            };
            shown.push_str(&String::from_utf8_lossy(&bytes));
        }
        Ok(shown)
    }

    /// Whether a program reads every key.
    pub fn is_raw(&self) -> Result<bool> {
        let modes = tcgetattr(&self.slave)?.local_flags;
        Ok(!modes.intersects(LocalFlags::ECHO | LocalFlags::ICANON | LocalFlags::ISIG))
    }

    /// Whether the modes are those of the beginning.
    pub fn is_restored(&self) -> Result<bool> {
        Ok(tcgetattr(&self.slave)? == self.modes)
    }
}
