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
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::deployment::{remove_if_dead, short_id};
use crate::cgroup;

/// First argument of a janitor process.
pub const VERB: &str = "janitor";
/// Time for VMM processes to let go of a deployment.
const LET_GO: Duration = Duration::from_secs(30);
/// Time for a process to be gone after it was killed.
const KILLED: Duration = Duration::from_secs(5);
/// Time between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The command's side: while it lives, so does the janitor.
#[derive(Debug)]
pub struct Janitor {
    _alive: OwnedFd,
}

/// Starts a janitor for the deployment in `directory`, with its socket in
/// `runtime_dir` and its guests' cgroups in `group`.
pub fn start(directory: &Path, runtime_dir: &Path, group: Option<&Path>) -> io::Result<Janitor> {
    use std::os::unix::process::CommandExt;
    let (reader, writer) = io::pipe()?;
    // Its end is not waited for: it outlives this process by design, and a
    // command that ends by itself leaves it to init.
    Command::new("/proc/self/exe")
        .arg(VERB)
        .arg(directory)
        .arg(runtime_dir)
        .args(group)
        .env_clear()
        .stdin(Stdio::from(reader))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()?;
    Ok(Janitor {
        _alive: writer.into(),
    })
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

/// The janitor process: waits for the end of its standard input.
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
    let socket = runtime_dir.join(format!("{}.sock", short_id(&directory)));
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
