//! A process that removes what a killed host agent left.
//!
//! The janitor reads from a pipe that closes when the host agent ends, for whatever
//! reason. VMM processes end then too, except those of durable deployments, and the
//! janitor removes the directories, the socket and the cgroups that are left.

use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use super::content::ContentStore;
use super::deployment::{durable, is_clean, short_id, sweep};
use crate::cgroup;

/// First argument of a janitor process.
pub const VERB: &str = "janitor";
/// Most time for VMM processes to end by themselves.
const END_LIMIT: Duration = Duration::from_secs(30);
/// Most time for a killed process to end.
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// Delay before a janitor that ended is replaced.
const RESPAWN_DELAY: Duration = Duration::from_secs(1);
/// Time between two checks.
const POLL: Duration = Duration::from_millis(100);

/// Keeps a janitor process running until it is dropped.
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
    /// Socket of the host agent, if it goes with it.
    pub socket: Option<PathBuf>,
    /// Cgroup of the host agent's guests, if it has one.
    pub group: Option<PathBuf>,
}

/// A janitor process, and the pipe whose end it reads to.
type JanitorProcess = (Child, OwnedFd);

/// Starts a janitor, which is replaced if it ends.
pub fn start(remains: Remains) -> io::Result<Janitor> {
    let mut arguments = vec![
        PathBuf::from(VERB),
        remains.data_dir,
        remains.owner.into(),
        // No file has the empty name.
        remains.socket.unwrap_or_default(),
    ];
    arguments.extend(remains.group);
    let spawn = move || spawn(&arguments);
    let first = spawn()?;
    Ok(Janitor {
        respawner: tokio::spawn(respawn(first, spawn)),
    })
}

#[cfg(test)]
impl Janitor {
    /// No process at all, for tests of its owner.
    pub fn none() -> Self {
        let respawner = tokio::spawn(std::future::pending());
        Self { respawner }
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        // The task owns the pipe. The janitor process is not waited for, because it
        // outlives this process.
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
            // However it ended, it is replaced.
            let _ = child.wait().await;
        }
        tokio::time::sleep(RESPAWN_DELAY).await;
        running = spawn().ok();
    }
}

/// Removes the cgroup when the guests of ephemeral deployments have ended; kills them if
/// they have not at `deadline`. Guests of durable deployments stay in their cgroups.
fn remove_group(group: &Path, data_dir: &Path, deadline: Instant) {
    let mut killed = false;
    while !cgroup::remove(group) {
        // An error must not end a guest that may be durable.
        let Ok((ephemeral, durable)) = guests(group, data_dir) else {
            return;
        };
        if ephemeral.is_empty() && !durable.is_empty() {
            return;
        }
        let late = Instant::now().saturating_duration_since(deadline);
        if late > KILL_LIMIT {
            // The next start sweeps it.
            return;
        }
        if !late.is_zero() && !killed {
            for guest in &ephemeral {
                cgroup::kill(guest);
            }
            killed = true;
        }
        std::thread::sleep(POLL);
    }
}

/// The guests' cgroups of ephemeral and of durable deployments. A directory says which,
/// not its owner: another host agent may have adopted the guests by now.
fn guests(group: &Path, data_dir: &Path) -> io::Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let durable = durable(data_dir)?;
    let ids = durable.iter().filter_map(|path| path.file_name()?.to_str());
    let prefixes: Vec<_> = ids.map(|id| format!("{}.", short_id(id))).collect();
    let is_ephemeral = |guest: &PathBuf| {
        let name = guest.file_name().unwrap_or_default().to_string_lossy();
        !prefixes.iter().any(|prefix| name.starts_with(prefix))
    };
    Ok(cgroup::guests(group).into_iter().partition(is_ephemeral))
}

/// Runs the janitor process after [`crate::child::begin`]: waits for the end of standard
/// input, then removes what is left.
pub fn main(mut arguments: impl Iterator<Item = PathBuf>) -> io::Result<()> {
    let (Some(data_dir), Some(owner), Some(socket)) =
        (arguments.next(), arguments.next(), arguments.next())
    else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    io::stdin().read_to_end(&mut Vec::new())?;
    let deadline = Instant::now() + END_LIMIT;
    let owner = owner.to_string_lossy();
    loop {
        // May fail while a VMM process still creates files.
        let _ = sweep(&data_dir);
        if is_clean(&data_dir, &owner) || Instant::now() >= deadline {
            break;
        }
        std::thread::sleep(POLL);
    }
    let _ = ContentStore::new(&data_dir).sweep();
    if let Some(group) = arguments.next() {
        remove_group(&group, &data_dir, deadline);
    }
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::deployment::{DeploymentDir, Retention};
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;
    use tokio::sync::mpsc;

    #[test]
    fn guests_that_another_host_agent_adopted_are_spared() {
        let dir = tempfile::tempdir().unwrap();
        let group = dir.path().join("host-agent-0.1");
        for guest in ["aaaaaaaa.R_IN_0", "bbbbbbbb.R_IN_0", "supervisor"] {
            fs::create_dir_all(group.join(guest)).unwrap();
        }
        let deployment = DeploymentDir::create(dir.path(), &"a".repeat(32), "other").unwrap();
        deployment.retain(Retention::Durable).unwrap();
        let (ephemeral, durable) = guests(&group, dir.path()).unwrap();
        assert_eq!(ephemeral, [group.join("bbbbbbbb.R_IN_0")]);
        assert_eq!(durable, [group.join("aaaaaaaa.R_IN_0")]);
    }

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
        let exists = |pid: u32| Path::new(&format!("/proc/{pid}")).exists();
        let killed = pids.recv().await.unwrap();
        let pid = Pid::from_raw(i32::try_from(killed).unwrap());
        kill(pid, Signal::SIGKILL).unwrap();
        let second = pids.recv().await.unwrap();
        assert!(!exists(killed) && exists(second));
        drop(janitor);
        // The runtime reaps a child without a waiter when another child ends.
        let end = Instant::now() + Duration::from_secs(20);
        while exists(second) && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(!exists(second));
    }
}
