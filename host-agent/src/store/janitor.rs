//! Removes what a killed command left: a process that outlives it for a moment.
//!
//! The janitor holds the reading end of a pipe. When the command ends, whatever
//! ended it, the pipe closes; then the VMM processes end by themselves, and the
//! janitor removes the deployment's directory, socket and cgroups if they are
//! still there.

use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use super::deployment::{remove_if_dead, socket_name};
use crate::cgroup;

/// First argument of a janitor process.
pub const VERB: &str = "janitor";
/// Time for VMM processes to let go of a deployment.
const LET_GO: Duration = Duration::from_secs(30);
/// Time for a process to be gone after it was killed.
const KILLED: Duration = Duration::from_secs(5);
/// Pause before another janitor follows one that ended.
const START_AGAIN: Duration = Duration::from_secs(1);
/// Time between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The command's side: while it lives, so does a janitor.
#[derive(Debug)]
pub struct Janitor {
    keeper: JoinHandle<()>,
}

/// A janitor process, and the pipe whose end it waits for.
type Process = (Child, OwnedFd);

/// Starts a janitor for the deployment in `directory`, with its socket in
/// `runtime_dir` and its guests' cgroups in `group`. One that ends before its
/// time is followed by another.
pub fn start(directory: &Path, runtime_dir: &Path, group: Option<&Path>) -> io::Result<Janitor> {
    let mut arguments = vec![PathBuf::from(VERB), directory.into(), runtime_dir.into()];
    arguments.extend(group.map(Path::to_owned));
    let spawn = move || spawn(&arguments);
    let first = spawn()?;
    Ok(Janitor {
        keeper: tokio::spawn(keep(first, spawn)),
    })
}

impl Drop for Janitor {
    fn drop(&mut self) {
        // The pipe closes with the task. The process is not waited for: it
        // outlives this one by design.
        self.keeper.abort();
    }
}

fn spawn(arguments: &[PathBuf]) -> io::Result<Process> {
    let (reader, writer) = io::pipe()?;
    let child = Command::new("/proc/self/exe")
        .args(arguments)
        .env_clear()
        .stdin(Stdio::from(reader))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()?;
    Ok((child, writer.into()))
}

/// Reaps the janitor that runs, and starts another in its place.
async fn keep(first: Process, spawn: impl Fn() -> io::Result<Process>) {
    let mut running = Some(first);
    loop {
        if let Some((mut child, _alive)) = running {
            // No reason for its end is worse than another.
            let _ = child.wait().await;
        }
        tokio::time::sleep(START_AGAIN).await;
        running = spawn().ok();
    }
}

/// Waits for the guests' processes to end, then for those that do not to die.
fn remove_group(group: &Path, deadline: Instant) {
    let mut killed = false;
    while !cgroup::remove(group) {
        let late = Instant::now().saturating_duration_since(deadline);
        if late > KILLED {
            // The next start sweeps it.
            return;
        }
        if !late.is_zero() && !killed {
            cgroup::kill(group);
            killed = true;
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// The janitor process, after [`crate::child::begin`]: waits for the end of its standard input.
pub fn main(mut arguments: impl Iterator<Item = PathBuf>) -> io::Result<()> {
    let (Some(directory), Some(runtime_dir)) = (arguments.next(), arguments.next()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    io::stdin().read_to_end(&mut Vec::new())?;
    let deadline = Instant::now() + LET_GO;
    while directory.exists()
        // A file that a VMM process made meanwhile is gone at the next look.
        && !remove_if_dead(&directory, true).unwrap_or(false)
        && Instant::now() < deadline
    {
        std::thread::sleep(LOOK_AGAIN);
    }
    if let Some(group) = arguments.next() {
        remove_group(&group, deadline);
    }
    let socket = runtime_dir.join(socket_name(&directory));
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;
    use tokio::sync::mpsc;

    #[tokio::test(flavor = "current_thread")]
    async fn a_janitor_that_was_killed_is_reaped_and_followed_by_another_that_ends_with_us() {
        let (started, mut pids) = mpsc::unbounded_channel();
        let spawn = move || {
            let (reader, writer) = io::pipe()?;
            let mut program = Command::new("cat");
            let child = program.stdin(Stdio::from(reader)).spawn()?;
            started.send(child.id().unwrap()).unwrap();
            Ok((child, OwnedFd::from(writer)))
        };
        let first = spawn().unwrap();
        let janitor = Janitor {
            keeper: tokio::spawn(keep(first, spawn)),
        };
        let there = |pid: u32| Path::new(&format!("/proc/{pid}")).exists();
        let killed = pids.recv().await.unwrap();
        let pid = Pid::from_raw(i32::try_from(killed).unwrap());
        kill(pid, Signal::SIGKILL).unwrap();
        let second = pids.recv().await.unwrap();
        assert!(!there(killed) && there(second));
        drop(janitor);
        // The run-time reaps what nobody waits for when a child ends.
        let end = Instant::now() + Duration::from_secs(20);
        while there(second) && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(!there(second));
    }
}
