//! Harness of the end-to-end tests: services made on the spot, the program
//! run as a user runs it, and nothing but its public interface.

pub mod bare;
pub mod disks;
pub mod mounts;
pub mod peak;
pub mod run;
pub mod service;
pub mod web;

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// The program under test: `HOST_AGENT_BIN`.
pub fn program() -> PathBuf {
    env::var_os("HOST_AGENT_BIN").map_or_else(
        || panic!("HOST_AGENT_BIN names no program: run scripts/test"),
        PathBuf::from,
    )
}

/// Where the guest images are: `HOST_AGENT_DATA_DIR`.
pub fn images() -> PathBuf {
    env::var_os("HOST_AGENT_DATA_DIR").map_or_else(
        || panic!("HOST_AGENT_DATA_DIR names no directory: run scripts/test"),
        |dir| PathBuf::from(dir).join("images"),
    )
}

/// A limit for `seconds` of a fast machine, on this one. The suite runs on
/// emulated hardware too.
pub fn limit(seconds: u64) -> Duration {
    let scale = env::var("HOST_AGENT_TEST_SCALE")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(10);
    Duration::from_secs(seconds * scale)
}

/// Directories of one test: data (with the images linked in) and run time. When
/// it is dropped, the diff disks of its guests are judged.
#[derive(Debug)]
pub struct Place {
    kept: disks::Kept,
    dir: tempfile::TempDir,
}

impl Place {
    /// Fresh directories.
    pub fn new() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("ha").tempdir()?;
        std::fs::create_dir(dir.path().join("data"))?;
        std::fs::create_dir(dir.path().join("run"))?;
        std::os::unix::fs::symlink(images(), dir.path().join("data/images"))?;
        let deployments = dir.path().join("data/deployments");
        let kept = disks::Kept::watch(deployments, dir.path().to_owned());
        Ok(Self { kept, dir })
    }

    /// To be called by a test in which a VMM process is killed: its disk may hold
    /// clusters that are counted and not used.
    pub fn vmm_is_killed(&self) {
        self.kept.may_be_killed();
    }

    /// The data directory.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// A path for the test's own use.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The program with this place's directories.
    pub fn command(&self) -> Command {
        let mut command = Command::new(program());
        self.surround(&mut command);
        command
    }

    /// Gives `command` the environment of this place.
    pub fn surround(&self, command: &mut Command) {
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

    /// What an ended command must not leave: deployments, sockets, processes.
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

    /// The command line of a process that was started here and has not ended.
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

impl Drop for Place {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        // A killed command's guests end by themselves.
        let judged = run::eventually("the guests end", || Ok(self.process()?.is_none()))
            .and_then(|()| self.kept.judge());
        if let Err(error) = judged {
            panic!("the disks of this test's guests: {error:#}");
        }
    }
}

/// Every file below `dir` with its length, sorted: what a command must leave
/// as it was.
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

/// Standard output and error of a command, for messages.
pub fn text(output: &Output) -> String {
    format!(
        "{}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}
