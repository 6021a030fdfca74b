//! Harness of the end-to-end tests: writes services, runs the program as a user
//! does, and uses only its public interface.

pub mod agents;
pub mod bare;
pub mod disks;
pub mod mount_namespace;
pub mod peak;
pub mod random;
pub mod run;
pub mod service;
pub mod signal_masks;
pub mod terminal;
pub mod web;

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::run::eventually;

/// The program under test: `HOST_AGENT_BIN`.
pub fn program() -> PathBuf {
    env::var_os("HOST_AGENT_BIN").map_or_else(
        || panic!("HOST_AGENT_BIN is not set: run scripts/test"),
        PathBuf::from,
    )
}

/// The directory of the guest images, in `HOST_AGENT_DATA_DIR`.
pub fn images() -> PathBuf {
    env::var_os("HOST_AGENT_DATA_DIR").map_or_else(
        || panic!("HOST_AGENT_DATA_DIR is not set: run scripts/test"),
        |dir| PathBuf::from(dir).join("images"),
    )
}

/// A time limit: `seconds` on fast hardware, times `HOST_AGENT_TEST_SCALE`, since
/// the tests run on emulated hardware too.
pub fn limit(seconds: u64) -> Duration {
    let scale = env::var("HOST_AGENT_TEST_SCALE")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(10);
    Duration::from_secs(seconds * scale)
}

/// One test's data directory, with the images linked in, and its run-time
/// directory. On drop, the diff disks of the test's guests are verified.
#[derive(Debug)]
pub struct Sandbox {
    disks: disks::DiskWatch,
    dir: tempfile::TempDir,
}

impl Sandbox {
    /// Creates the directories.
    pub fn new() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("ha").tempdir()?;
        std::fs::create_dir(dir.path().join("data"))?;
        std::fs::create_dir(dir.path().join("run"))?;
        std::os::unix::fs::symlink(images(), dir.path().join("data/images"))?;
        let deployments = dir.path().join("data/deployments");
        let disks = disks::DiskWatch::start(deployments, dir.path().to_owned());
        Ok(Self { disks, dir })
    }

    /// Accepts leaked clusters in the diff disks. A test in which a VMM process is
    /// killed calls this.
    pub fn vmm_is_killed(&self) {
        self.disks.writer_is_killed();
    }

    /// The data directory.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// A path for the test's own use.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The program with the environment of this sandbox.
    pub fn command(&self) -> Command {
        let mut command = Command::new(program());
        self.set_environment(&mut command);
        command
    }

    /// The same, started by `env` with these options, such as `--default-signal=HUP`.
    pub fn command_by_env(&self, options: &[&str]) -> Command {
        let mut command = Command::new("env");
        command.args(options).arg(program());
        self.set_environment(&mut command);
        command
    }

    /// Gives `command` the environment of this sandbox.
    pub fn set_environment(&self, command: &mut Command) {
        command
            .env("HOST_AGENT_DATA_DIR", self.data())
            .env("XDG_RUNTIME_DIR", self.dir.path().join("run"))
            .env("HOME", self.dir.path())
            .env_remove("CI")
            .env("NO_COLOR", "1");
    }

    /// Runs the program to its end.
    pub fn output(&self, arguments: &[&str]) -> Result<Output> {
        self.command()
            .args(arguments)
            .output()
            .with_context(|| format!("run {arguments:?}"))
    }

    /// Fails if a deployment, a socket or a process is left.
    pub fn assert_nothing_left(&self) -> Result<()> {
        for dir in ["data/deployments", "run/host-agent"] {
            let left: Vec<_> = match std::fs::read_dir(self.dir.path().join(dir)) {
                Ok(entries) => entries.flatten().map(|entry| entry.file_name()).collect(),
                Err(_) => continue,
            };
            ensure!(left.is_empty(), "{dir} still holds {left:?}");
        }
        let left = self.process()?;
        ensure!(left.is_none(), "process {left:?} still runs");
        Ok(())
    }

    /// Waits until a killed command's janitor has removed everything.
    pub fn wait_until_nothing_is_left(&self) -> Result<()> {
        eventually("nothing is left", || Ok(self.assert_nothing_left().is_ok()))
    }

    /// The command line of a running process that was started in this sandbox.
    fn process(&self) -> Result<Option<String>> {
        let mine = format!("HOST_AGENT_DATA_DIR={}", self.data().display());
        for entry in std::fs::read_dir("/proc")?.flatten() {
            let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
            if environment
                .split(|byte| *byte == 0)
                .any(|variable| variable == mine.as_bytes())
            {
                let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
                return Ok(Some(String::from_utf8_lossy(&line).replace('\0', " ")));
            }
        }
        Ok(None)
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        // The guests of a killed command end by themselves.
        let verified = eventually("the guests end", || Ok(self.process()?.is_none()))
            .and_then(|()| self.disks.verify());
        if let Err(error) = verified {
            panic!("the disks of this test's guests: {error:#}");
        }
    }
}

/// Every file below `dir` with its length, sorted, to compare before and after.
pub fn files(dir: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let mut found = Vec::new();
    let mut left = vec![dir.to_owned()];
    while let Some(path) = left.pop() {
        let metadata = std::fs::symlink_metadata(&path)?;
        if metadata.is_dir() {
            for entry in std::fs::read_dir(&path)? {
                left.push(entry?.path());
            }
        }
        let length = if metadata.is_dir() { 0 } else { metadata.len() };
        found.push((path, length));
    }
    found.sort();
    Ok(found)
}

/// Status, standard output and standard error of a command, for messages.
pub fn text(output: &Output) -> String {
    format!(
        "{}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}
