//! A process by its pidfd: identity, kill, wait for the end, reap.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Child;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime;

/// A process, distinct from a later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since the host booted.
    pub start_ticks: u64,
}

impl ProcessId {
    /// Whether the process still runs.
    pub fn runs(self) -> bool {
        stat(self.pid).is_ok_and(|stat| !stat.zombie && stat.start_ticks == self.start_ticks)
    }
}

/// An open pidfd. Dropped, it leaves the process alone, but reaps a child in the
/// background.
#[derive(Debug)]
pub(super) struct ProcessHandle {
    /// `None` only while the handle is dropped.
    pidfd: Option<AsyncFd<OwnedFd>>,
    id: ProcessId,
    child: bool,
    /// How the process ended, once it has, and was reaped if it is a child.
    ended: Option<String>,
}

impl ProcessHandle {
    /// Takes over a child of this process, which is killed on an error.
    pub(super) fn child(mut child: Child) -> io::Result<Self> {
        Self::open(child.id(), true).inspect_err(|_| {
            // Neither fails for a child that is not reaped.
            let _ = child.kill().and_then(|()| child.wait());
        })
    }

    /// Opens a process that runs, whoever its parent is; `NotFound` if none does.
    pub(super) fn running(pid: u32) -> io::Result<Self> {
        Self::open(pid, false)
    }

    fn open(pid: u32, child: bool) -> io::Result<Self> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pidfd = pidfd_open(
            number.ok_or(io::ErrorKind::InvalidInput)?,
            PidfdFlags::empty(),
        )
        .map_err(missing)?;
        let start_ticks = stat(pid)?.start_ticks;
        // The start time is that of this process if the process ran until after it
        // was read: its pid cannot have been reused before.
        let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        if !child && poll(&mut fds, PollTimeout::ZERO)? > 0 {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Self {
            pidfd: Some(register(pidfd)?),
            id: ProcessId { pid, start_ticks },
            child,
            ended: None,
        })
    }

    pub(super) const fn id(&self) -> ProcessId {
        self.id
    }

    /// Sends SIGKILL. Fails only when the process has ended already.
    pub(super) fn kill(&self) {
        if let Some(pidfd) = &self.pidfd {
            let _ = pidfd_send_signal(pidfd.get_ref(), Signal::KILL);
        }
    }

    /// Waits for the end of the process; how it ended. Cancelling loses nothing.
    pub(super) async fn ended(&mut self) -> io::Result<String> {
        if let Some(how) = &self.ended {
            return Ok(how.clone());
        }
        let pidfd = self.pidfd.as_ref().ok_or(io::ErrorKind::NotFound)?;
        // A pidfd is readable from the end of its process on.
        let _ready = pidfd.readable().await?;
        let how = if self.child {
            reap(pidfd.get_ref())?
        } else {
            // Only the parent learns the exit status.
            "ended".to_owned()
        };
        self.ended = Some(how.clone());
        Ok(how)
    }
}

impl Drop for ProcessHandle {
    fn drop(&mut self) {
        let (true, None, Some(pidfd)) = (self.child, &self.ended, self.pidfd.take()) else {
            return;
        };
        // Without a runtime this process ends soon, and init reaps its children.
        if let Ok(runtime) = runtime::Handle::try_current() {
            runtime.spawn(async move {
                if pidfd.readable().await.is_ok() {
                    let _ = reap(pidfd.get_ref());
                }
            });
        }
    }
}

#[allow(unsafe_code)]
fn register(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` owns its descriptor, which stays open and the same until
    // the `AsyncFd` drops it.
    let registered = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
    Ok(registered?)
}

fn missing(error: rustix::io::Errno) -> io::Error {
    match error {
        rustix::io::Errno::SRCH => io::ErrorKind::NotFound.into(),
        other => other.into(),
    }
}

fn reap(pidfd: &OwnedFd) -> io::Result<String> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    let status = waitid(WaitId::PidFd(pidfd.as_fd()), options)?;
    let status = status.ok_or(io::ErrorKind::WouldBlock)?;
    Ok(match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("ended with code {code}"),
        (_, Some(libc::SIGSYS)) => "was killed: it made a system call that its \
                                     sandbox forbids (SIGSYS)"
            .to_owned(),
        (_, Some(signal)) => format!("was killed by signal {signal}"),
        _ => "ended".to_owned(),
    })
}

/// Part of `/proc/PID/stat`.
#[derive(Debug)]
struct Stat {
    zombie: bool,
    start_ticks: u64,
}

/// Reads `/proc/PID/stat` (`proc_pid_stat(5)`).
fn stat(pid: u32) -> io::Result<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The command's name, in parentheses, may itself hold any of these characters.
    let (_, fields) = text.rsplit_once(") ").ok_or(io::ErrorKind::InvalidData)?;
    let mut fields = fields.split(' ');
    // Field 3 is the state, field 22 the start time.
    let zombie = matches!(fields.next(), Some("Z" | "X"));
    let start_ticks = fields.nth(22 - 4).and_then(|field| field.parse().ok());
    Ok(Stat {
        zombie,
        start_ticks: start_ticks.ok_or(io::ErrorKind::InvalidData)?,
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_killed_child_is_reaped_and_its_end_stays_known() {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let mut handle = ProcessHandle::child(child).unwrap();
        let id = handle.id();
        assert!(id.runs());
        handle.kill();
        for _ in 0..2 {
            assert_eq!(handle.ended().await.unwrap(), "was killed by signal 9");
        }
        assert!(!id.runs());
        let error = ProcessHandle::running(id.pid).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_end_by_the_sandbox_is_reported_as_that() {
        let kill = ["-c", "kill -SYS $$"];
        let child = Command::new("sh").args(kill).spawn().unwrap();
        let mut handle = ProcessHandle::child(child).unwrap();
        let how = handle.ended().await.unwrap();
        assert!(how.contains("its sandbox forbids"), "{how}");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn the_end_of_another_process_is_seen_but_not_reaped() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let mut other = ProcessHandle::running(child.id()).unwrap();
        other.kill();
        assert_eq!(other.ended().await.unwrap(), "ended");
        let id = other.id();
        // A zombie does not count as a running process.
        assert!(!id.runs());
        assert!(ProcessHandle::running(id.pid).is_err());
        drop(other);
        assert!(!child.wait().unwrap().success());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_dropped_handle_reaps_its_child_in_the_background() {
        let child = Command::new("true").spawn().unwrap();
        let pid = child.id();
        drop(ProcessHandle::child(child).unwrap());
        let exists = || std::path::Path::new(&format!("/proc/{pid}")).exists();
        let reaped = async {
            while exists() {
                tokio::task::yield_now().await;
            }
        };
        let limit = std::time::Duration::from_secs(20);
        tokio::time::timeout(limit, reaped).await.unwrap();
    }

    #[test]
    fn another_process_with_the_same_pid_is_told_apart() {
        let pid = std::process::id();
        let start_ticks = stat(pid).unwrap().start_ticks;
        assert!(ProcessId { pid, start_ticks }.runs());
        let start_ticks = start_ticks - 1;
        assert!(!ProcessId { pid, start_ticks }.runs());
    }
}
