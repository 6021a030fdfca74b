//! Removes what a killed host agent left: a process that outlives it for a moment.
//!
//! The janitor holds the reading end of a pipe. When the host agent ends, whatever ended
//! it, the pipe closes; then the VMM processes end by themselves, and the janitor removes
//! directories, socket and cgroups that are still there.

use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use super::content::ContentStore;
use super::deployment::{has_durable, is_clean, sweep};
use crate::cgroup;

/// First argument of a janitor process.
pub const VERB: &str = "janitor";
/// Time for VMM processes to let go of a deployment.
const LET_GO: Duration = Duration::from_secs(30);
/// Time for a process to be gone after it was killed.
const KILLED: Duration = Duration::from_secs(5);
/// Delay before a janitor that ended is replaced.
const RESPAWN_DELAY: Duration = Duration::from_secs(1);
/// Time between two looks.
const POLL: Duration = Duration::from_millis(100);

/// The host agent's side: while it lives, so does a janitor.
#[derive(Debug)]
pub struct Janitor {
    respawner: JoinHandle<()>,
}

/// What a janitor removes.
#[derive(Debug, Clone)]
pub struct Remains {
    /// Data directory with the deployments and the content.
    pub data_dir: PathBuf,
    /// Id of the host agent, which owns some of the deployments.
    pub owner: String,
    /// Socket of the host agent.
    pub socket: PathBuf,
    /// Cgroup of the host agent's guests, if it has one.
    pub group: Option<PathBuf>,
}

/// A janitor process, and the pipe whose end it waits for.
type JanitorProcess = (Child, OwnedFd);

/// Starts a janitor. One that ends early is replaced.
pub fn start(remains: Remains) -> io::Result<Janitor> {
    let mut arguments = vec![
        PathBuf::from(VERB),
        remains.data_dir,
        remains.owner.into(),
        remains.socket,
    ];
    arguments.extend(remains.group);
    let spawn = move || spawn(&arguments);
    let first = spawn()?;
    Ok(Janitor {
        respawner: tokio::spawn(respawn(first, spawn)),
    })
}

impl Drop for Janitor {
    fn drop(&mut self) {
        // The pipe closes with the task. The process is not waited for: it outlives this
        // one by design.
        self.respawner.abort();
    }
}

fn spawn(arguments: &[PathBuf]) -> io::Result<JanitorProcess> {
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
async fn respawn(first: JanitorProcess, spawn: impl Fn() -> io::Result<JanitorProcess>) {
    let mut running = Some(first);
    loop {
        if let Some((mut child, _alive)) = running {
            // Whatever ended it, another is needed.
            let _ = child.wait().await;
        }
        tokio::time::sleep(RESPAWN_DELAY).await;
        running = spawn().ok();
    }
}

/// Waits for the VMM processes to end, then kills those that do not.
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
        std::thread::sleep(POLL);
    }
}

/// The janitor process, after [`crate::child::begin`]: waits for the end of its standard
/// input.
pub fn main(mut arguments: impl Iterator<Item = PathBuf>) -> io::Result<()> {
    let (Some(data_dir), Some(owner), Some(socket)) =
        (arguments.next(), arguments.next(), arguments.next())
    else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    io::stdin().read_to_end(&mut Vec::new())?;
    let deadline = Instant::now() + LET_GO;
    let owner = owner.to_string_lossy();
    loop {
        // A file that a VMM process made meanwhile is gone at the next look.
        let _ = sweep(&data_dir);
        if is_clean(&data_dir, &owner) || Instant::now() >= deadline {
            break;
        }
        std::thread::sleep(POLL);
    }
    let _ = ContentStore::new(&data_dir).sweep();
    if let Some(group) = arguments.next() {
        if has_durable(&data_dir, &owner) {
            // Guests that outlive the host agent stay in their cgroups.
            cgroup::remove(&group);
        } else {
            remove_group(&group, deadline);
        }
    }
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
    async fn a_killed_janitor_is_reaped_and_replaced() {
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
            respawner: tokio::spawn(respawn(first, spawn)),
        };
        let there = |pid: u32| Path::new(&format!("/proc/{pid}")).exists();
        let killed = pids.recv().await.unwrap();
        let pid = Pid::from_raw(i32::try_from(killed).unwrap());
        kill(pid, Signal::SIGKILL).unwrap();
        let second = pids.recv().await.unwrap();
        assert!(!there(killed) && there(second));
        drop(janitor);
        // The runtime reaps a child without a waiter when another child ends.
        let end = Instant::now() + Duration::from_secs(20);
        while there(second) && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(!there(second));
    }
}
