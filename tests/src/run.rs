//! A `host-agent run` in the background, whose timeline is read line by line.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::{Sandbox, limit};

/// The only instance of a [`crate::service::Service`].
pub const INSTANCE: &str = "Role_IN_0";

/// A running service.
#[derive(Debug)]
pub struct Run<'a> {
    sandbox: &'a Sandbox,
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl<'a> Run<'a> {
    /// Starts the service in directory `service`, with `arguments` added.
    pub fn start(sandbox: &'a Sandbox, service: &Path, arguments: &[&str]) -> Result<Self> {
        let mut command = sandbox.command();
        command
            .args(["run", "--format", "jsonl"])
            .args(arguments)
            .arg(service);
        Self::from_command(sandbox, command)
    }

    /// Starts `command`, which is a `run --format jsonl` with the directories
    /// of `sandbox`.
    pub fn from_command(sandbox: &'a Sandbox, mut command: Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let (sender, lines) = channel();
        let streams: [Box<dyn std::io::Read + Send>; 2] = [
            Box::new(child.stdout.take().context("stdout is piped")?),
            Box::new(child.stderr.take().context("stderr is piped")?),
        ];
        for stream in streams {
            let sender = sender.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Self {
            sandbox,
            child,
            lines,
            seen: Vec::new(),
        })
    }

    /// Process id of the command.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a timeline event of this kind that satisfies `wanted`.
    pub fn event(&mut self, kind: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let deadline = Instant::now() + limit(30);
        loop {
            let line = self.line(deadline, kind)?;
            if let Ok(event) = serde_json::from_str::<Value>(&line)
                && event["event"] == kind
                && wanted(&event)
            {
                return Ok(event);
            }
        }
    }

    /// Waits for a line that contains `text`.
    pub fn line_with(&mut self, text: &str) -> Result<String> {
        let deadline = Instant::now() + limit(30);
        loop {
            let line = self.line(deadline, text)?;
            if line.contains(text) {
                return Ok(line);
            }
        }
    }

    /// Waits until the role is Ready.
    pub fn ready(&mut self) -> Result<()> {
        self.event("role", |event| event["state"] == "ready")?;
        Ok(())
    }

    /// Waits until every one of these instances is Ready.
    pub fn all_ready(&mut self, names: &[&str]) -> Result<()> {
        let mut left = names.to_vec();
        while !left.is_empty() {
            let event = self.event("role", |event| event["state"] == "ready")?;
            left.retain(|name| event["instance"] != *name);
        }
        Ok(())
    }

    fn line(&mut self, deadline: Instant, waiting_for: &str) -> Result<String> {
        let rest = deadline.saturating_duration_since(Instant::now());
        match self.lines.recv_timeout(rest) {
            Ok(line) => {
                self.seen.push(line.clone());
                Ok(line)
            }
            Err(RecvTimeoutError::Timeout) => bail!(
                "no event {waiting_for} in time; so far:\n{}\nserial:\n{}",
                self.seen.join("\n"),
                self.serial()
            ),
            Err(RecvTimeoutError::Disconnected) => bail!(
                "the command ended before event {waiting_for}:\n{}",
                self.seen.join("\n")
            ),
        }
    }

    fn serial(&self) -> String {
        self.instance_dir()
            .ok()
            .and_then(|dir| std::fs::read(dir.join("serial.log")).ok())
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Directory with the instance's disks and logs.
    pub fn instance_dir(&self) -> Result<PathBuf> {
        let deployments = self.sandbox.data().join("deployments");
        let deployment = std::fs::read_dir(&deployments)?
            .flatten()
            .next()
            .ok_or_else(|| anyhow!("no deployment in {}", deployments.display()))?;
        Ok(deployment.path().join(INSTANCE))
    }

    /// Runs a command in the guest.
    pub fn exec(&self, command: &[&str]) -> Result<Output> {
        let mut arguments = vec!["exec", INSTANCE, "--"];
        arguments.extend(command);
        self.sandbox.output(&arguments)
    }

    /// Runs a shell line in the guest that must succeed; its output.
    pub fn shell(&self, line: &str) -> Result<String> {
        let output = self.exec(&["sh", "-c", line])?;
        if !output.status.success() {
            bail!("`{line}` in the guest: {}", crate::text(&output));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The guest's Debian release, as in `13`, and its kernel version, a line each.
    pub fn release(&self) -> Result<String> {
        self.shell(". /etc/os-release; echo $VERSION_ID; uname -r")
    }

    /// Sends SIGINT, as one Ctrl-C does.
    pub fn interrupt(&self) -> Result<()> {
        self.signal(Signal::SIGINT)
    }

    /// Sends a signal to the command.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        Ok(kill(pid, signal)?)
    }

    /// Lines of the timeline so far.
    pub fn seen(&self) -> &[String] {
        &self.seen
    }

    /// Waits until the command ends by itself; its status and whole timeline.
    pub fn wait(mut self) -> Result<(ExitStatus, String)> {
        let deadline = Instant::now() + limit(30);
        loop {
            match self.line(deadline, "of the end") {
                Ok(_) => {}
                Err(_) if Instant::now() < deadline => break,
                Err(error) => return Err(error),
            }
        }
        let status = self.child.wait()?;
        Ok((status, self.seen.join("\n")))
    }

    /// Stops the command by one Ctrl-C; its whole timeline.
    pub fn stop(self) -> Result<String> {
        self.interrupt()?;
        let (status, seen) = self.wait()?;
        if !matches!(status.code(), Some(0 | 130)) {
            bail!("run ended with {status}:\n{seen}");
        }
        Ok(seen)
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until a command ends; kills it and fails if it does not end in time.
pub fn end(child: &mut Child) -> Result<ExitStatus> {
    let deadline = Instant::now() + limit(30);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() > deadline {
            child.kill()?;
            bail!("the command did not end in time");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Polls for a condition that no event announces.
pub fn eventually(what: &str, condition: impl Fn() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit(10);
    while Instant::now() < deadline {
        if condition()? {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!("not in time: {what}")
}
